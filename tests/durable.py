"""Runs in processes of their own, forked from one that has imported torch, to be killed, measured and kept out."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor

import metagrad as mg
from metagrad import _resume

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

NUM_EXAMPLES, BATCH_SIZE, WIDTH = 6, 4, 5


def forked(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A started process that calls `function`: forked from a server, since importing torch takes seconds."""
    process = _server().Process(target=function, args=arguments)
    process.start()
    return process


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "durable_warm"])
    with pytest.MonkeyPatch.context() as patch:
        # The server is told of no path (Python 3.11), and would leave the imports to every process.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


class Setup(NamedTuple):
    """A schedule, and everything that may be asked of a run besides."""

    schedule: mg.Schedule
    microbatch_size: int | None = None
    several: bool = False
    wrt_params: bool = False


SETUPS = {
    "binomial": Setup(mg.Binomial(3), wrt_params=True),
    "every step": Setup(mg.EveryStep(), microbatch_size=3),
    "tree": Setup(mg.Tree(3), several=True),
    "hierarchical": Setup(mg.Hierarchical(2, 4, 0.5, 0.5), microbatch_size=2, several=True, wrt_params=True),
}


def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """A perceptron with dropout, so that the random numbers must be carried over too."""
    hidden = torch.nn.functional.dropout(torch.tanh(batch["x"] @ params["a"]), 0.1)
    return (hidden @ params["b"] - batch["y"]).square()


def norm(state: mg.State) -> Tensor:
    return sum(p.square().sum() for p in state.params.values()) + state.params["a"][0, 0] ** 3


def corner(state: mg.State) -> Tensor:
    return state.params["b"][0] ** 2


def call(
    setup: Setup,
    num_steps: int,
    loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor] = loss,
    lr: float = 0.02,
    ranks: mg.distributed.Ranks | None = None,
    **options: Any,
) -> mg.Result:
    """The metagradient of one small problem, hierarchical schedules on the disk of `options`."""
    draw = torch.Generator().manual_seed(3)
    params = {"a": torch.randn(3, WIDTH, generator=draw), "b": torch.randn(WIDTH, generator=draw)}
    x, y = torch.randn(NUM_EXAMPLES, 3, generator=draw), torch.randn(NUM_EXAMPLES, generator=draw)
    chosen = [torch.randperm(NUM_EXAMPLES, generator=draw)[:BATCH_SIZE] for _ in range(num_steps)]
    batches = [{"index": index, "x": x[index], "y": y[index]} for index in chosen]
    arguments = {
        "metric": [norm, mg.Trajectory({num_steps // 2: norm, num_steps: corner})] if setup.several else norm,
        "step": mg.TrainStep(mg.weighted(loss), mg.optim.adamw(lr=lr), setup.microbatch_size, ranks=ranks),
        "params": params,
        "batches": batches if ranks is None else ranks.part(batches),
        "meta": {"weights": torch.ones(NUM_EXAMPLES)},
        "schedule": setup.schedule,
        "wrt_params": setup.wrt_params,
    }
    return mg.metagradient(**{**arguments, **options})


def tensors(result: mg.Result) -> list[Tensor]:
    """Φ, every gradient, and the whole trained state."""
    gradients = [result.value, result.meta["weights"], *(result.params or {}).values()]
    state = result.state
    trained = [torch.as_tensor(leaf) for leaf in optree.tree_leaves((state.step, state.rng, state.optimizer))]
    return [*gradients, *state.params.values(), *trained]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Death(NamedTuple):
    """When a process kills itself: at the n-th evaluation of the loss, or before the n-th operation on files.

    Attributes:
        at: "evaluation", or one of Python's audit events "open", "os.rename" and "os.remove".
        count: which one.
        name: how the name of the file starts.
    """

    at: str
    count: int
    name: str = ""


def mortal_run(
    setup: Setup, num_steps: int, folder: Path, results: Path, death: Death | None, pause: float | None = None
) -> None:
    """The run of `setup` in `folder`, its tensors saved to `results`; unless death comes before.

    Args:
        pause: instead of the library's own between two bookmarks; 0 for one at every step.
    """
    if pause is not None:
        _resume.PAUSE = pause
    left = death.count if death is not None else -1

    def count_down() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if death is not None and event == death.at and isinstance(arguments[0], str | Path):
            path = Path(arguments[0])
            if path.parent == folder and path.name.startswith(death.name):
                count_down()

    def counted(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        if death is not None and death.at == "evaluation":
            count_down()
        return loss(params, batch)

    sys.addaudithook(watch)
    result = call(setup, num_steps, counted, resume=folder)
    torch.save(tensors(result), results)
