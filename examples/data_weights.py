"""Which training examples hurt? Mislabelled ones, found by the gradient of the held-out loss.

240 points in four classes, 24 of them with a wrong label, train a small network. One metagradient says how the
held-out loss would change if each example counted a little more. The 24 examples that would raise it most are compared
with the 24 wrong ones (a random choice finds 10 % of them), and the network is trained again without them.

Prints:
    mislabelled among the 24 suspects:   92%
    held-out loss, all examples:         0.256
    held-out loss, without the suspects: 0.155
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

import metagrad as mg

NUM_CLASSES, NUM_FEATURES = 4, 8
NUM_TRAIN, NUM_WRONG, NUM_TEST = 240, 24, 400
NUM_EPOCHS, BATCH_SIZE = 6, 40

generator = torch.Generator().manual_seed(0)
centres = 1.5 * torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)


def sample(num_examples: int) -> tuple[Tensor, Tensor]:
    """Points scattered around the centre of their class, and the classes."""
    classes = torch.randint(NUM_CLASSES, (num_examples,), generator=generator)
    return centres[classes] + torch.randn(num_examples, NUM_FEATURES, generator=generator), classes


points, labels = sample(NUM_TRAIN)
test_points, test_labels = sample(NUM_TEST)

# Wrong labels: another class for the first examples. The order of training is shuffled below.
wrong = torch.arange(NUM_TRAIN) < NUM_WRONG
labels[wrong] += torch.randint(1, NUM_CLASSES, (NUM_WRONG,), generator=generator)
labels %= NUM_CLASSES

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(NUM_FEATURES, 32), nn.Tanh(), nn.Linear(32, NUM_CLASSES))


def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    logits = functional_call(model, params, batch["x"])
    return nn.functional.cross_entropy(logits, batch["y"], reduction="none")


def held_out_loss(state: mg.State) -> Tensor:
    return nn.functional.cross_entropy(functional_call(model, state.params, test_points), test_labels)


epochs = [torch.randperm(NUM_TRAIN, generator=generator).split(BATCH_SIZE) for _ in range(NUM_EPOCHS)]
batches = [{"x": points[index], "y": labels[index], "index": index} for epoch in epochs for index in epoch]
step = mg.TrainStep(mg.weighted(loss), mg.optim.adamw(lr=1e-2))

result = mg.metagradient(held_out_loss, step, model, batches, {"weights": torch.ones(NUM_TRAIN)})
harm = result.meta["weights"]  # Above 0: more of this example, more held-out loss.
suspects = harm.argsort(descending=True)[:NUM_WRONG]
precision = wrong[suspects].float().mean().item()

kept = {"weights": torch.ones(NUM_TRAIN).index_fill(0, suspects, 0.0)}
retrained = held_out_loss(mg.train(step, model, batches, kept))

print(f"mislabelled among the {NUM_WRONG} suspects:   {precision:.0%}")
print(f"held-out loss, all examples:         {result.value:.3f}")
print(f"held-out loss, without the suspects: {retrained:.3f}")

assert precision > 0.75
assert retrained < 0.8 * result.value
