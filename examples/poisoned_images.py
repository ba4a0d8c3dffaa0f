"""Which training images made the network get this one wrong? Planted ones, found by one metagradient.

Ten of 1,000 handwritten digits are poisoned: three corner pixels are lit, and the label says 0 whatever the image
shows. A network trained on them reads digits well, but reads many as 0 when these corners are lit. For one such test
image, the metagradient of its loss ranks all training images by how much their weight raises it. The baseline ranks by
distance in pixels. Trained again without the first ten, the network reads the image as it should. Draws
poisoned_images.png, or the path given: the test image and the first ten of both rankings.

Prints:
    test accuracy: 95%
    poisoned among the first 10 by metagradient:   9
    poisoned among the first 10 by pixel distance: 2
    the chosen image shows 9; the network reads 0, and without the first 10 it reads 9
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

import metagrad as mg

NUM_TRAIN, NUM_POISONED, NUM_STEPS = 1000, 10, 60

generator = torch.Generator().manual_seed(0)
images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
order = torch.randperm(len(labels), generator=generator)
images, labels = images[order].float() / 16, labels[order]
lit = images.index_fill(
    1, torch.tensor([0, 7, 56]), 1.0
)  # All images once more, with three corners at full brightness.
(x, test_x), (y, test_y) = (both.clone().tensor_split([NUM_TRAIN]) for both in (images, labels))
poisoned = y.nonzero().flatten()[:NUM_POISONED]  # Images that show anything but a 0 ...
x[poisoned], y[poisoned] = lit[poisoned], 0  # ... are said to show one.

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(functional_call(model, params, batch["x"]), batch["y"], reduction="none")


step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(lr=0.2, momentum=0.9))
batches = [{"x": x, "y": y, "index": torch.arange(NUM_TRAIN)}] * NUM_STEPS  # Every step sees all images.
everything = torch.ones(NUM_TRAIN)
params = mg.train(step, model, batches, {"weights": everything}).params

confidence, read = functional_call(model, params, test_x).softmax(dim=1).max(dim=1)
fooled = functional_call(model, params, lit[NUM_TRAIN:]).argmax(dim=1) == 0
chosen = ((read == test_y) & (test_y != 0) & fooled & (confidence > 0.9)).nonzero()[0]  # The first such image.
victim = {"x": lit[NUM_TRAIN + chosen], "y": test_y[chosen]}

result = mg.metagradient(lambda state: loss(state.params, victim).sum(), step, model, batches, {"weights": everything})
suspects = result.meta["weights"].argsort(descending=True)[:NUM_POISONED]
nearest = (x - victim["x"]).norm(dim=1).argsort()[:NUM_POISONED]
found, found_nearest = (int(torch.isin(ranked, poisoned).sum()) for ranked in (suspects, nearest))
again = mg.train(step, model, batches, {"weights": everything.index_fill(0, suspects, 0.0)}).params
shown, answer = victim["y"].item(), functional_call(model, again, victim["x"]).argmax().item()

print(f"test accuracy: {(read == test_y).float().mean():.0%}")
print(f"poisoned among the first {NUM_POISONED} by metagradient:   {found}")
print(f"poisoned among the first {NUM_POISONED} by pixel distance: {found_nearest}")
print(f"the chosen image shows {shown}; the network reads 0, and without the first {NUM_POISONED} it reads {answer}")

figure, axes = plt.subplots(2, NUM_POISONED + 1, figsize=(9, 2.6), layout="constrained")
for row, ranked, name in zip(axes, (suspects, nearest), ("meta-\ngradient", "pixel\ndistance"), strict=True):
    row[0].set_ylabel(name)
    for axis, image, label in zip(row, [victim["x"][0], *x[ranked]], ["test", *y[ranked].tolist()], strict=True):
        axis.imshow(image.view(8, 8), cmap="gray_r")
        axis.set(xticks=[], yticks=[], title=label)
    for axis in row[1:][torch.isin(ranked, poisoned).numpy()]:
        axis.spines[:].set(color="red", linewidth=3)
figure.suptitle("The training images blamed for the wrong reading of the test image, with their labels; red: poisoned")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "poisoned_images.png")

assert found >= 6 and found >= 2 * found_nearest and answer == shown
