"""A run with a closed form."""

import torch

import metagrad as mg

LR = 0.1


def quadratic(num_steps=1, loss=None, dtype=torch.float64):
    """θ ← θ − 2·lr·(θ − b): Φ = θ_T is a polynomial of lr, and linear in b."""
    loss = loss or (lambda p, b, meta: (p["theta"] - meta["target"]) ** 2)
    step = mg.TrainStep(loss, lambda meta: mg.optim.sgd(lr=meta["lr"]))
    meta = {"lr": torch.tensor(LR, dtype=dtype), "target": torch.tensor(2.0, dtype=dtype)}
    return lambda s: s.params["theta"] + 0, step, {"theta": torch.tensor(0.5, dtype=dtype)}, [None] * num_steps, meta
