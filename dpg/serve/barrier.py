"""Which sample belongs to which batch, and when a batch is whole, late or done. No clock, no network, no tensor."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dpg.serve.batch import Batch, Done, Failure, Key, Refused, Rewards, Sample, Shape
from dpg.serve.limits import Limits


class Order(NamedTuple):
    """What one request asks for.

    Attributes:
        name: of a batch, or of a stream: there the next samples to arrive make a batch, as many as its shape says.
        stream: whether it is one.
        samples: by id; a stream takes one at a time.
    """

    name: str
    stream: bool
    shape: Shape
    samples: dict[str, Sample]


class Barrier:
    """Holds samples back until their batch is whole. Every method that needs the time is given it.

    Keeps the open batches, the line of whole ones, and what the last finished ones came to, within `limits`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[Key, Batch] = {}
        self._line: list[Key] = []
        self._done: dict[Key, Done] = {}
        self._next: dict[str, int] = {}

    @property
    def open(self) -> list[Batch]:
        """Batches without an outcome, oldest first."""
        return list(self._open.values())

    @property
    def line(self) -> list[Key]:
        """Whole batches whose computation has not begun."""
        return list(self._line)

    def submit(self, order: Order, now: float) -> Key:
        """Take an order's samples into their batch; those that are in it already are counted once.

        Raises:
            Refused: for a sample that another of the same id contradicts, a batch of another shape, one that is over or
                full, and too many batches.
        """
        key = self._key(order)
        if (done := self._done.get(key)) is not None:
            self._refuse_strangers(order, done)
            return key
        batch = self._open.get(key) or Batch(key, order.shape, now)
        if batch.shape != order.shape:
            raise Refused("conflict", f"batch {key} has {batch.shape}, but this request says {order.shape}.")
        known = {id: sample for id, sample in order.samples.items() if id in batch.samples}
        for id, sample in known.items():
            _refuse_another(key, sample, batch.samples[id].digest)
        new = {id: sample for id, sample in order.samples.items() if id not in known}
        if len(batch.samples) + len(new) > batch.shape.size:
            raise Refused(
                "conflict",
                f"batch {key} has {len(batch.samples)} of its {batch.shape.size} samples, and {len(new)} more came: "
                f"{_some(new)}. Give every batch a name of its own, and a sample that is sent again its id.",
            )
        if key not in self._open and len(self._open) >= self._limits.open_batches:
            raise Refused(
                "busy", f"{len(self._open)} batches are open, as many as the limit open_batches lets. Try again later."
            )
        if new:
            self._open[key] = batch = batch.adding(new, now)
            if batch.whole_at is not None:
                self._line.append(key)
        if order.stream:
            self._next[key.name] = max(key.number, self._next.get(key.name, 0))
        return key

    def next_whole(self) -> Batch | None:
        """The batch that was whole first, out of the line, or None."""
        return self._open[self._line.pop(0)] if self._line else None

    def finish(self, batch: Batch, outcome: Rewards | Failure, now: float) -> Done | None:
        """Note what a batch came to; None if it had an outcome already, which stays."""
        key = batch.key
        if self._open.get(key) is not batch:  # Given up; what is open under its name by now is another.
            return None
        del self._open[key]
        if key in self._line:
            self._line.remove(key)
        waited = (now if batch.whole_at is None else batch.whole_at) - batch.opened
        done = Done(key, batch.shape, batch.digests, waited, now, outcome)
        self._done[key] = done
        return done

    def expire(self, now: float) -> list[Done]:
        """Give up batches that are late, and forget finished ones that were kept long enough; those given up."""
        late = [self.finish(batch, failure, now) for batch, failure in self._late(now)]
        kept = [key for key, done in self._done.items() if now - done.at <= self._limits.kept_seconds]
        kept = kept[-self._limits.kept_batches :]
        self._done = {key: self._done[key] for key in kept}
        names = {key.name for key in [*self._open, *self._done]}
        self._next = {name: number for name, number in self._next.items() if name in names}
        return late

    def close(self, failure: Failure, now: float) -> list[Done]:
        """Give up every open batch."""
        return [self.finish(batch, failure, now) for batch in self.open]

    def outcome(self, key: Key) -> Done | None:
        """What a batch came to, or None if it is open."""
        return self._done.get(key)

    def _key(self, order: Order) -> Key:
        if not order.stream:
            return Key(order.name)
        (id,) = order.samples
        for key in [*self._open, *self._done]:
            if key.name == order.name and key.number is not None and id in self._ids(key):
                return key
        number = self._next.get(order.name, 0)
        newest = self._open.get(Key(order.name, number))
        if Key(order.name, number) in self._done or (newest is not None and newest.whole_at is not None):
            number += 1
        return Key(order.name, number)

    def _ids(self, key: Key) -> Mapping[str, object]:
        return self._open[key].samples if key in self._open else self._done[key].digests

    def _late(self, now: float) -> Iterator[tuple[Batch, Failure]]:
        for batch in self.open:
            fill, compute = self._limits.fill_seconds, self._limits.compute_seconds
            if batch.whole_at is None and now - batch.opened > fill:
                text = f"batch {batch.key} was given up after {fill:g} s: {batch.missing()}. No part of it is scored."
                yield batch, Failure("incomplete", text)
            elif batch.whole_at is not None and now - batch.whole_at > compute:
                line = " in line behind others" if batch.key in self._line else ""
                text = f"batch {batch.key} was given up: it has been whole for {compute:g} s{line} without rewards."
                yield batch, Failure("overdue", text)

    def _refuse_strangers(self, order: Order, done: Done) -> None:
        if order.shape != done.shape:
            raise Refused("conflict", f"batch {done.key} had {done.shape}, but this request says {order.shape}.")
        for sample in order.samples.values():
            if sample.id in done.digests:
                _refuse_another(done.key, sample, done.digests[sample.id])
        if strangers := [id for id in order.samples if id not in done.digests]:
            why = f" ({done.outcome.message})" if isinstance(done.outcome, Failure) else ""
            raise Refused("over", f"batch {done.key} is over{why} and these were not in it: {_some(strangers)}.")


def _refuse_another(key: Key, sample: Sample, digest: bytes) -> None:
    if sample.digest != digest:
        raise Refused("conflict", f"batch {key} has a sample {sample.id!r} already, with another text or group.")


def _some(ids: Iterable[str]) -> str:
    names = sorted(ids)
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
