"""Tune the learning rate and the momentum of a run by gradient descent through the run.

Thirty steps of SGD with momentum on an ill-conditioned least-squares problem. For quadratics there is a textbook
answer, which is the best for very many steps: lr = (2 / (√L + √μ))², momentum = ((√L − √μ) / (√L + √μ))², with L and μ
the largest and the smallest curvature. For thirty steps on these data, descent on the final loss finds better ones.

Prints:
                   lr  momentum  loss after 30 steps
    first guess  0.10      0.50  2.7e-02
    textbook     3.23      0.67  4.5e-04
    tuned        2.47      0.67  9.4e-07
"""

import torch
from torch import Tensor

import metagrad as mg

NUM_STEPS, NUM_UPDATES, NUM_FEATURES = 30, 60, 10
Meta = dict[str, Tensor]

torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(200, NUM_FEATURES, generator=generator) * torch.logspace(0, -1, NUM_FEATURES)
targets = inputs @ torch.randn(NUM_FEATURES, generator=generator)


def loss(params: dict[str, Tensor], batch: None, meta: Meta) -> Tensor:
    return 0.5 * (inputs @ params["w"] - targets).square()


# The logarithm and the logit keep lr above 0 and momentum between 0 and 1 without any constraint.
def settings(lr: Tensor, momentum: Tensor) -> Meta:
    return {"log_lr": lr.log(), "logit_momentum": momentum.logit()}


def optimizer(meta: Meta) -> mg.optim.GradientTransformation:
    return mg.optim.sgd(lr=meta["log_lr"].exp(), momentum=meta["logit_momentum"].sigmoid())


step = mg.TrainStep(loss, optimizer)


def final_loss(meta: Meta) -> Tensor:
    """The loss after training: a differentiable function of the settings."""
    batches = [None] * NUM_STEPS  # Every step sees all the data.
    state = mg.train(step, {"w": torch.zeros(NUM_FEATURES)}, batches, meta)
    return loss(state.params, None, meta).mean()


def report(name: str, meta: Meta) -> float:
    lr, momentum, value = meta["log_lr"].exp(), meta["logit_momentum"].sigmoid(), final_loss(meta)
    print(f"{name:11s} {lr:5.2f} {momentum:9.2f}  {value:.1e}")
    return value.item()


curvatures = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
small, large = curvatures[0].sqrt(), curvatures[-1].sqrt()
guess = settings(0.1 / large**2, torch.tensor(0.5))

print("               lr  momentum  loss after 30 steps")
first = report("first guess", guess)
textbook = report("textbook", settings((2 / (large + small)) ** 2, ((large - small) / (large + small)) ** 2))

meta = {name: value.requires_grad_() for name, value in guess.items()}
outer = torch.optim.Adam(meta.values(), lr=0.1)
for _ in range(NUM_UPDATES):
    outer.zero_grad()
    final_loss(meta).log().backward()  # The replay runs here.
    outer.step()
tuned = report("tuned", meta)

assert tuned < 0.1 * textbook < first
