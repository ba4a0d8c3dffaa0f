"""How well do exact scores predict retraining? LDS on handwritten digits, for runs from smooth to rough.

A network with one hidden layer of 64 learns 1,400 of the 1,797 8×8 digits of scikit-learn. The queries are the losses
of 30 single test images. For each row, 100 random subsets of 1 % and of 5 % are left out, and the network is trained
again without each.

    python benchmarks/lds_digits.py [--out PICTURES] [--processes 2] [--quick]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import metagrad as mg
from metagrad import attribution

NUM_TRAIN, NUM_QUERIES, HIDDEN, BATCH_SIZE = 1400, 30, 64, 100


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    optimizer: str
    lr: float
    eps_root: float | None = None
    activation: Callable[[Tensor], Tensor] = torch.tanh
    epochs: int = 5
    batch_size: int = BATCH_SIZE
    dtype: torch.dtype = torch.float64

    def build(self) -> mg.optim.GradientTransformation:
        if self.optimizer == "momentum":
            return mg.optim.sgd(self.lr, momentum=0.9)
        return mg.optim.adam(self.lr, eps_root=self.eps_root)


SETTINGS = [
    Setting("momentum", 0.05),
    Setting("momentum", 0.05, dtype=torch.float32),
    Setting("momentum", 0.1),
    Setting("momentum", 0.1, activation=torch.relu),
    Setting("momentum", 0.1, epochs=40),
    Setting("momentum", 0.1, batch_size=20),
    Setting("momentum", 0.5),
    Setting("momentum", 0.5, activation=torch.relu),
    Setting("adam", 0.01, 1e-4),
    Setting("adam", 0.01, 1e-4, dtype=torch.float32),
    Setting("adam", 0.01, 1e-6),
    Setting("adam", 0.01, 1e-8),
    Setting("adam", 0.01, 1e-8, activation=torch.relu),
    Setting("adam", 0.001, 1e-8),
]


def arguments_of(setting: Setting):
    """The queries, the step, the initial parameters, the batches, and the test accuracy as a function."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=setting.dtype), torch.tensor(digits.target)
    images = images - images.mean(0)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(setting.dtype)  # noqa: E731  # a shorthand
    params = {
        "hidden": normal(64, HIDDEN) / 64**0.5,
        "bias": torch.zeros(HIDDEN, dtype=setting.dtype),
        "out": normal(HIDDEN, 10) / HIDDEN**0.5,
        "offset": torch.zeros(10, dtype=setting.dtype),
    }

    def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return setting.activation(x @ params["hidden"] + params["bias"]) @ params["out"] + params["offset"]

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(logits(params, batch["x"]), batch["y"], reduction="none")

    def query(index: Tensor) -> Callable[[mg.State], Tensor]:
        return lambda state: cross_entropy(logits(state.params, images[index][None]), labels[index][None])

    batches = [
        {"x": images[train[i]], "y": labels[train[i]], "index": i}
        for _ in range(setting.epochs)
        for i in torch.randperm(NUM_TRAIN, generator=generator).split(setting.batch_size)
    ]
    step = mg.TrainStep(mg.weighted(loss), setting.build())
    accuracy = lambda state: (logits(state.params, images[test]).argmax(1) == labels[test]).double().mean()  # noqa: E731
    return [query(i) for i in test[:NUM_QUERIES]], (step, params, batches), accuracy


def row(setting: Setting, num_subsets: int, processes: int, out: Path | None) -> str:
    queries, run, accuracy = arguments_of(setting)
    begin = perf_counter()
    scores = attribution.scores(queries, *run, NUM_TRAIN, schedule=mg.EveryStep())
    seconds = perf_counter() - begin
    trained = mg.train(*run, {"weights": torch.ones(NUM_TRAIN, dtype=setting.dtype)})
    cells = []
    for fraction in (0.01, 0.05):
        found = attribution.linear_datamodeling_score(
            scores, queries, *run, fraction=fraction, num_subsets=num_subsets, processes=processes
        )
        cells.append(f"{found.mean:.3f} ({found.interval[0]:.3f} to {found.interval[1]:.3f})")
        if out is not None:
            found.plot(out / f"{SETTINGS.index(setting):02d}_{setting.optimizer}_{fraction}.png")
    eps_root = "–" if setting.eps_root is None else f"{setting.eps_root:.0e}"
    return (
        f"| {setting.optimizer} | {setting.lr} | {eps_root} | {setting.activation.__name__} | {len(run[2])} | "
        f"{setting.batch_size} | {str(setting.dtype).removeprefix('torch.')} | {float(accuracy(trained)):.1%} | "
        f"{cells[0]} | {cells[1]} | {seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="20 subsets instead of 100")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    print(
        "| optimizer | lr | eps_root | activation | steps | batch | precision | accuracy "
        "| LDS, 1 % left out | LDS, 5 % | scores, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        print(row(setting, 20 if options.quick else 100, options.processes, options.out), flush=True)


if __name__ == "__main__":
    main()
