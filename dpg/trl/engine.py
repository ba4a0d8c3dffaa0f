"""`dpg run --engine trl`: the GRPO steps of a run taken by TRL's GRPOTrainer, in one process or several."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from dpg.build import Parts
from dpg.engine import Engine, OnStep
from dpg.folder import TRL_CHECKPOINT, RunFolder, RunFolderError
from dpg.generator import Generator
from dpg.settings import Settings
from dpg.trl.config import grpo_config, read_options
from dpg.trl.processes import from_first
from dpg.trl.reward import RewardFunction
from dpg.trl.steps import Steps
from dpg.trl.trainer import GrouplessGRPOTrainer

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Ways to train together in which each process has the whole generator."""


@dataclass(frozen=True)
class TrlEngine(Engine):
    """TRL's GRPOTrainer.

    Args:
        options: fields of GRPOConfig that no setting stands for, as `use_vllm`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    name = "trl"
    tracks = True

    @classmethod
    def from_file(cls, path: Path | None) -> "TrlEngine":
        """With the options of a YAML file; without any if there is none."""
        return cls({} if path is None else read_options(path))

    @property
    def num_processes(self) -> int:
        """As the launcher, accelerate or torchrun, says."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return int(os.environ.get("RANK", "0")) == 0

    def environment(self, settings: Settings, path: Path) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._config(settings, path)  # Refuses; and joins the other processes, which gives this one its device.
        return {
            "engine": self.name,
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "num_processes": self.num_processes,
            "trl_config": dict(self.options),
        }

    def reopen(self, folder: RunFolder, config: dict[str, Any]) -> int:
        return from_first(lambda: _reopen(folder, config))

    def train(
        self, parts: Parts, settings: Settings, folder: RunFolder, checkpoint: int | None, on_step: OnStep
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # What TRL and transformers tell each other.
            self._train(parts, settings, folder, checkpoint, on_step)

    def _train(
        self, parts: Parts, settings: Settings, folder: RunFolder, checkpoint: int | None, on_step: OnStep
    ) -> None:
        datasets.disable_progress_bars()
        steps = Steps(parts, settings, folder, on_step, self.is_main)
        reward = RewardFunction(parts.reward, settings.group_size, observe=steps.observe)
        kind = GrouplessGRPOTrainer if parts.reward.groupless else GRPOTrainer
        trainer = kind(
            parts.generator.model,
            reward,
            self._config(settings, folder.path),
            Dataset.from_list(prompt_rows(parts, settings)),
            processing_class=parts.generator.tokenizer,
            callbacks=[steps],
        )
        if trainer.accelerator.distributed_type not in WHOLE:
            raise ValueError(
                f"dpg run validates with the whole generator, and {trainer.accelerator.distributed_type} shares it "
                "out. Use RewardFunction in a script of your own: docs/trl.md."
            )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_LogsValidations(trainer, steps))
        if checkpoint is None:
            steps.begin()
        trainer.train(resume_from_checkpoint=str(_place(folder, checkpoint)) if checkpoint else None)
        trainer.accelerator.end_training()
        parts.generator.model.eval()
        if steps.asked is not None:
            raise steps.asked

    def _config(self, settings: Settings, path: Path) -> GRPOConfig:
        return grpo_config(settings, path / "trl", self.num_processes, self.options)


class _LogsValidations(TrainerCallback):
    """Hands the figures of validations to TRL's trackers."""

    def __init__(self, trainer: GRPOTrainer, steps: Steps) -> None:
        self.trainer, self.steps = trainer, steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        # Not while TRL logs a step, whose figures it would log twice.
        figures, self.steps.unlogged = self.steps.unlogged, {}
        if figures and args.report_to:
            self.trainer.log(figures)

    on_train_end = on_step_begin


def _place(folder: RunFolder, update: int) -> Path:
    """Where TRL keeps its checkpoint of an update."""
    return folder.path / "trl" / f"checkpoint-{update}"


def _reopen(folder: RunFolder, config: dict[str, Any]) -> int:
    """The update after which the run in `folder` goes on, its records cut back to there."""
    folder.refuse_another_run(config, TRL_CHECKPOINT)
    try:
        update = int(json.loads((folder.path / TRL_CHECKPOINT).read_text())["update"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder.path / TRL_CHECKPOINT} is damaged ({error}). Start a new run.") from error
    if update and not (_place(folder, update) / "trainer_state.json").exists():
        raise RunFolderError(f"{folder.path} cannot be resumed: {_place(folder, update)} is gone. Start a new run.")
    folder.cut_back(update // config["updates_per_step"])
    return update


def prompt_rows(parts: Parts, settings: Settings) -> list[dict[str, Any]]:
    """The prompts of all steps in order, drawn for each step anew, as the built-in loop draws them.

    Raises:
        ValueError: for a tokenizer that ends every text itself: TRL would continue prompts that have ended.
    """
    generator = parts.generator
    if generator.tokenizer("a")["input_ids"][-1:] == [generator.tokenizer.eos_token_id]:
        raise ValueError(
            f"{type(generator.tokenizer).__name__} puts its end token behind every text, and TRL continues prompts as "
            "they are tokenized. Turn that off (add_eos_token=False), or use the built-in engine."
        )
    draws = torch.Generator().manual_seed(settings.seed)
    rows = [_row(generator, prompt) for prompt in parts.prompts]
    orders = [torch.randperm(len(rows), generator=draws) for _ in range(settings.num_steps)]
    return [rows[i] for order in orders for i in order[: settings.prompts_per_step].tolist()]


def _row(generator: Generator, prompt: str) -> dict[str, Any]:
    text = generator.cut(prompt)
    return {"prompt": [{"role": "user", "content": text}] if generator.chat else text}
