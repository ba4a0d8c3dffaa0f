"""Learn a training set of five points that teaches as much as 500: dataset distillation.

Noisy points in five classes, a small network, ten steps of SGD from a fixed initialisation. The five training points,
their soft labels and the learning rate are the metaparameters. They start as one real point of each class and descend
the loss that the network trained on them has on the 500 real points.

Prints:
    test accuracy after 10 steps on
        5 real points:    55.0% (best of 4 learning rates)
        500 real points:  87.3% (best of 4 learning rates)
        5 learned points: 87.2%
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

import metagrad as mg

NUM_CLASSES, NUM_FEATURES, NUM_STEPS, NUM_UPDATES = 5, 10, 10, 100
Meta = dict[str, Tensor]

generator = torch.Generator().manual_seed(0)
centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)


def sample(num_points: int) -> tuple[Tensor, Tensor]:
    """Points scattered around the centre of their class, and the classes, which take turns."""
    classes = torch.arange(num_points) % NUM_CLASSES
    return centres[classes] + torch.randn(num_points, NUM_FEATURES, generator=generator), classes


real_points, real_labels = sample(500)
test_points, test_labels = sample(2000)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(NUM_FEATURES, 32), nn.Tanh(), nn.Linear(32, NUM_CLASSES))


def loss(params: dict[str, Tensor], batch: None, meta: Meta) -> Tensor:
    """All that is trained on is in `meta`; the batches are empty."""
    logits = functional_call(model, params, meta["points"])
    return nn.functional.cross_entropy(logits, meta["soft_labels"].softmax(dim=1), reduction="none")


step = mg.TrainStep(loss, lambda meta: mg.optim.sgd(lr=meta["log_lr"].exp()))


def first_real(num_points: int, lr: float) -> Meta:
    """Real points as metaparameters; a logit of 6 makes a label 99 % sure."""
    soft_labels = 6.0 * nn.functional.one_hot(real_labels[:num_points], NUM_CLASSES)
    return {"points": real_points[:num_points], "soft_labels": soft_labels, "log_lr": torch.tensor(lr).log()}


def logits_after_training(meta: Meta, points: Tensor) -> Tensor:
    state = mg.train(step, model, [None] * NUM_STEPS, meta, schedule=mg.EveryStep())
    return functional_call(model, state.params, points)


def test_accuracy(meta: Meta) -> float:
    return (logits_after_training(meta, test_points).argmax(dim=1) == test_labels).float().mean().item()


rates = [0.1, 0.3, 1.0, 3.0]
few, many = (max(test_accuracy(first_real(num_points, lr)) for lr in rates) for num_points in (NUM_CLASSES, 500))
print(f"test accuracy after {NUM_STEPS} steps on")
print(f"    5 real points:    {few:.1%} (best of {len(rates)} learning rates)")
print(f"    500 real points:  {many:.1%} (best of {len(rates)} learning rates)")

learned = {name: value.requires_grad_() for name, value in first_real(NUM_CLASSES, lr=1.0).items()}
outer = torch.optim.Adam(learned.values(), lr=0.05)
for _ in range(NUM_UPDATES):
    outer.zero_grad()
    nn.functional.cross_entropy(logits_after_training(learned, real_points), real_labels).backward()
    outer.step()
distilled = test_accuracy(learned)
print(f"    5 learned points: {distilled:.1%}")

assert distilled > few + 0.2
assert distilled > many - 0.02  # As much as 500, to within two points.
