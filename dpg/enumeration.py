"""Is the DPG gradient the policy gradient? Both summed over every data set of a tiny generator: no sampling error.

The generator is a softmax over a few texts, a data set is n independent draws from it, the target a bigram model:

    J(θ) = Σ over data sets D of P(D) Φ(A(D))
    ∇J   = E[Φ(A(D)) Σ_i ∇ log π(x_i)]          the DPG gradient is E[Σ_i r_i ∇ log π(x_i)]     [thrush2026]
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor

import metagrad as mg
from dpg.enumeration_page import Point, write

OPTIMIZERS: dict[str, Callable[[float], mg.optim.GradientTransformation]] = {
    "SGD": lambda lr: mg.optim.sgd(lr=lr),
    "Adam, eps_root 1e-1": lambda lr: mg.optim.adam(lr=lr, eps_root=1e-1),
    "Adam, eps_root 1e-3": lambda lr: mg.optim.adam(lr=lr, eps_root=1e-3),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """A generator and a target in float64.

    Attributes:
        logits: θ, of the texts.
        texts: the tokens of each text that the generator can write.
        held_out: the text whose loss is −Φ.
        start: the target's next-token logits before training.
    """

    logits: Float[Tensor, " kinds"]
    texts: Int[Tensor, "kinds tokens"]
    held_out: Int[Tensor, "one tokens"]
    start: Float[Tensor, "token following"]

    @classmethod
    def random(cls, seed: int = 0, *, kinds: int = 3, vocabulary: int = 5, length: int = 8) -> "Problem":
        """Random texts, policy and target."""
        generator = torch.Generator().manual_seed(seed)
        normal = {"generator": generator, "dtype": torch.float64}
        tokens = torch.randint(vocabulary, (kinds + 1, length), generator=generator)
        start = torch.randn(vocabulary, vocabulary, **normal)
        return cls(0.5 * torch.randn(kinds, **normal), tokens[:-1], tokens[-1:], start)

    def phi(self, logits: Float[Tensor, "targets token following"]) -> Float[Tensor, " targets"]:
        """Minus the loss of each target on the held-out text."""
        tokens = self.held_out.expand(len(logits), -1)
        return -_losses({"logits": logits}, {"tokens": tokens, "target": torch.arange(len(logits))})

    def train(
        self, data_sets: Int[Tensor, "targets texts"], optimizer: mg.optim.GradientTransformation, num_steps: int
    ) -> tuple[Float[Tensor, " targets"], Float[Tensor, "targets texts"]]:
        """Φ after training a target on each data set in `num_steps` batches, and the rewards of its texts.

        All targets are trained in one run, side by side: optimizers that treat every parameter alone do not mix them.
        """
        index = torch.arange(data_sets.numel()).reshape(data_sets.shape)
        batches = [
            {
                "tokens": self.texts[rearrange(chosen, "targets texts -> (targets texts)")],
                "target": torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]),
                "index": rearrange(places, "targets texts -> (targets texts)"),
            }
            for chosen, places in zip(data_sets.chunk(num_steps, 1), index.chunk(num_steps, 1), strict=True)
        ]

        def losses(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Float[Tensor, " texts"]:
            return len(data_sets) * _losses(params, batch)  # The step's mean is over the texts of all targets.

        result = mg.metagradient(
            lambda state: self.phi(state.params["logits"]).sum(),
            mg.TrainStep(mg.weighted(losses), optimizer),
            {"logits": repeat(self.start, "token following -> targets token following", targets=len(data_sets))},
            batches,
            {"weights": torch.ones(data_sets.numel(), dtype=torch.float64)},
        )
        return self.phi(result.state.params["logits"]), result.meta["weights"].reshape(data_sets.shape)


class Gradients(NamedTuple):
    """J and both gradients by θ."""

    objective: float
    true: Float[Tensor, " kinds"]
    dpg: Float[Tensor, " kinds"]


def gradients(
    problem: Problem, optimizer: mg.optim.GradientTransformation, num_texts: int, num_steps: int = 1
) -> Gradients:
    """Both gradients, exactly, for data sets of `num_texts` draws in `num_steps` batches of one size.

    Raises:
        ValueError: if the texts do not fill the batches.

    Cost: one metagradient, of a target for each combination of one multiset of texts per batch.
    """
    if num_steps < 1 or num_texts < 1 or num_texts % num_steps:
        raise ValueError(f"{num_texts} texts do not make {num_steps} batches of one size.")
    policy = problem.logits.softmax(0)
    multisets = list(combinations_with_replacement(range(len(policy)), num_texts // num_steps))
    combined = list(product(multisets, repeat=num_steps))
    data_sets = torch.tensor([[text for batch in batches for text in batch] for batches in combined])
    orders = torch.tensor([math.prod(map(_orders, batches)) for batches in combined], dtype=torch.float64)
    probabilities = orders * policy[data_sets].prod(1)
    phi, rewards = problem.train(data_sets, optimizer, num_steps)
    # Φ less its value before training: a constant, which changes no gradient, but spares it rounding.
    gains = phi - problem.phi(problem.start[None])
    scores = torch.eye(len(policy), dtype=torch.float64)[data_sets] - policy  # ∇ log π(x_i)
    return Gradients(
        objective=float(probabilities @ phi),
        true=torch.einsum("s,s,stk->k", probabilities, gains, scores),
        dpg=torch.einsum("s,st,stk->k", probabilities, rewards, scores),
    )


def compared(found: Gradients) -> tuple[float, float, float]:
    """Cosine, norm ratio and relative error.

    Raises:
        ValueError: if one gradient is exactly 0.
    """
    size, dpg = float(found.true.norm()), float(found.dpg.norm())
    if size == 0 or dpg == 0:
        raise ValueError("a gradient is 0: J does not depend on the policy, so there is nothing to compare.")
    return float(found.true @ found.dpg) / (size * dpg), dpg / size, float((found.dpg - found.true).norm()) / size


def enumeration(
    path: Path,
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16),
    lrs: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
    seed: int = 0,
) -> list[Point]:
    """Both gradients for all optimizers, one or two steps, `lrs` and `sizes`; writes `enumeration.json`, `.md`, `.png`.

    Sizes that two batches cannot share are left out for two steps.

    Raises:
        ValueError: as `gradients` and `compared` do.
    """
    path.mkdir(parents=True, exist_ok=True)
    problem = Problem.random(seed)
    kinds = [(name, steps, lr, n) for name in OPTIMIZERS for steps in (1, 2) for lr in lrs for n in sizes]
    wanted = [kind for kind in kinds if kind[3] % kind[1] == 0]
    points = [
        Point(name, steps, lr, n, *compared(gradients(problem, OPTIMIZERS[name](lr), n, steps)))
        for name, steps, lr, n in track(wanted, "enumeration")
    ]
    write(path, points)
    return points


def _losses(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Float[Tensor, " texts"]:
    """The mean loss of each text's tokens from the second on, given the one before, by its own target."""
    log_probs, tokens = params["logits"].log_softmax(-1), batch["tokens"]
    return -log_probs[batch["target"][:, None], tokens[:, :-1], tokens[:, 1:]].mean(1)


def _orders(batch: tuple[int, ...]) -> int:
    """How many sequences of draws make this multiset."""
    return math.factorial(len(batch)) // math.prod(map(math.factorial, Counter(batch).values()))
