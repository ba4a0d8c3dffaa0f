"""The barrier in time: who waits for which batch, and the thread that computes one batch after the other."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import Any

import torch

from dpg.serve.barrier import Barrier, Order
from dpg.serve.batch import Batch, Done, Failure, Key, Refused, Rewards, UnevenGroups
from dpg.serve.limits import Limits
from dpg.serve.wire import described

TICK = 0.1
"""Seconds between two looks at the clock."""


class Service:
    """Answers orders once their batches are whole and computed. Made and used within one event loop.

    Keeps the barrier, who waits, and how many batches ended how.

    Args:
        score: a whole batch; it runs in a thread of its own, one batch at a time.
        limits: sizes and times.
        on_done: called with every batch that has an outcome.
        clock: seconds from any start.
    """

    def __init__(
        self,
        score: Callable[[Batch], Rewards],
        limits: Limits,
        on_done: Callable[[Done], None] = lambda done: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.limits = limits
        self._score, self._on_done, self._clock = score, on_done, clock
        self._barrier = Barrier(limits)
        self._waiting: dict[Key, asyncio.Future[Done]] = {}
        self._counts: Counter[str] = Counter()
        self._computing: Key | None = None
        self._stopping: str | None = None
        self._changed = asyncio.Event()

    async def answer(self, order: Order) -> Done:
        """What the batch of an order came to, once it did. Whoever stops waiting leaves its samples in the batch.

        Raises:
            Refused: if the order cannot be taken.
        """
        if self._stopping is not None:
            raise Refused("stopping", self._stopping)
        key = self._barrier.submit(order, self._clock())
        self._changed.set()
        if (done := self._barrier.outcome(key)) is not None:
            return done
        future = self._waiting.setdefault(key, asyncio.get_running_loop().create_future())
        return await asyncio.shield(future)  # One waiter that is cancelled takes nothing from the others.

    @property
    def computing(self) -> bool:
        """Whether a batch is being computed."""
        return self._computing is not None

    def status(self) -> dict[str, Any]:
        """Open batches, what is being computed, and how many batches ended how."""
        now = self._clock()
        return {
            "open": [described(batch, now) for batch in self._barrier.open],
            "line": [str(key) for key in self._barrier.line],
            "computing": None if self._computing is None else str(self._computing),
            "done": dict(self._counts),
        }

    async def run(self, stopped: Callable[[], bool]) -> None:
        """Compute whole batches and give up late ones until `stopped`, then tell all who wait.

        A computation in progress goes on in its thread, and nobody hears of it.
        """
        # torch counts threads for each thread; one batch must have the same bits here and elsewhere.
        threads = ThreadPoolExecutor(1, "reward", torch.set_num_threads, (torch.get_num_threads(),))
        tasks = set()
        try:
            while not stopped():
                for done in self._barrier.expire(self._clock()):
                    self._tell(done)
                if self._computing is None and (batch := self._barrier.next_whole()) is not None:
                    self._computing = batch.key
                    tasks = {asyncio.create_task(self._compute(batch, threads))}
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), TICK)
                self._changed.clear()
        finally:
            self.stop()
            threads.shutdown(wait=False)
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """Give up every open batch and take no more."""
        self._stopping = "the reward service is stopping."
        for done in self._barrier.close(Failure("stopping", self._stopping), self._clock()):
            self._tell(done)

    async def _compute(self, batch: Batch, threads: ThreadPoolExecutor) -> None:
        try:
            outcome = await asyncio.get_running_loop().run_in_executor(threads, self._score, batch)
        except UnevenGroups as error:
            outcome = Failure("uneven", str(error))
        except Exception as error:  # Whatever it is, all who wait must hear of it, and the next batch has its turn.
            outcome = Failure("failed", f"batch {batch.key} has no rewards: {type(error).__name__}: {error}")
        self._computing = None
        self._changed.set()
        if (done := self._barrier.finish(batch, outcome, self._clock())) is not None:
            self._tell(done)

    def _tell(self, done: Done) -> None:
        self._counts[done.outcome.kind if isinstance(done.outcome, Failure) else "rewarded"] += 1
        if (future := self._waiting.pop(done.key, None)) is not None:
            future.set_result(done)
        self._on_done(done)
