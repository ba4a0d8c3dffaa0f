"""What the reward service takes at most: sizes, numbers and times."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Limits:
    """Bounds of one service; whoever goes beyond one is told so.

    Args:
        body_bytes: of one request. More is refused without being read.
        text_length: characters of one text.
        name_length: characters of a batch's name, of a group and of a sample's id.
        batch_size: samples of one batch.
        open_batches: batches that fill, wait in line or are being computed, all together.
        connections: at once. Every sample that waits holds one, unless its client sent several in one request.
        fill_seconds: from a batch's first sample to its last.
        compute_seconds: from a batch's last sample to its rewards, the wait for other batches included.
        kept_batches, kept_seconds: how many finished batches, and for how long, are remembered for samples that are
            sent again.

    Raises:
        ValueError: for a bound that is not above 0.
    """

    body_bytes: int = 1_048_576
    text_length: int = 65_536
    name_length: int = 256
    batch_size: int = 2048
    open_batches: int = 8
    connections: int = 4096
    fill_seconds: float = 600.0
    compute_seconds: float = 1800.0
    kept_batches: int = 64
    kept_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"the limit {field.name} is {getattr(self, field.name)}. Pass a number above 0.")

    def changed(self, assignments: Iterable[str]) -> "Limits":
        """These limits with those changed that `key=value` arguments name.

        Raises:
            ValueError: for an unknown key, or a value that is no number.
        """
        kinds = {field.name: field.type for field in fields(self)}
        changes = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or key not in kinds:
                raise ValueError(f"--limit {assignment}: expected key=value with a key of {', '.join(kinds)}.")
            try:
                changes[key] = int(text) if kinds[key] is int else float(text)
            except ValueError:
                wanted = "a whole number" if kinds[key] is int else "a number"
                raise ValueError(f"--limit {assignment}: expected {wanted}.") from None
        return replace(self, **changes)
