"""The folder of a run: what is in it, written so that nothing is ever half there."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from dpg.records import Checkpoint, Record

CHECKPOINT = "checkpoint.pt"
TRL_CHECKPOINT = "checkpoint.json"
"""Which of TRL's own checkpoints is whole."""


class RunFolderError(Exception):
    """A run folder that cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    def create(self, config: dict[str, Any], needed_bytes: int) -> None:
        """Start a run here.

        Raises:
            RunFolderError: if something is here already, or the disk has less than `needed_bytes` free.
        """
        if self.path.is_file():
            raise RunFolderError(f"{self.path} is a file. Pass a folder with --out.")
        if self.path.exists() and any(self.path.iterdir()):
            resumable = any((self.path / name).exists() for name in (CHECKPOINT, TRL_CHECKPOINT))
            what = (
                "Pass --resume to continue the run in it" if resumable else "It holds no checkpoint to resume. Empty it"
            )
            raise RunFolderError(f"{self.path} is not empty. {what}, or pass another folder with --out.")
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise RunFolderError(
                f"the disk of {self.path} has {free / 1e6:.0f} MB free, and the run needs about "
                f"{needed_bytes / 1e6:.0f} MB. Free some space, or choose another disk with --out."
            )
        self.write_json("config.json", config)

    def reopen(self, config: dict[str, Any]) -> Checkpoint:
        """The newest checkpoint of the run here, with its records cut back to it.

        Raises:
            RunFolderError: if there is no such run, or it was started with another configuration.
        """
        self.refuse_another_run(config, CHECKPOINT)
        try:
            checkpoint = Checkpoint(**torch.load(self.path / CHECKPOINT, weights_only=True))
        except Exception as error:  # torch has a different error for every way in which a file can be damaged.
            raise RunFolderError(f"{self.path / CHECKPOINT} is damaged ({error}). Start a new run.") from error
        self.cut_back(checkpoint.step)
        return checkpoint

    def refuse_another_run(self, config: dict[str, Any], checkpoint: str) -> None:
        """Raise a RunFolderError unless the run here has this configuration, and all that resuming needs.

        Args:
            checkpoint: the name of the file or folder that its engine goes on from.
        """
        started = self.read_config()
        for key in sorted({*started, *config} - {"command", "track"}):
            if started.get(key) != config.get(key):
                raise RunFolderError(
                    f"the run in {self.path} was started with {key} = {started.get(key)!r}, not {config.get(key)!r}. "
                    "Resume it with the same arguments, or start another with a new --out."
                )
        for name in (checkpoint, "metrics.jsonl", "untrained.jsonl", "prose.jsonl", "target"):
            if not (self.path / name).exists():
                raise RunFolderError(f"{self.path} cannot be resumed: it holds no {name}. Delete it and start anew.")

    def cut_back(self, step: int) -> None:
        """Forget the records of the steps after `step`.

        Raises:
            RunFolderError: if one up to there is missing.
        """
        kept = [line for line in self.records() if line["step"] <= step]
        if [line["step"] for line in kept] != list(range(step + 1)):
            raise RunFolderError(
                f"{self.path / 'metrics.jsonl'} does not hold every step up to {step}, where the checkpoint "
                "is. It was changed or damaged; start a new run."
            )
        self._replace("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())

    def read_config(self) -> dict[str, Any]:
        """What the run was started with.

        Raises:
            RunFolderError: if there is no run here.
        """
        if not (self.path / "config.json").exists():
            raise RunFolderError(f"{self.path} is not a run folder: it has no config.json.")
        config = self._parsed("config.json", (self.path / "config.json").read_text())
        if not isinstance(config, dict) or "experiment" not in config:
            raise RunFolderError(f"{self.path} is not a run folder: its config.json names no experiment.")
        return config

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep `checkpoint` in place of the one before."""
        content = BytesIO()  # torch hides a full disk behind an error of its own; plain writing does not.
        torch.save(checkpoint._asdict(), content)
        self._replace(CHECKPOINT, content.getvalue())

    def record(self, record: Record) -> None:
        """Add a line to `metrics.jsonl`, and the texts of a validation to a file of their own."""
        if record.texts is not None:
            (self.path / "validation").mkdir(exist_ok=True)
            self.write_texts(validation_file(record.step), record.texts)
        line = {key: value for key, value in record._asdict().items() if key not in ("measures", "validation", "texts")}
        line |= record.measures
        line |= {f"val/{name}": value for name, value in (record.validation or {}).items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without a last one that a kill left unfinished."""
        text = (self.path / "metrics.jsonl").read_text()
        return [self._parsed("metrics.jsonl", line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def write_texts(self, name: str, texts: Iterable[str]) -> None:
        """One `{"text": ...}` a line."""
        self._replace(name, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())

    def read_texts(self, name: str) -> list[str]:
        """The texts of a file written by `write_texts`.

        Raises:
            RunFolderError: if the run did not get as far as writing it.
        """
        if not (self.path / name).exists():
            raise RunFolderError(
                f"{self.path} holds no {name}: the run in it is not finished. Continue it with --resume."
            )
        return [self._parsed(name, line)["text"] for line in (self.path / name).read_text().splitlines()]

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of a finished run.

        Raises:
            RunFolderError: if the run did not get as far as writing it.
        """
        if not (self.path / name).exists():
            raise RunFolderError(
                f"{self.path} holds no {name}: the run in it is not finished, or an older version made it. Continue it "
                "with --resume."
            )
        return self._parsed(name, (self.path / name).read_text(encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file a person can read."""
        self._replace(name, (json.dumps(value, indent=2) + "\n").encode())

    def write_text(self, name: str, text: str) -> None:
        """A text file."""
        self._replace(name, text.encode())

    def _parsed(self, name: str, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise RunFolderError(f"{self.path / name} is damaged ({error}). Start a new run.") from error

    def _replace(self, name: str, content: bytes) -> None:
        """Write beside, then rename: a reader sees the old file or the new one."""
        temporary = self.path / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, self.path / name)


def validation_file(step: int) -> str:
    """Where a run folder has the fresh texts of a validated step."""
    return f"validation/step-{step:06d}.jsonl"
