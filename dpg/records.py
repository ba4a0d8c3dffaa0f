"""What a run leaves behind step by step. Plain values, so that reading a run needs nothing that made it."""

from typing import Any, NamedTuple

from torch import Tensor


class Record(NamedTuple):
    """One GRPO step in numbers; `step` counts finished steps, and 0 is the untrained generator.

    Attributes:
        phi: Φ of the target trained on this step's rollouts, None if the reward trains none; on validation texts at
            step 0.
        reward_std: spread of the raw rewards.
        measures: readable figures of the trained target.
        validation: `phi` and the figures on fresh texts, where this step was validated.
        texts: those fresh texts.
    """

    step: int
    phi: float | None
    reward_std: float
    seconds: float
    num_tokens: int
    kl: float
    measures: dict[str, float]
    validation: dict[str, float] | None
    texts: list[str] | None


class Checkpoint(NamedTuple):
    """Everything the rest of a run depends on; `device_rng` where the generator is on a GPU, which draws its own."""

    step: int
    generator: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: Tensor
    device_rng: Tensor | None = None
