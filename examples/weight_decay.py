"""One weight decay for each layer, learned, in a network with a layer that should read nothing.

The network is shown two handwritten digits and trained to name the left one, on 200 pairs. One layer reads the left
image, one the right, a third their sum. The metaparameters are the logarithms of the three weight decays. They start
from the best common decay and descend the loss on 300 validation pairs, through the training run. The baseline is that
start: one decay for all layers, the best of 7 on those same pairs. The test loss is that on 1,297 other pairs. Draws
weight_decay.png, or the path given: the decays while they are learned.

Prints:
                    left    right      top  validation loss  test loss
    one for all  0.00316  0.00316  0.00316            0.321      0.328
    one each     0.00048  0.08147  0.00186            0.194      0.197
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import metagrad as mg

NUM_STEPS, NUM_UPDATES = 60, 30
generator = torch.Generator().manual_seed(0)
images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
order, other_order = (torch.randperm(len(labels), generator=generator) for _ in range(2))
left_images, right_images, labels = images[order].float() / 16, images[other_order].float() / 16, labels[order]
train, validation, test = slice(200), slice(200, 500), slice(500, None)
shapes = {"left": (64, 64), "right": (64, 64), "top": (64, 10)}
layers = {name: torch.randn(shape, generator=generator) / 16 for name, shape in shapes.items()}


def loss(params: dict[str, Tensor], pairs: slice, log_decay: Tensor | None = None) -> Tensor:
    hidden = torch.tanh(left_images[pairs] @ params["left"] + right_images[pairs] @ params["right"])
    return nn.functional.cross_entropy(hidden @ params["top"], labels[pairs])


def optimizer(log_decay: Tensor) -> mg.optim.GradientTransformation:
    decays = dict(zip(layers, log_decay.exp(), strict=True))
    sgds = {name: mg.optim.sgd(lr=0.3, momentum=0.9, weight_decay=decay) for name, decay in decays.items()}
    return mg.optim.groups(lambda name, tensor: name, sgds)  # Each layer is a group of its own.


step = mg.TrainStep(loss, optimizer)


def losses(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Validation and test loss after training on all training pairs with these decays."""
    params = mg.train(step, layers, [train] * NUM_STEPS, log_decay, schedule=mg.EveryStep()).params
    return loss(params, validation), loss(params, test)


grid = [torch.full((3,), decay).log() for decay in torch.logspace(-4, -1, 7)]
common = min(grid, key=lambda log_decay: losses(log_decay)[0].item())
learned = common.clone().requires_grad_()
outer = torch.optim.Adam([learned], lr=0.13)
history = [common.exp()]
for _ in range(NUM_UPDATES):
    outer.zero_grad()
    losses(learned)[0].backward()  # The run is walked back here.
    outer.step()
    history.append(learned.detach().exp())

print("                left    right      top  validation loss  test loss")
results = {"one for all": losses(common), "one each": losses(learned)}
for (name, result), decays in zip(results.items(), (history[0], history[-1]), strict=True):
    print(f"{name:11s}", *(f"{value:8.5f}" for value in [*decays]), "{:16.3f} {:10.3f}".format(*result))

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for layer, values in zip(layers, torch.stack(history).T, strict=True):
    axes.plot(values, label=layer)
axes.set(
    xlabel="update", ylabel="weight decay", yscale="log", title="The layer that reads the irrelevant image is decayed"
)
axes.legend(title="layer")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "weight_decay.png")

assert results["one each"][1] < 0.85 * results["one for all"][1]
