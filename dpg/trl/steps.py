"""GRPO steps as TRL takes them, one record for each: what its updates, its logs and our reward say of them."""

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import metagrad as mg
from dpg.build import Parts
from dpg.engine import Interrupted, OnStep, checkpoint_due
from dpg.folder import TRL_CHECKPOINT, RunFolder
from dpg.loop import validate
from dpg.records import Record
from dpg.settings import Settings
from dpg.trl.reward import Scored


class Steps(TrainerCallback):
    """Makes records and asks for checkpoints; a step is `updates_per_step` updates of TRL.

    Attributes:
        asked: the `Interrupted` that ended the run, if one did.
        unlogged: figures of a validation that TRL's trackers have not seen yet.
    """

    def __init__(self, parts: Parts, settings: Settings, folder: RunFolder, on_step: OnStep, is_main: bool) -> None:
        self.parts, self.settings, self.folder, self.on_step, self.is_main = parts, settings, folder, on_step, is_main
        self.asked: Interrupted | None = None
        self.unlogged: dict[str, float] = {}
        self._scored: Scored | None = None
        self._measures: dict[str, float] = {}
        self._start, self._aside, self._seconds = 0.0, 0.0, 0.0

    def observe(self, scored: Scored) -> Mapping[str, float]:
        """Keep what the step's record says of a batch; the figures of the target trained on it."""
        start = perf_counter()
        params = scored.scores.params
        self._measures = {} if params is None else self.parts.judge.measures(params, scored.texts)
        self._scored = scored
        self._aside += perf_counter() - start
        return self._measures

    def begin(self) -> None:
        """Validate the untrained generator; raises what `on_step` does."""
        if self.is_main:
            figures, texts = self.validated(0)
            self.on_step(Record(0, figures["phi"], 0.0, 0.0, 0, 0.0, {}, figures, texts), lambda: self.keep(0))

    def validated(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Figures of fresh texts, and the texts; the model is left in training mode, as TRL has it."""
        model, parts = self.parts.generator.model, self.parts
        model.eval()
        figures, texts = validate(parts.generator, parts.judge, parts.validation, self.settings.seed, step)
        model.train()
        self.unlogged = {f"val/{name}": value for name, value in figures.items()}
        return figures, texts

    def keep(self, update: int) -> None:
        """Say that the checkpoint of `update` is whole; 0 is the beginning, which needs none."""
        self.folder.write_json(TRL_CHECKPOINT, {"update": update})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if state.global_step % self.settings.updates_per_step == 0:
            self._start, self._aside = perf_counter(), 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        step, rest = divmod(state.global_step, self.settings.updates_per_step)
        if rest == 0:
            self._seconds = perf_counter() - self._start - self._aside
            control.should_log = True
            control.should_save = checkpoint_due(self.settings, step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        if logs is None or "loss" not in logs or state.global_step == 0:
            return  # The summary at the end, or a validation.
        step = state.global_step // self.settings.updates_per_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise mg.NonFiniteError(
                    f"GRPO step {step}: the generator's {name} is {logs[name]}. Lower `learning_rate` or raise "
                    "`kl_coefficient`."
                )
        if not self.is_main:
            return

        def save() -> None:
            control.should_save = True

        try:
            self.on_step(self._record(step, logs), save)
        except Interrupted as asked:
            self.asked, control.should_training_stop = asked, True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.is_main:
            self.keep(state.global_step)

    def _record(self, step: int, logs: Mapping[str, float]) -> Record:
        assert self._scored is not None
        scores, every = self._scored.scores, self.parts.validation.every
        figures, texts = None, None
        if step % every == 0 or step == self.settings.num_steps:
            figures, texts = self.validated(step)
        return Record(
            step=step,
            phi=scores.phi,
            reward_std=float(scores.rewards.std()),
            seconds=self._seconds,
            num_tokens=self._scored.num_tokens,
            kl=logs.get("kl", 0.0),
            measures=self._measures,
            validation=figures,
            texts=texts,
        )
