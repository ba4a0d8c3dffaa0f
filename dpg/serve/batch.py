"""A batch of samples on its way to its rewards, as a value."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import NamedTuple


class Refused(Exception):
    """A request that cannot be taken; `kind` is a key of `app.STATUS`, and the message is for the client."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class UnevenGroups(ValueError):
    """A whole batch whose samples do not fill their groups."""


class Key(NamedTuple):
    """Which batch: of a name of its own, or the `number`-th of a stream."""

    name: str
    number: int | None = None

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}#{self.number}"


class Shape(NamedTuple):
    """How many samples a batch has, and how many of each prompt: None for as many as come, the same for all."""

    size: int
    group_size: int | None = None


class Sample(NamedTuple):
    """A text to score. `id` is its own within the batch, `group` that of all texts of its prompt."""

    id: str
    group: str
    text: str

    @property
    def digest(self) -> bytes:
        """What tells a sample that is sent again from another of the same id."""
        return sha256(f"{len(self.group)}:{self.group}{self.text}".encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Batch:
    """Samples that have arrived.

    Args:
        opened: when the first came.
        whole_at: when the last came, None before.
    """

    key: Key
    shape: Shape
    opened: float
    samples: Mapping[str, Sample] = field(default_factory=dict)
    whole_at: float | None = None

    def adding(self, samples: Mapping[str, Sample], now: float) -> "Batch":
        """This batch with more samples, of which there must be room for all."""
        together = {**self.samples, **samples}
        assert len(together) <= self.shape.size
        return replace(self, samples=together, whole_at=now if len(together) == self.shape.size else None)

    @property
    def digests(self) -> dict[str, bytes]:
        """By the sample's id."""
        return {sample.id: sample.digest for sample in self.samples.values()}

    def ordered(self) -> list[Sample]:
        """The samples by group, then by id: the same order, whatever order they came in."""
        return sorted(self.samples.values(), key=lambda sample: (sample.group, sample.id))

    def group_size(self) -> int:
        """How many texts of a prompt stand together.

        Raises:
            UnevenGroups: if they do not fill their groups.
        """
        counts = Counter(sample.group for sample in self.samples.values())
        size = self.shape.group_size or min(counts.values())
        # A prompt that was drawn twice has two groups under one name.
        uneven = {group: n for group, n in counts.items() if (n % size if self.shape.group_size else n != size)}
        if uneven:
            some = ", ".join(f"{group!r} has {n}" for group, n in sorted(uneven.items())[:5])
            wanted = f"whole groups of {size}" if self.shape.group_size else f"groups of one size, as {size}"
            raise UnevenGroups(
                f"the samples of batch {self.key} must come in {wanted}, but {some}. Give each sample the group of its "
                "prompt, and the batch its `group_size`."
            )
        return size

    def missing(self) -> str:
        """What has arrived and what has not, for a person."""
        text = f"{len(self.samples)} of {self.shape.size} samples"
        if self.shape.group_size is None:
            return text
        counts = Counter(sample.group for sample in self.samples.values())
        short = [f"{group!r} has {n}" for group, n in sorted(counts.items()) if n % self.shape.group_size]
        if not short:
            return f"{text}, in {len(counts)} whole groups of {self.shape.group_size}"
        rest = f" and {len(short) - 5} more" if len(short) > 5 else ""
        return f"{text}; of groups of {self.shape.group_size}, {', '.join(short[:5])}{rest}"


class Rewards(NamedTuple):
    """What a batch came to.

    Attributes:
        raw: by the sample's id.
        rescaled: divided by their standard deviation over the batch; None if that is 0.
        phi: Φ of the target trained on the batch, None if the reward trains none.
        reward_std: the standard deviation.
        seconds: that the computation took.
        measures: readable figures of the trained target.
    """

    raw: Mapping[str, float]
    rescaled: Mapping[str, float] | None
    phi: float | None
    reward_std: float
    seconds: float
    measures: Mapping[str, float]


class Failure(NamedTuple):
    """Why a batch has no rewards; `kind` is a key of `app.STATUS`."""

    kind: str
    message: str


class Done(NamedTuple):
    """A finished batch. Its texts are forgotten."""

    key: Key
    shape: Shape
    digests: Mapping[str, bytes]
    waited: float
    at: float
    outcome: Rewards | Failure
