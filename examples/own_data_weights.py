"""Your own classifier: which training examples raise its validation loss?

The first 5 of 100 training images have a wrong label. One metagradient gives the derivative of the validation loss with
respect to the weight of every training image; the largest belong to the wrong labels.

Prints:
    the images to look at: [0, 1, 2, 4, 3]
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

import metagrad as mg

x, y = map(torch.as_tensor, load_digits(return_X_y=True))
x = x.float() / 16
given = torch.where(torch.arange(len(y)) < 5, (y + 1) % 10, y)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def loss(params, batch):
    return nn.functional.cross_entropy(functional_call(model, params, batch["x"]), batch["y"], reduction="none")


step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(lr=0.2, momentum=0.9))
batches = [{"x": x[:100], "y": given[:100], "index": torch.arange(100)}] * 30
validation = {"x": x[100:500], "y": y[100:500]}
result = mg.metagradient(
    lambda state: loss(state.params, validation).mean(), step, model, batches, {"weights": torch.ones(100)}
)
suspects = result.meta["weights"].argsort(descending=True)[:5].tolist()
print("the images to look at:", suspects)
assert len(set(suspects) & set(range(5))) >= 3
