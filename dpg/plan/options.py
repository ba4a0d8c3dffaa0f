"""A workload from the options of `dpg plan`: a model by name, and numbers; or a run by its preset, and some of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpg.estimate import available_memory
from dpg.plan.inputs import of_preset
from dpg.plan.shape import named_shape
from dpg.plan.workload import Devices, HeldOut, Inner, Workload, Writer
from dpg.preset import load, parse

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
OF_A_RUN = ("slots", "states")
"""Options that a run has no setting for, and that may stand beside an experiment."""


@dataclass(frozen=True)
class Options:
    """What `dpg plan --model` is told; texts are on all devices together, microbatches on each one."""

    model: str
    generator: str | None = None
    batch: int = 256
    sequence_length: int = 128
    steps: int = 1
    metrics: int = 1
    held_out: int = 0
    optimizer: str = "adamw"
    microbatch: int | None = None
    slots: int = 8
    states: str = "device"
    prompt_tokens: int = 64
    group_size: int = 4
    updates: int = 1
    generation_batch: int | None = None
    policy_microbatch: int | None = None
    lora_rank: int | None = None
    reference: bool = True

    def workload(self, devices: Devices) -> Workload:
        """What they say.

        Raises:
            ValueError: for a number or a name that cannot be.
        """
        moments = {"adamw": 2, "sgd": 0}
        if self.optimizer not in moments:
            raise ValueError(f"optimizer is {self.optimizer!r}. Choose from: {', '.join(moments)}.")
        if self.held_out < 0 or self.group_size < 1:
            raise ValueError(
                f"held-out is {self.held_out}, group-size {self.group_size}. Pass 0 or more, and 1 or more."
            )
        inner = Inner(
            named_shape(self.model),
            num_steps=self.steps,
            batch=self.batch,
            length=self.sequence_length,
            num_metrics=self.metrics,
            microbatch=self.microbatch,
            num_moments=moments[self.optimizer],
            slots=self.slots,
            place=self.states,
            held_out=HeldOut(self.held_out, HeldOut().at_once, self.sequence_length),
        )
        return Workload(inner, None if self.generator == "none" else self._writer(), devices)

    def _writer(self) -> Writer:
        num_texts = self.steps * self.batch
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora-rank is {self.lora_rank}. Pass at least 1.")
        return Writer(
            named_shape(self.generator or self.model, lora_rank=self.lora_rank),
            num_texts=num_texts,
            num_prompts=-(-num_texts // self.group_size),
            prompt=self.prompt_tokens,
            written=self.sequence_length,
            at_once=self.generation_batch,
            updates=self.updates,
            microbatch=self.policy_microbatch,
            has_reference=self.reference,
        )


def of_run(
    experiment: str, preset: str, assignments: list[str], options: Mapping[str, Any], devices: Devices
) -> Workload:
    """The workload of `dpg run` with the same arguments, and with those of `options` that a run has no setting for.

    Raises:
        ValueError: for an option that is a setting of the run, or what `dpg run` would refuse.
    """
    if wrong := sorted(set(options) - set(OF_A_RUN)):
        raise ValueError(
            f"--{wrong[0].replace('_', '-')} goes with --model. With an experiment, say it as `dpg run` would: "
            "--set key=value."
        )
    chosen = load(experiment, preset).changed(parse(assignments))
    cpu = not chosen.settings.device.startswith("cuda")
    # A run on the CPU has this machine's memory, unless another's is given.
    capacity = available_memory(torch.device("cpu")) if cpu and devices.capacity is None else devices.capacity
    workload = of_preset(chosen, replace(devices, cpu=cpu, capacity=capacity))
    assert workload.inner is not None
    names = {"slots": "slots", "states": "place"}
    return replace(workload, inner=replace(workload.inner, **{names[key]: value for key, value in options.items()}))


def parsed_bytes(text: str) -> int:
    """The bytes that a person means by 80GB, 24GiB or 500MB.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)b?", text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is no amount of memory. Pass one as 80GB (10⁹ bytes each) or 24GiB (2³⁰).")
    return int(float(found[1]) * UNITS[found[2]])
