"""Texts as training examples for a causal language model: tokens, labels, and each example's own loss."""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Batch: TypeAlias = dict[str, Tensor]

IGNORED = -100
"""The label of a position that is not trained on, by Hugging Face's convention."""


def encode(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    train_eos: bool = True,
    train_bos: bool = False,
) -> Batch:
    """Texts as one batch in their own order.

    Args:
        texts: at least one.
        tokenizer: of the model that will be trained.
        sequence_length: tokens kept of each text.
        train_eos: let the model learn where a text ends. A text that was cut has no end to learn.
        train_bos: let the model learn how a text begins: put the begin token in front, or the end token for a tokenizer
            without one. Else the first token of a text is never predicted.

    Returns:
        `input_ids`, `attention_mask` and `labels` of shape (texts, longest), padded on the right, padding never a
        label; `index` of shape (texts,), the position of each text in `texts`.

    Raises:
        ValueError: for no texts, or a tokenizer without an end-of-sequence token.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one string, but got {texts!r}.")
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"{type(tokenizer).__name__} has no end-of-sequence token. Set `tokenizer.eos_token`.")
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows: list[list[int]] = []
    for ids in tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]:
        # Some tokenizers add a begin token, or an end token, themselves.
        opened = [begin, *ids] if train_bos and ids[:1] != [begin] else ids
        whole = [*opened, end] if train_eos and ids[-1:] != [end] else opened
        # A text without any token still is an example: the end token alone, from which nothing is predicted.
        rows.append(whole[:sequence_length] or [end])
    longest = max(map(len, rows))
    lengths = rearrange(torch.tensor([len(row) for row in rows]), "texts -> texts 1")
    mask = torch.arange(longest) < lengths
    input_ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "labels": input_ids.masked_fill(~mask, IGNORED),
        "index": torch.arange(len(texts)),
    }


def example_losses(
    logits: Float[Tensor, "texts tokens vocabulary"], labels: Int[Tensor, "texts tokens"], denominator: float
) -> Float[Tensor, " texts"]:
    """Summed cross-entropy of each text's next tokens over a fixed `denominator`.

    One denominator for all texts, so that a long text weighs more than a short one, token by token the same.
    """
    # Labels are moved rather than logits: those are the largest tensor of the whole training step.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = F.cross_entropy(
        rearrange(logits, "texts tokens vocabulary -> (texts tokens) vocabulary"),
        rearrange(following, "texts tokens -> (texts tokens)"),
        ignore_index=IGNORED,
        reduction="none",
    )
    return reduce(losses, "(texts tokens) -> texts", "sum", texts=len(labels)) / denominator


def rows(batch: Batch, chosen: Int[Tensor, " chosen"]) -> Batch:
    """The `chosen` examples of a batch, with their `index` kept and shared padding cut off."""
    longest = int(batch["attention_mask"][chosen].sum(dim=1).max())
    return {key: value[chosen] if value.ndim == 1 else value[chosen, :longest] for key, value in batch.items()}
