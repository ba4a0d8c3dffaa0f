"""What a metagradient costs: the cost model of docs/memory.md beside a clock and the bytes that were counted.

    OMP_NUM_THREADS=1 python benchmarks/cost.py

Times are ratios to plain training (`torch.optim.Adam`, the same model, batches and number of steps) in the same
process, one after the other, medians of five pairs. The last table is the peak of a process of its own.
"""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metagrad as mg
from metagrad._transformation import Given, Made
from metagrad._tree import differentiable, independent, not_finite, with_floating_leaves
from metagrad._witness import digests

REPEATS = 5
LR, EPS_ROOT = 1e-3, 1e-8


class Transformer(nn.Module):
    """A causal language model of two blocks."""

    def __init__(self, vocabulary: int = 256, width: int = 128, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.head, self.heads = nn.Linear(width, vocabulary), heads

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place[: ids.shape[1]]
        for block in range(2):
            qkv = self.qkv[block](self.norms[2 * block](x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
            q, k, v = qkv.transpose(2, 3)
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out[block](attended.transpose(1, 2).flatten(2))
            x = x + self.down[block](nn.functional.gelu(self.up[block](self.norms[2 * block + 1](x))))
        return self.head(x)


class Task(NamedTuple):
    """A model, its loss for each example, and one batch."""

    model: nn.Module
    losses: Callable[[dict[str, Tensor], Any], Tensor]
    batch: dict[str, Tensor]


def transformer(batch_size: int = 8) -> Task:
    torch.manual_seed(0)
    model = Transformer()

    def losses(params: dict[str, Tensor], batch: Any) -> Tensor:
        logits = functional_call(model, params, batch["x"])
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch["y"], reduction="none").mean(1)

    ids = torch.randint(256, (batch_size, 65))
    return Task(model, losses, {"x": ids[:, :-1], "y": ids[:, 1:], "index": torch.arange(batch_size)})


def mlp(batch_size: int = 256) -> Task:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)]
    model = nn.Sequential(*layers)

    def losses(params: dict[str, Tensor], batch: Any) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, batch["x"]), batch["y"], reduction="none")

    x, y = torch.randn(batch_size, 256), torch.randint(10, (batch_size,))
    return Task(model, losses, {"x": x, "y": y, "index": torch.arange(batch_size)})


class Case(NamedTuple):
    """One row: steps, schedule, metrics, and micro-batches in a batch."""

    num_steps: int
    schedule: mg.Schedule
    num_metrics: int = 1
    num_pieces: int = 1


CASES = [
    Case(20, mg.EveryStep()),
    Case(20, mg.Binomial(5)),
    Case(20, mg.Binomial(2)),
    Case(100, mg.Binomial(10)),
    Case(20, mg.EveryStep(), num_metrics=4),
    Case(20, mg.EveryStep(), num_pieces=4),
    Case(20, mg.Binomial(5), num_pieces=4),
]


def train_plainly(task: Task, case: Case) -> None:
    """The same steps by torch's own optimizer, gradients accumulated over the micro-batches."""
    params = {name: value.detach().clone().requires_grad_() for name, value in task.model.named_parameters()}
    optimizer = torch.optim.Adam(params.values(), lr=LR)
    size = len(task.batch["index"]) // case.num_pieces
    for _ in range(case.num_steps):
        optimizer.zero_grad()
        for start in range(0, size * case.num_pieces, size):
            piece = {name: value[start : start + size] for name, value in task.batch.items()}
            (task.losses(params, piece).sum() / len(task.batch["index"])).backward()
        optimizer.step()


def step_of(task: Task, case: Case) -> mg.TrainStep:
    size = None if case.num_pieces == 1 else len(task.batch["index"]) // case.num_pieces
    return mg.TrainStep(mg.weighted(task.losses), mg.optim.adam(LR, eps_root=EPS_ROOT), microbatch_size=size)


def differentiate(task: Task, case: Case) -> mg.Result:
    metrics = [lambda state: task.losses(state.params, task.batch).mean()] * case.num_metrics
    meta = {"weights": torch.ones(len(task.batch["index"]))}
    return mg.metagradient(
        metrics, step_of(task, case), task.model, [task.batch] * case.num_steps, meta, schedule=case.schedule
    )


