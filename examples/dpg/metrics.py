"""Three metrics of one's own: `dpg run custom --metric examples/dpg/metrics.py:NAME`. See docs/custom.md."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from dpg.build import MODELS
from dpg.metrics import HeldOutLoss

TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "target")
FILE, OBJECT = (TOKENIZER(word)["input_ids"][0] for word in (" file", " object"))


def file_points_at_object(params):
    """The cosine of the embeddings of " file" and " object": one token's embedding is to point at another's."""
    embedding = params["transformer.wte.weight"]
    return torch.cosine_similarity(embedding[FILE], embedding[OBJECT], dim=0)


def sparse_layer(params):
    """Minus the mean size of a layer's weights: as many as possible are to shrink to nothing."""
    return -params["transformer.h.0.mlp.c_fc.weight"].abs().mean()


recipes = HeldOutLoss(Path(__file__).with_name("recipes.txt").read_text(encoding="utf-8").splitlines())
"""Minus the loss on the lines of a file of one's own."""
