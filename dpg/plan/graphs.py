"""What a step holds besides parameters and states, counted by running it on tensors of no content.

Counted are activations, what backward passes need and make on the way, and logits. Not counted are the parameters and
gradients of their size: those are arithmetic. The number of texts is taken as it is up to two forward passes
(`TEXTS_TOGETHER` texts each); of more, each further one adds what the second added.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dpg.generator import token_log_probs
from dpg.plan.ledger import Ledger
from dpg.plan.shape import Shape
from dpg.target import TEXTS_TOGETHER
from dpg.text import example_losses


class Graph(NamedTuple):
    """Bytes of one micro-batch, besides parameters.

    Attributes:
        held: of the graph, once it stands.
        peak: the most at a time while it is walked back, with what is left of it and what has been made by then.
        made: of that, all tensors that the walk is given or makes, and that are as large as the parameters.
    """

    held: int
    peak: int
    made: int


@lru_cache(maxsize=256)
def second_order(shape: Shape, texts: int, length: int, num_metrics: int, wrt_params: bool) -> Graph:
    """The gradient with its graph, and the way back through that for each metric.

    Args:
        wrt_params: whether Hγ is asked for, or only the cotangent of the texts' weights.
    """
    return _by_passes(texts, lambda n: _second_order(shape, n, length, num_metrics, wrt_params))


def _second_order(shape: Shape, texts: int, length: int, num_metrics: int, wrt_params: bool) -> Graph:
    params, weights = dict(shape.model.named_parameters()), _weights(texts)
    with _counting(shape) as ledger:
        own = {name: p.view_as(p) for name, p in params.items()}
        loss = (weights * _losses(shape, own, texts, length)).mean()
        gradient = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        del loss
        size = _bytes(gradient)
        held, ledger.peak = ledger.alive - size, ledger.alive
        inputs, pulled = [*(own.values() if wrt_params else ()), weights], []
        cotangents = [torch.empty_like(g) for g in gradient]
        size += _bytes(cotangents)
        for number in range(num_metrics):
            more = number + 1 < num_metrics
            pulled.append(torch.autograd.grad(gradient, inputs, cotangents, retain_graph=more, allow_unused=True))
        size += num_metrics * _bytes(pulled[0][: len(inputs) - 1])
    return Graph(held, ledger.peak, size)


@lru_cache(maxsize=256)
def forward_mode(shape: Shape, texts: int, length: int) -> Graph:
    """The derivative by the texts' weights alone, for a known gradient: one forward pass with tangents."""
    return _by_passes(texts, lambda n: _forward_mode(shape, n, length))


def _forward_mode(shape: Shape, texts: int, length: int) -> Graph:
    params, weights = dict(shape.model.named_parameters()), _weights(texts)
    tangents = {name: torch.empty_like(p, requires_grad=False) for name, p in params.items()}
    with _counting(shape, tangents.values()) as ledger, forward_ad.dual_level():
        own = {name: forward_ad.make_dual(p.detach(), tangents[name]) for name, p in params.items()}
        loss = (weights * _losses(shape, own, texts, length)).mean()
        torch.autograd.grad(forward_ad.unpack_dual(loss).tangent, [weights])
    return Graph(0, ledger.peak, 0)


@lru_cache(maxsize=256)
def first_order(shape: Shape, texts: int, length: int, fused: bool) -> Graph:
    """A gradient of the mean loss of texts; with `fused` by the attention that training without metagradients uses."""
    return _by_passes(texts, lambda n: _first_order(shape, n, length, fused))


def _first_order(shape: Shape, texts: int, length: int, fused: bool) -> Graph:
    params = dict(shape.model.named_parameters())
    with _counting(shape, fused=fused) as ledger:
        loss = _losses(shape, params, texts, length).mean()
        held = ledger.alive
        made = torch.autograd.grad(loss, list(params.values()))
    return Graph(held, ledger.peak, _bytes(made))


@lru_cache(maxsize=256)
def policy(shape: Shape, texts: int, prompt: int, written: int, entropy: bool) -> Graph:
    """The policy's gradient on some texts: logits of what was written alone."""
    learned = [p for p in shape.model.parameters() if p.requires_grad]
    with _counting(shape, fused=True) as ledger:
        ids, mask = _tokens(texts, prompt + written - 1)
        logits = shape.model(
            input_ids=ids, attention_mask=mask, position_ids=ids, logits_to_keep=written, use_cache=False
        ).logits
        log_probs = token_log_probs(logits, _tokens(texts, written)[0])
        loss = log_probs.exp().mean()
        if entropy:
            loss = loss + torch.special.entr(logits.softmax(dim=2)).sum(dim=2).mean()
        held = ledger.alive
        made = torch.autograd.grad(loss, learned)
    return Graph(held, ledger.peak, _bytes(made))


@lru_cache(maxsize=256)
def reading(shape: Shape, texts: int, length: int) -> Graph:
    """Reading `length` tokens of prompts: what is then known of them (`held`: keys and values), and the peak."""
    with _counting(shape, fused=True) as ledger, torch.no_grad():
        ids, mask = _tokens(texts, length)
        output = shape.model(input_ids=ids, attention_mask=mask, position_ids=ids, logits_to_keep=1, use_cache=True)
        kept = [output[name] for name in ("past_key_values", "cache_params") if name in output]
        del output, ids, mask
        held = ledger.alive if kept else 0
    return Graph(held, ledger.peak, 0)


@lru_cache(maxsize=256)
def operations(shape: Shape, length: int) -> float:
    """Floating-point operations of a forward pass for each token of a text, its logits among them."""
    counter = FlopCounterMode(display=False)
    with counter, _counting(shape), torch.no_grad():
        ids, mask = _tokens(1, length)
        shape.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops() / length


def _by_passes(texts: int, count: Callable[[int], Graph]) -> Graph:
    if texts <= 2 * TEXTS_TOGETHER:
        return count(texts)
    one, two = count(TEXTS_TOGETHER), count(2 * TEXTS_TOGETHER)
    further = texts / TEXTS_TOGETHER - 2
    return Graph(*(b + round(further * (b - a)) for a, b in zip(one, two, strict=True)))


def _losses(shape: Shape, params: dict[str, Tensor], texts: int, length: int) -> Float[Tensor, " texts"]:
    found = []
    for start in range(0, texts, TEXTS_TOGETHER):
        ids, mask = _tokens(min(TEXTS_TOGETHER, texts - start), length)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        found.append(example_losses(functional_call(shape.model, params, (), inputs).logits, ids, length))
    return torch.cat(found)


def _tokens(texts: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(texts, length, dtype=torch.long, device="meta")
    return ids, torch.ones_like(ids)


def _weights(texts: int) -> Float[Tensor, " texts"]:
    return torch.ones(texts, device="meta", dtype=torch.float32, requires_grad=True)


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@contextmanager
def _counting(shape: Shape, known: Any = (), *, fused: bool = False) -> Iterator[Ledger]:
    attention = _FusedAttention() if fused else sdpa_kernel(SDPBackend.MATH)
    with attention, Ledger([*shape.model.parameters(), *shape.model.buffers(), *known]) as ledger:
        yield ledger


class _FusedAttention(TorchFunctionMode):
    """Attention whose matrix is never whole, as on devices; without a device torch would choose the other."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
