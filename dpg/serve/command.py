"""`dpg serve`: from a preset to a service, what it prints, and how it ends."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpg.build import build_reward
from dpg.preset import Preset
from dpg.serve.batch import Done, Failure
from dpg.serve.limits import Limits
from dpg.serve.scoring import scorer
from dpg.serve.wire import record

try:
    from dpg.serve.server import listen, make_room, read_token, refuse_strangers, url_of
    from dpg.serve.server import serve as serve_until_stopped
    from dpg.serve.service import Service
except ImportError as error:
    raise ValueError(f"dpg serve needs a package: {error}. Try pip install 'metagrad[serve]'.") from error


def serve(preset: Preset, host: str, port: int, token_file: Path | None, out: Path | None, changes: list[str]) -> None:
    """Serve the rewards of `preset` until Ctrl-C.

    Raises:
        ValueError, OSError: before anything is served, for what cannot work.
    """
    limits, token = Limits().changed(changes), read_token(token_file)
    refuse_strangers(host, token)
    make_room(limits.connections)
    with listen(host, port) as listening:
        judge, reward = build_reward(preset)
        if reward.groupless:
            raise ValueError(
                f"reward={preset.settings.reward} compares a text with the whole batch, and trainers compare it with "
                "those of its prompt. Serve another reward."
            )
        if out is not None:
            _prepare(out, preset)
        torch.manual_seed(preset.settings.seed)  # Of rewards that are controls, and random.
        print(f"{preset.experiment.name}: {preset.experiment.goal}")
        print(f"settings: {_line(_deciding(preset.as_dict()))}")
        print(f"limits: {_line(asdict(limits))}")
        print(f"serving {url_of(listening)}, {'with' if token else 'without'} a token; Ctrl-C stops", flush=True)
        service = Service(scorer(reward, judge), limits, _reporter(out))
        try:
            asyncio.run(serve_until_stopped(service, listening, token))
        except KeyboardInterrupt:
            pass
    print("stopped; whoever waited was told", flush=True)
    if service.computing:
        # Its thread cannot be stopped, nobody hears what it finds, and Python would wait for it.
        os._exit(0)


def _prepare(out: Path, preset: Preset) -> None:
    """Make the folder, or go on in one of the same preset."""
    saved = out / "preset.yaml"
    if (out / "config.json").exists() or (saved.exists() and saved.read_text(encoding="utf-8") != preset.text()):
        raise ValueError(f"{out} holds a run, or what was served by another preset. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    saved.write_text(preset.text(), encoding="utf-8")


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a reward."""
    own = ("target", "device", "reward", "cross_group", "sequence_length", "loss_denominator", "untie_head")
    return {key: value for key, value in settings.items() if key in own or key.startswith(("inner_", "train_"))}


def _line(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _reporter(out: Path | None) -> Callable[[Done], None]:
    """Prints a line for each batch, and keeps it in `metrics.jsonl`."""

    def report(done: Done) -> None:
        try:
            print(printable(line_of(done)), flush=True)
            if out is not None:
                with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record(done)) + "\n")
        except OSError as error:  # A full disk, or a closed terminal, must not cost a trainer its rewards.
            print(printable(f"dpg serve: batch {done.key} could not be reported: {error}"), file=sys.stderr, flush=True)

    return report


def printable(line: str) -> str:
    """`line` for any terminal: what is not plain ASCII is escaped, since names come from clients."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line).encode("ascii", "backslashreplace").decode()


def line_of(done: Done) -> str:
    """A finished batch for a person."""
    if isinstance(done.outcome, Failure):
        return f"{done.key}: no rewards: {done.outcome.message}"
    rewards = done.outcome
    phi = "" if rewards.phi is None else f"phi {rewards.phi:.6g}, "
    figures = "".join(f", {name} {value:.6g}" for name, value in rewards.measures.items())
    return (
        f"{done.key}: {done.shape.size} texts, {phi}reward std {rewards.reward_std:.3g}, "
        f"{rewards.seconds:.2f} s after {done.waited:.2f} s of waiting{figures}"
    )
