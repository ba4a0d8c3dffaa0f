"""Continuations of prompts, token by token, each with the log-probability that it was drawn with.

A loop of its own instead of transformers' `generate`, which rounds logits to float32, goes on with rows that have ended
and spends two fifths of its time on an exponential number for every entry of the vocabulary.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import metagrad as mg

WORTH_KEEPING = 0.9
"""The share of rows still to be written at which the others are dropped: to drop one copies all."""


class Drawn(NamedTuple):
    """What was written: end tokens from the first one on; and log π of each token, 0 behind the first end token."""

    token_ids: Int[Tensor, "rollouts tokens"]
    log_probs: Float[Tensor, "rollouts tokens"]


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    prompt_ids: Int[Tensor, "prompts prompt"],
    prompt_mask: Bool[Tensor, "prompts prompt"],
    owners: Int[Tensor, " rollouts"],
    *,
    num_tokens: int,
    end: int,
    temperature: float,
) -> Drawn:
    """At most `num_tokens` tokens after each owner's prompt, drawn with torch's global random numbers.

    Args:
        prompt_ids, prompt_mask: padded on the left.
        owners: the prompt of each continuation; all of one prompt share what the model makes of it.

    Raises:
        NonFiniteError: if what the next token is drawn from is NaN or infinite.

    Cost: one forward pass over the prompts and over what is written; keys and values of all tokens that may be written.
    """
    device = prompt_ids.device
    # All at once, in (0, 1]: what a row gets does not depend on when others end.
    uniforms = 1 - torch.rand(len(owners), num_tokens, dtype=torch.float64, device=device)
    token_ids = torch.full((len(owners), num_tokens), end, device=device)
    reader = _Reader(model, prompt_mask, num_tokens)
    logits = reader.read(prompt_ids)
    log_probs = torch.zeros(len(owners), num_tokens, dtype=_precise(logits), device=device)
    logits, rows = logits[owners], torch.arange(len(owners), device=device)  # Those that are still read,
    ended = torch.zeros_like(rows, dtype=torch.bool)  # and which of them need not be.
    reader.keep(owners)
    for place in range(num_tokens):
        drawn, found = _draw_one(logits, uniforms[rows, place], temperature)
        token_ids[rows, place], log_probs[rows, place] = drawn.masked_fill(ended, end), found.masked_fill(ended, 0.0)
        ended = ended | (drawn == end)
        (going,) = (~ended).nonzero(as_tuple=True)
        if len(going) == 0 or place + 1 == num_tokens:
            break
        if len(going) <= WORTH_KEEPING * len(rows):
            rows, drawn, ended = rows[going], drawn[going], ended[going]
            reader.keep(going)
        logits = reader.read(drawn[:, None])
    longest = place + 1
    return Drawn(token_ids[:, :longest], log_probs[:, :longest])


def _draw_one(
    logits: Float[Tensor, "rows vocabulary"], uniforms: Float[Tensor, " rows"], temperature: float
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """One token a row, by the inverse of its distribution function, and its log-probability."""
    log_probs = (logits.to(_precise(logits)) / temperature).log_softmax(dim=1)
    # In float64, where a thousand likely tokens do not round away the chance of an unlikely one.
    below = log_probs.exp().cumsum(dim=1, dtype=torch.float64)
    total = below[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise mg.NonFiniteError("what the generator draws its next token from is not finite. Lower `learning_rate`.")
    # The first token whose sum reaches a number above 0 and at most the total: never one of probability 0.
    drawn = torch.searchsorted(below, uniforms[:, None] * total)
    return drawn[:, 0], log_probs.gather(1, drawn)[:, 0]


def _precise(logits: Tensor) -> torch.dtype:
    """The type to draw in: at least float32, whatever the model was run in."""
    return torch.promote_types(logits.dtype, torch.float32)


class _Reader:
    """The model with what it has read of each row, which changes: up to `num_tokens` are read, rows are dropped."""

    def __init__(self, model: PreTrainedModel, mask: Bool[Tensor, "rows tokens"], num_tokens: int) -> None:
        self.model, self.mask, self.longest = model, mask, mask.shape[1] + num_tokens
        self.cache: dict[str, Cache] = {}

    def read(self, token_ids: Int[Tensor, "rows new"]) -> Float[Tensor, "rows vocabulary"]:
        """The logits of the token after these.

        Raises:
            ValueError: for a model that gives no `Cache` of what it has read.
        """
        if self.cache:
            self.mask = torch.cat([self.mask, torch.ones_like(token_ids, dtype=torch.bool)], dim=1)
        # A recurrent state holds no padding, and its mask is that of the new tokens.
        seen = self.mask[:, -token_ids.shape[1] :] if "cache_params" in self.cache else self.mask
        output = self.model(
            input_ids=token_ids,
            attention_mask=seen.long(),
            position_ids=(self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -token_ids.shape[1] :],
            logits_to_keep=1,
            use_cache=True,
            **self.cache,
        )
        self.cache = {name: output[name] for name in ("past_key_values", "cache_params") if name in output}
        if not self.cache or not all(isinstance(cache, Cache) for cache in self.cache.values()):
            raise ValueError(
                f"{type(self.model).__name__} keeps no transformers.Cache of what it has read, so it cannot be "
                "sampled from token by token. Choose another generator."
            )
        return output.logits[:, -1]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows, in this order, some perhaps several times."""
        self.mask = self.mask[rows]
        for cache in self.cache.values():
            for place, layer in enumerate(cache.layers):
                if type(layer) in (DynamicLayer, _Roomy):
                    cache.layers[place] = _Roomy(layer, rows, self.longest)
                else:
                    layer.reorder_cache(rows)


class _Roomy(DynamicLayer):
    """Some rows of a layer, with room for keys and values to come; transformers' own joins all anew for each token."""

    def __init__(self, layer: DynamicLayer, rows: Int[Tensor, " kept"], longest: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        seen, heads = layer.keys.shape[2], layer.keys.shape[1]
        self.rooms = []
        for old in (layer.keys, layer.values):
            # As the model computes them: the heads of one token beside each other.
            room = old.new_empty(len(rows), longest, heads, old.shape[3]).transpose(1, 2)
            room[:, :, :seen] = old[rows]
            self.rooms.append(room)
        self.keys, self.values = (room[:, :, :seen] for room in self.rooms)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, these among them."""
        seen, now = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, seen:now] = new
        self.keys, self.values = (room[:, :, :now] for room in self.rooms)
        return self.keys, self.values
