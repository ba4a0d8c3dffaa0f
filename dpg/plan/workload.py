"""What is to be planned: a target's training behind one reward, a generator, and the devices that share them."""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from dpg.plan.shape import Shape

PLACES = ("device", "pinned", "disk")


class HeldOut(NamedTuple):
    """Texts that a metric is evaluated on, on all devices together; none for a metric that reads weights alone."""

    texts: int = 0
    at_once: int = 256
    length: int = 2


@dataclass(frozen=True)
class Inner:
    """The target's training behind one reward.

    Args:
        shape: of the target.
        num_steps: T inner steps.
        batch: texts in an inner step, on all devices together.
        length: tokens of a text.
        num_metrics: K metrics that share the run.
        microbatch: texts differentiated at a time on one device; None for all that it has.
        num_moments: numbers that the optimizer remembers for each parameter: 2 for Adam, 0 for SGD.
        slots: of the schedule `Binomial`.
        place: where kept states are: on the device, in pinned memory of its host, or on disk.
        num_runs: trainings behind one reward, one after another.
        held_out: what each metric is evaluated on.
        metagradient: False where the target is only trained.
    """

    shape: Shape
    num_steps: int
    batch: int
    length: int
    num_metrics: int = 1
    microbatch: int | None = None
    num_moments: int = 2
    slots: int = 8
    place: str = "device"
    num_runs: int = 1
    held_out: HeldOut = HeldOut()
    metagradient: bool = True

    def __post_init__(self) -> None:
        _refuse_below_one(
            steps=self.num_steps,
            batch=self.batch,
            metrics=self.num_metrics,
            microbatch=self.microbatch,
            slots=self.slots,
        )
        positions = _positions(self.shape)
        if self.length < 2 or (positions and self.length > positions):
            raise ValueError(
                f"the sequence length is {self.length}. Pass from 2 to the {positions or 'any number of'} positions "
                f"of {self.shape.name}."
            )
        if self.place not in PLACES:
            raise ValueError(f"states are to be kept on {self.place!r}. Choose from: {', '.join(PLACES)}.")


@dataclass(frozen=True)
class Writer:
    """The generator that writes the texts and learns.

    Args:
        shape: of the generator, with its adapters where it has some.
        num_texts: written in a GRPO step, on all devices together.
        num_prompts: that they continue.
        prompt, written: tokens of a prompt, and of a text.
        at_once: texts sampled at a time on one device; None for all that it has.
        validated: texts of a validation that are asked for at a time, each to a prompt of its own.
        updates: optimizer updates that share a step's texts.
        microbatch: texts of an update that are differentiated at a time on one device; None for all.
        has_reference: whether a copy of the initial generator is kept for a KL penalty.
        entropy: whether the loss has an entropy bonus.
        own: whether log-probabilities are computed again in the weights' own type.
    """

    shape: Shape
    num_texts: int
    num_prompts: int
    prompt: int
    written: int
    at_once: int | None = None
    validated: int = 0
    updates: int = 1
    microbatch: int | None = None
    has_reference: bool = True
    entropy: bool = False
    own: bool = False

    def __post_init__(self) -> None:
        _refuse_below_one(
            batch=self.num_texts,
            prompts=self.num_prompts,
            prompt_tokens=self.prompt,
            new_tokens=self.written,
            generation_batch=self.at_once,
            updates=self.updates,
            policy_microbatch=self.microbatch,
        )
        positions = _positions(self.shape)
        if positions and self.prompt + self.written > positions:
            raise ValueError(
                f"a prompt of {self.prompt} tokens and {self.written} new ones exceed the {positions} positions of "
                f"{self.shape.name}. Lower one of them."
            )


@dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Args:
        number: of them: each has its share of the texts.
        sharded: divide parameters and everything of their size between them; otherwise each has all.
        capacity: bytes of one; None where nobody said.
        cpu: whether the device is the host itself.
    """

    number: int = 1
    sharded: bool = False
    capacity: int | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        _refuse_below_one(gpus=self.number, gpu_memory=self.capacity)

    def share(self, count: int) -> int:
        """The most of `count` texts that one device has."""
        return ceil(count / self.number)


@dataclass(frozen=True)
class Workload:
    """A run, or the half of one."""

    inner: Inner | None
    writer: Writer | None
    devices: Devices
    name: str = ""

    def __post_init__(self) -> None:
        if self.inner is None and self.writer is None:
            raise ValueError("there is nothing to plan: neither a target that is trained nor a generator.")


def _refuse_below_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name.replace('_', '-')} is {count}. Pass at least 1.")


def _positions(shape: Shape) -> int | None:
    return getattr(shape.model.config, "max_position_embeddings", None)  # Not every architecture has a limit.
