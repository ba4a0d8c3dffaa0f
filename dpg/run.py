"""One experiment from a preset to a finished run folder."""

import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dpg import report
from dpg.build import Parts, build
from dpg.cards import write_cards
from dpg.display import Display
from dpg.engine import BuiltinEngine, Engine, Interrupted, checkpoint_due
from dpg.estimate import estimate, refuse_too_large
from dpg.folder import RunFolder
from dpg.loop import write
from dpg.preset import Preset
from dpg.records import Checkpoint, Record
from dpg.settings import Settings
from dpg.tracking import refuse_missing, tracker


def run(preset: Preset, path: Path, *, resume: bool = False, command: str = "", engine: Engine | None = None) -> None:
    """Carry out `preset` in the folder `path`; `command` is what the report says made it.

    Args:
        engine: what trains; None for the loop of this package. Of several processes, each calls this function.

    Raises:
        ValueError, RunFolderError: before anything is trained, for settings that cannot work.
        Interrupted: after Ctrl-C, once the step in progress is finished and saved.
    """
    engine, settings, folder = engine or BuiltinEngine(), preset.settings, RunFolder(path)
    refuse_missing(settings.track)
    environment = engine.environment(settings, path)
    parts = build(preset)
    config = {"experiment": preset.experiment.name, "command": command, **preset.as_dict(), **_environment(parts)}
    config |= environment
    expected = estimate(parts, settings)
    refuse_too_large(expected, settings)
    checkpoint = engine.reopen(folder, config) if resume else None
    if not engine.is_main:
        engine.train(parts, settings, folder, checkpoint, lambda record, save: None)
        return
    start = checkpoint.step + 1 if isinstance(checkpoint, Checkpoint) else 0
    print(f"{preset.experiment.name}: {expected}", flush=True)
    if not resume:
        folder.create(config, needed_bytes=expected.disk)
        folder.write_text("preset.yaml", preset.text())
        _prepare(folder, parts, settings)

    with (
        # One of several processes cannot stop at a step of its own; their launcher ends them all.
        _stop_requested() if engine.num_processes == 1 else nullcontext(lambda: False) as stopping,
        Display(settings.num_steps) as display,
        tracker("none" if engine.tracks else settings.track, path, config, start) as track,
    ):

        def on_step(record: Record, save: Callable[[], None]) -> None:
            folder.record(record)
            display.show(record)
            track(record)
            if stopping() or checkpoint_due(settings, record.step):
                save()
            if stopping() and record.step < settings.num_steps:
                raise Interrupted(
                    f"stopped after step {record.step} of {settings.num_steps}; nothing is lost. "
                    f"Continue with the same command and --resume --out {path}"
                )

        engine.train(parts, settings, folder, checkpoint, on_step)
    _finish(folder, parts, preset)


def _prepare(folder: RunFolder, parts: Parts, settings: Settings) -> None:
    """What later steps compare with: the untrained target, and texts that owe nothing to the training."""
    parts.judge.target.model.save_pretrained(folder.path / "target")
    parts.judge.target.tokenizer.save_pretrained(folder.path / "target")
    folder.write_texts("untrained.jsonl", _texts(parts, settings))
    folder.write_texts("prose.jsonl", [parts.prose[i % len(parts.prose)] for i in range(settings.dataset_texts)])


def _finish(folder: RunFolder, parts: Parts, preset: Preset) -> None:
    texts = _texts(parts, preset.settings)
    folder.write_texts("dataset.jsonl", texts)
    (folder.path / "dataset").mkdir(exist_ok=True)
    folder.write_texts("dataset/train.jsonl", texts)  # The same as `datasets` and the hub want it.
    model = parts.generator.model
    merged = model.merge_and_unload() if preset.settings.lora_rank is not None else model
    merged.save_pretrained(folder.path / "generator")
    parts.generator.tokenizer.save_pretrained(folder.path / "generator")
    report.write(folder, parts.judge, preset.experiment.figure)
    write_cards(folder)


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