def model_cost(case: Case) -> float:
    """Forward passes of the metagradient over those of training, after section 6 of docs/theory.md."""
    plan = case.schedule.plan(case.num_steps)
    actions = plan.reverse
    # With micro-batches the gradient is computed again, but where it was kept: for a state just loaded.
    again = 0
    for before, action in zip([None, *actions], actions, strict=False):
        from_store = type(before).__name__ == "Load"
        if case.num_pieces > 1 and type(action).__name__ == "Reverse":
            again += 0 if from_store else 3
    steps = 3 * (plan.cost.forward + plan.cost.replayed)
    reversals = (3 + 6 * case.num_metrics) * (case.num_steps - 1) + again
    # Step 0, for the weights alone: through the gradient's graph, or by forward mode beside the kept gradient.
    first = 3 + 2 * case.num_metrics if case.num_pieces == 1 else 3 * case.num_metrics
    metrics = 3 * case.num_metrics + 1  # The value of each distinct one on the initial state, too.
    return (steps + reversals + first - 3 + metrics) / (3 * case.num_steps)


def seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def table_of_runs(name: str, task: Task) -> None:
    print(f"\n{name}: {sum(p.numel() for p in task.model.parameters()):,} parameters")
    print("  T  schedule           K  pieces   model  measured   kept states")
    for case in CASES:
        differentiate(task, case._replace(num_steps=2))
        ratios, kept = [], 0
        for _ in range(REPEATS):
            plain = seconds(partial(train_plainly, task, case))
            result = differentiate(task, case)
            ratios.append(result.stats.seconds / plain)
            kept = result.stats.ram_bytes
        label, ratio = f"{case.schedule}", median(ratios)
        row = f"{case.num_steps:3d}  {label:17s} {case.num_metrics:2d} {case.num_pieces:7d}"
        print(f"{row} {model_cost(case):7.1f} {ratio:9.1f} {kept / 1e6:10.1f} MB", flush=True)


def table_of_parts(name: str, task: Task) -> None:
    """One step's parts, in milliseconds: medians of 21."""
    case = CASES[0]
    step, meta = step_of(task, case), {"weights": torch.ones(len(task.batch["index"]))}
    state = step.init(task.model, meta)
    params = {name: value.requires_grad_() for name, value in state.params.items()}
    optimizer = mg.optim.adam(LR, eps_root=EPS_ROOT)
    given = Given({name: torch.ones_like(value) for name, value in params.items()}, state.optimizer, params)
    cotangent = [torch.ones_like(value) for value in [*params.values()] * 3]

    def update() -> Made:
        with torch.no_grad():
            return optimizer.apply(*given)

    def way_back() -> None:
        end = with_floating_leaves(Made(params, state.optimizer), independent(cotangent))
        optimizer.pull(given, end, [], True)

    def differentiate_loss() -> None:
        torch.autograd.grad(task.losses(params, task.batch).mean(), list(params.values()))

    def with_math_attention() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            differentiate_loss()

    parts: dict[str, Callable[[], object]] = {
        "plain step, torch.optim": lambda: train_plainly(task, case._replace(num_steps=10)),
        "its gradient": differentiate_loss,
        "that with math attention": with_math_attention,
        "step": lambda: torch.no_grad()(step.advance)(state, task.batch, meta),
        "  its update": update,
        "reversal": lambda: step.vjp(state, task.batch, meta, wrt_state=True)[1](independent([cotangent])),
        "  the way back through it": way_back,
        "is all of it finite?": lambda: not_finite("state", differentiable(state), cotangent),
        "digest of a state": lambda: digests(state),
    }
    times: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(21):
        # Turn by turn, so that other work on the machine meets all of them alike.
        for part, function in parts.items():
            times[part].append(1e3 * seconds(function) / (10 if part.startswith("plain") else 1))
    print(f"\n{name}: milliseconds")
    for part, taken in times.items():
        print(f"  {part:25s} {median(taken):7.1f}", flush=True)


def peak(kind: str, num_pieces: int = 1) -> float:
    """Megabytes by which two steps raise the peak of this process; called in one of its own."""
    task, case = transformer(64), Case(2, mg.EveryStep(), num_pieces=num_pieces)
    # What torch sets up once: one step on a single sequence.
    one = task._replace(batch={name: value[:num_pieces] for name, value in task.batch.items()})
    {"plain training": train_plainly, "metagradient": differentiate}[kind](one, case)
    before = peak_of_this_process()
    {"plain training": train_plainly, "metagradient": differentiate}[kind](task, case)
    return peak_of_this_process() - before


def peak_of_this_process() -> float:
    # Not resource.getrusage: its peak is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    tasks = {"transformer": transformer(), "mlp": mlp()}
    for name, task in tasks.items():
        table_of_parts(name, task)
    for name, task in tasks.items():
        table_of_runs(name, task)
    print("\npeak of a process, transformer, 64 sequences, two steps: MB above the start")
    for kind, num_pieces in itertools.product(["plain training", "metagradient"], [1, 4]):
        # A process each: a peak does not come down again.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            megabytes = process.submit(peak, kind, num_pieces).result()
        print(f"  {kind}, {num_pieces} pieces: {megabytes:.0f}", flush=True)


if __name__ == "__main__":
    main()
