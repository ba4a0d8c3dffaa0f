"""A learning rate for every step, found by gradient descent through the training run.

A small network learns to read handwritten digits in 25 steps of SGD with momentum. The metaparameters are the
logarithms of the 25 learning rates. They start from a constant and descend the loss on validation images; every update
walks back through the whole run. Baselines, each the best of 9 peaks on those same images: a constant rate, and one
that falls along a cosine. The test loss is that on images used for nothing else. Draws learning_rate.png, or the
path given: the three schedules.

Prints:
                 validation loss  test loss
    best constant          0.301      0.252
    best cosine            0.304      0.291
    learned                0.168      0.195
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

import metagrad as mg

NUM_STEPS, NUM_UPDATES = 25, 40

generator = torch.Generator().manual_seed(0)
images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
images = images.float() / 16
train, validation, test = torch.randperm(len(labels), generator=generator).split([800, 500, 497])

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def loss(params: dict[str, Tensor], index: Tensor, meta: Tensor | None = None) -> Tensor:
    return nn.functional.cross_entropy(functional_call(model, params, images[index]), labels[index], reduction="none")


step = mg.TrainStep(loss, lambda meta: mg.optim.sgd(lr=lambda step: meta["log_lr"][step].exp(), momentum=0.9))
batches = [train[torch.randint(len(train), (50,), generator=generator)] for _ in range(NUM_STEPS)]


def losses(log_lr: Tensor) -> tuple[Tensor, Tensor]:
    """Validation and test loss after training with these learning rates."""
    params = mg.train(step, model, batches, {"log_lr": log_lr}, schedule=mg.EveryStep()).params
    return loss(params, validation).mean(), loss(params, test).mean()


peaks = torch.logspace(-1.5, 0.5, 9)
constant = torch.ones(NUM_STEPS)
cosine = (1 + torch.cos(torch.pi * (torch.arange(NUM_STEPS) + 0.5) / NUM_STEPS)) / 2
schedules = {
    name: min(((peak * shape).log() for peak in peaks), key=lambda log_lr: losses(log_lr)[0].item())
    for name, shape in {"best constant": constant, "best cosine": cosine}.items()
}

learned = schedules["best constant"].clone().requires_grad_()
outer = torch.optim.Adam([learned], lr=0.1)
for _ in range(NUM_UPDATES):
    outer.zero_grad()
    losses(learned)[0].backward()  # The run is walked back here.
    outer.step()
schedules["learned"] = learned.detach()

print("             validation loss  test loss")
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
test_loss = {}
for name, log_lr in schedules.items():
    on_validation, test_loss[name] = losses(log_lr)
    print(f"{name:13s} {on_validation:14.3f} {test_loss[name]:10.3f}")
    axes.plot(range(1, NUM_STEPS + 1), log_lr.exp(), label=f"{name}: test loss {test_loss[name]:.2f}")
axes.set(xlabel="training step", ylabel="learning rate", yscale="log", title="Learning rates, one for each step")
axes.legend()
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "learning_rate.png")

assert test_loss["learned"] < 0.85 * min(test_loss["best constant"], test_loss["best cosine"])
