"""Language models without their numbers: parameters are counted and steps run on torch's meta device."""

import copy
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from dpg.build import adapted
from dpg.target import fuse_gelu, untie_head

_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
_SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192}
NAMED = {
    "gpt2-124m": lambda: GPT2Config(),
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, tie_word_embeddings=True, **_SMOLLM2
    ),
    "llama-1b": lambda: LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **_LLAMA
    ),
    "llama-8b": lambda: LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **_LLAMA),
}
"""Public configurations, by names that need no download: those of GPT-2, SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B."""

HUB = {
    "gpt2": "gpt2-124m",
    "openai-community/gpt2": "gpt2-124m",
    "HuggingFaceTB/SmolLM2-135M": "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "meta-llama/Llama-3.2-1B": "llama-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-1b",
    "meta-llama/Llama-3.1-8B": "llama-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-8b",
}
"""Their names on the hub."""


@dataclass(frozen=True, eq=False)
class Shape:
    """A causal language model of no content.

    Attributes:
        name: for a person.
        model: on the meta device.
    """

    name: str
    model: PreTrainedModel

    @cached_property
    def num_params(self) -> int:
        """All of them; tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def num_learned(self) -> int:
        """Those that are trained: all, or an adapter's."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def largest_block(self) -> int:
        """Parameters of the largest layer or embedding: what is gathered at a time where they are sharded."""
        sizes: Counter[str] = Counter()
        for name, parameter in self.model.named_parameters():
            parts = name.split(".")
            # A layer's name ends with its number; everything outside the layers is a block of its own.
            number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
            sizes[".".join(parts[: number + 1])] += parameter.numel()
        return max(sizes.values())

    def with_adapters(self, rank: int) -> "Shape":
        """The same model with low-rank adapters, which alone learn."""
        return _with_adapters(self, rank)

    @property
    def vocabulary(self) -> int:
        """Tokens that a next one is drawn from."""
        return self.model.config.vocab_size


@cache
def _with_adapters(shape: Shape, rank: int) -> Shape:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Peft's, of how it will treat weights that are not here.
        return Shape(shape.name, adapted(copy.deepcopy(shape.model), rank, alpha=1.0))


def named_shape(source: str, *, untie: bool = False, lora_rank: int | None = None) -> Shape:
    """The shape of a named configuration, a folder in Hugging Face format or a name on the hub; no weights are read.

    Raises:
        ValueError: if there is no such configuration, or it is not one of a causal language model.
    """
    model = _empty(_config(source), source)
    shape = Shape(source, untie_head(model) if untie else model)
    return shape if lora_rank is None else shape.with_adapters(lora_rank)


def shape_of(model: PreTrainedModel, name: str) -> Shape:
    """The shape of a model that is there: its modules with tensors of no content in the place of its own."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = Parameter(_without_content(parameter), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _without_content(buffer)
    return Shape(name, copy.deepcopy(model, memo))


def _without_content(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _config(source: str) -> PretrainedConfig:
    if (known := HUB.get(source, source)) in NAMED:
        return NAMED[known]()
    if source.endswith(".gguf"):
        raise ValueError(
            f"{source} is a packed model, whose configuration cannot be read without it. Pass a named one of its size "
            f"({', '.join(NAMED)}) or a folder with its config.json."
        )
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        where = "has no config.json that can be read" if Path(source).is_dir() else "is no folder, and no name found"
        raise ValueError(
            f"{source!r} {where}. Pass a folder in Hugging Face format, a hub name, or one of {', '.join(NAMED)}. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _empty(config: PretrainedConfig, source: str) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(f"{source!r} is no causal language model: {str(error).splitlines()[0]}") from error
    fuse_gelu(model)
    return model.eval()
