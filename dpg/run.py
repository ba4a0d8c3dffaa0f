"""One experiment from a preset to a finished run folder."""

import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpg import report
from dpg.build import Parts, build
from dpg.display import Display
from dpg.estimate import estimate, refuse_too_large
from dpg.folder import RunFolder
from dpg.loop import train, write
from dpg.preset import Preset
from dpg.records import Checkpoint, Record
from dpg.settings import Settings
from dpg.tracking import refuse_missing, tracker


class Interrupted(Exception):
    """The run was asked to stop and has saved all it did; the message says how to continue."""


def run(preset: Preset, path: Path, *, resume: bool = False, command: str = "") -> None:
    """Carry out `preset` in the folder `path`; `command` is what the report says made it.

    Raises:
        ValueError, RunFolderError: before anything is trained, for settings that cannot work.
        Interrupted: after Ctrl-C, once the step in progress is finished and saved.
    """
    refuse_missing(preset.settings.track)
    parts, settings, folder = build(preset), preset.settings, RunFolder(path)
    config = {"experiment": preset.experiment.name, "command": command, **preset.as_dict(), **_environment(parts)}
    expected = estimate(parts, settings)
    refuse_too_large(parts, settings)
    checkpoint = folder.reopen(config) if resume else None
    print(f"{preset.experiment.name}: {expected}", flush=True)
    if not resume:
        folder.create(config, needed_bytes=expected.disk)
        folder.write_text("preset.yaml", preset.text())
        _prepare(folder, parts, settings)

    with (
        _stop_requested() as stopping,
        Display(settings.num_steps) as display,
        tracker(settings.track, path, config) as track,
    ):

        def on_step(record: Record, take_checkpoint: Callable[[], Checkpoint]) -> None:
            folder.record(record)
            display.show(record)
            track(record)
            last = record.step == settings.num_steps
            if stopping() or last or record.step % settings.checkpoint_every == 0:
                folder.save(take_checkpoint())
            if stopping() and not last:
                raise Interrupted(
                    f"stopped after step {record.step} of {settings.num_steps}; nothing is lost. "
                    f"Continue with the same command and --resume --out {path}"
                )

        train(
            parts.generator,
            parts.prompts,
            parts.reward,
            parts.config,
            judge=parts.judge,
            validation=parts.validation,
            seed=settings.seed,
            resume=checkpoint,
            on_step=on_step,
        )
    _finish(folder, parts, preset)


def _prepare(folder: RunFolder, parts: Parts, settings: Settings) -> None:
    """What later steps compare with: the untrained target, and texts that owe nothing to the training."""
    parts.judge.target.model.save_pretrained(folder.path / "target")
    parts.judge.target.tokenizer.save_pretrained(folder.path / "target")
    folder.write_texts("untrained.jsonl", _texts(parts, settings))
    folder.write_texts("prose.jsonl", [parts.prose[i % len(parts.prose)] for i in range(settings.dataset_texts)])


def _finish(folder: RunFolder, parts: Parts, preset: Preset) -> None:
    folder.write_texts("dataset.jsonl", _texts(parts, preset.settings))
    model = parts.generator.model
    merged = model.merge_and_unload() if preset.settings.lora_rank is not None else model
    merged.save_pretrained(folder.path / "generator")
    parts.generator.tokenizer.save_pretrained(folder.path / "generator")
    report.write(folder, parts.judge, preset.experiment.figure)


def _texts(parts: Parts, settings: Settings) -> list[str]:
    """`dataset_texts` fresh texts to validation prompts, from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return write(parts.generator, parts.validation.prompts, settings.dataset_texts)


def _environment(parts: Parts) -> dict[str, Any]:
    """What besides the settings decides the bits of a run."""
    prompts = "\n".join([*parts.validation.prompts, *parts.prompts])
    return {
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "prompts_checksum": zlib.crc32(prompts.encode()),
    }


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first lets the step finish, the second ends the program at once."""
    requested = False

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)
