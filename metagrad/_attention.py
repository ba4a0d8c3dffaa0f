"""Attention written out, for derivatives of second order."""

from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import dropout

from metagrad._formulas import Softmax
from metagrad._smooth import smooth

COARSE = (torch.float16, torch.bfloat16)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with the random numbers of torch's math kernel."""
    if query.dtype in COARSE:
        mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        wide = query.float(), key.float(), value.float(), mask, dropout_p, is_causal
        return scaled_dot_product_attention(*wide, scale=scale, enable_gqa=enable_gqa).to(query.dtype)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = (query * (1 / sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = smooth(scores, Softmax(-1, masked=attn_mask is not None and not is_causal))
    return (dropout(weights, dropout_p) if dropout_p > 0 else weights) @ value
