"""What a run will take, before it starts: memory, disk, texts and arithmetic, from the plan of `dpg plan`."""

import os
from dataclasses import dataclass

import torch

from dpg.build import Parts
from dpg.plan.inputs import TRAINED, num_texts_of_a_run, of_parts
from dpg.plan.lines import FLOAT
from dpg.plan.memory import memory
from dpg.plan.speed import work_of
from dpg.plan.workload import Workload
from dpg.settings import Settings


@dataclass(frozen=True)
class Estimate:
    """Of a whole run.

    Attributes:
        memory: the most bytes on the device at a time.
        always: those of it that are there all the time, whatever the sizes of batches.
        disk: bytes in the run folder.
        num_texts: written for training, validation and the final data set.
        num_inner_steps: of the target, for each reward.
        num_flops: of training; a validation counts as the writing and the training of its texts.
    """

    memory: int
    always: int
    disk: int
    num_texts: int
    num_inner_steps: int
    num_flops: float

    def __str__(self) -> str:
        return (
            f"about {_bytes(self.memory)} of memory and {_bytes(self.disk)} of disk; {self.num_texts} texts, "
            f"{self.num_inner_steps} inner steps a reward, {self.num_flops:.1e} floating-point operations"
        )


def estimate(parts: Parts, settings: Settings) -> Estimate:
    """The estimate of a run of `parts`: its plan, and what it writes."""
    workload = of_parts(parts, settings)
    assert workload.inner is not None and workload.writer is not None
    batch = settings.prompts_per_step * settings.group_size
    num_validations = len({*range(0, settings.num_steps, settings.validate_every), settings.num_steps})
    num_validated = num_validations * settings.validation_texts
    trained = -(-num_texts_of_a_run(settings) // settings.inner_batch_size) if settings.reward in TRAINED else 0
    found = memory(workload)
    num_weights = 7 * workload.writer.shape.num_params + workload.inner.shape.num_params
    return Estimate(
        memory=found.peak,
        always=found.always.bytes,
        disk=FLOAT * num_weights + 10_000_000,
        num_texts=settings.num_steps * batch + num_validated + 2 * settings.dataset_texts,
        num_inner_steps=trained,
        num_flops=settings.num_steps * _step(workload, trained > 0) + num_validated * _validated(workload),
    )


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or all of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_too_large(expected: Estimate, settings: Settings) -> None:
    """Raise a ValueError if what a run keeps all the time is more than the device has.

    What comes and goes is not refused: texts may be shorter than they can be.
    """
    there = available_memory(torch.device(settings.device))
    if expected.always > there:
        raise ValueError(
            f"the models and their optimizers take {_bytes(expected.always)}, and {settings.device} has "
            f"{_bytes(there)}. Choose smaller models, or train adapters: lora_rank=16. `dpg plan` says what takes what."
        )


def _step(workload: Workload, trained: bool) -> float:
    """Operations of a GRPO step; a reward that trains no target costs none."""
    own = ("writing", "learning")
    return sum(work.operations for work in work_of(workload) if trained or work.what in own)


def _validated(workload: Workload) -> float:
    """Operations of one text of a validation: to be written, and trained on."""
    assert workload.inner is not None and workload.writer is not None
    parts = {work.what: work.operations for work in work_of(workload)}
    return parts["writing"] / workload.writer.num_texts + parts["training"] / _num_trained(workload)


def _num_trained(workload: Workload) -> int:
    assert workload.inner is not None
    return workload.inner.num_runs * workload.inner.num_steps * workload.inner.batch


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError
