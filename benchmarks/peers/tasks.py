"""What is trained: a model that gives one loss per example, its batches, and the batch of the metric."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

IMAGE, CLASSES, FEATURES = 32, 10, 784

Batch: TypeAlias = dict[str, Tensor]


class LanguageModel(nn.Module):
    """A model of transformers; its loss is the mean over an example's tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(input_ids=x).logits
        return cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


class Classifier(nn.Module):
    """A network with one cross-entropy per example."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.network(x), y, reduction="none")


class ResidualBlock(nn.Module):
    """Two convolutions with group norm beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for _ in range(2))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(inner)) + self.shortcut(x)).relu()


def gpt2(layers: int, width: int, vocabulary: int, length: int) -> nn.Module:
    """GPT-2 without dropout. Its head is not tied to its embedding: bergson 2.5.1 takes tied weights for two."""
    transformers = _transformers()
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LanguageModel(transformers.GPT2LMHeadModel(config))


def llama(layers: int, width: int, inner: int, vocabulary: int, length: int) -> nn.Module:
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LanguageModel(transformers.LlamaForCausalLM(config))


def cnn() -> nn.Module:
    """A small residual network; group norm, because it keeps no statistics of batches."""
    shapes = [(32, 32, 1), (32, 64, 2), (64, 128, 2)]
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.GroupNorm(8, 32), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))
    return Classifier(nn.Sequential(stem, *(ResidualBlock(*shape) for shape in shapes), head))


def mlp() -> nn.Module:
    layers = [nn.Linear(FEATURES, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, CLASSES)]
    return Classifier(nn.Sequential(*layers))


def texts(vocabulary: int, length: int, num: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(vocabulary, (num, length + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def images(num: int) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 3, IMAGE, IMAGE), torch.randint(CLASSES, (num,))


def vectors(num: int) -> tuple[Tensor, Tensor]:
    return torch.randn(num, FEATURES), torch.randint(CLASSES, (num,))


@dataclass(frozen=True)
class Model:
    """An architecture and its random data; the metric is the loss of `metric_size` examples, or of a whole batch."""

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    batch_size: int
    metric_size: int | None = None


SMALL = (8192, 64)  # words, and tokens of a text
GPT2 = (50257, 128)

MODELS = [
    Model("gpt2-7M", partial(gpt2, 4, 256, *SMALL), partial(texts, *SMALL), 16),
    Model("gpt2-30M", partial(gpt2, 7, 512, *SMALL), partial(texts, *SMALL), 16),
    Model("llama-7M", partial(llama, 4, 256, 688, *SMALL), partial(texts, *SMALL), 16),
    Model("llama-30M", partial(llama, 7, 512, 1376, *SMALL), partial(texts, *SMALL), 16),
    Model("cnn-0.3M", cnn, images, 32),
    Model("mlp-2M", mlp, vectors, 256),
]
# The sizes of GPT-2, for a GPU: 1,024 texts in one batch, or in eight.
LARGE = [
    Model(f"gpt2-124M-{size}", partial(gpt2, 12, 768, *GPT2), partial(texts, *GPT2), size, 64) for size in (1024, 128)
]


@dataclass(frozen=True)
class Task:
    """A model in training mode, one batch for each step, and one for the metric; the same in every process.

    They are drawn on the CPU, whatever the device.
    """

    module: nn.Module
    batches: list[Batch]
    held_out: Batch

    @staticmethod
    def of(model: Model, num_steps: int, device: str) -> "Task":
        torch.manual_seed(0)
        module = model.build().train()
        sizes = [model.batch_size] * num_steps + [model.metric_size or model.batch_size]
        drawn = [model.draw(size) for size in sizes]
        indices = torch.arange(sum(sizes)).split(sizes)
        batches = [{"x": x, "y": y, "index": index} for (x, y), index in zip(drawn, indices, strict=True)]
        *batches, held_out = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        return Task(module.to(device), batches, held_out)

    @property
    def device(self) -> torch.device:
        return self.held_out["index"].device

    @property
    def batch_size(self) -> int:
        return len(self.batches[0]["index"])

    @property
    def num_examples(self) -> int:
        return len(self.batches) * self.batch_size

    def weights(self) -> Tensor:
        """A weight of 1 for each example."""
        return torch.ones(self.num_examples, device=self.device)

    def initial(self) -> dict[str, Tensor]:
        """Copies of the initial parameters, which training may change."""
        return {name: p.detach().clone().requires_grad_() for name, p in self.module.named_parameters()}

    def losses(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        """One loss for each example of `batch`."""
        return functional_call(self.module, params, (batch["x"], batch["y"]))

    def metric(self, params: dict[str, Tensor]) -> Tensor:
        return self.losses(params, self.held_out).mean()


def _transformers():
    # Imported by the language models alone: it is slow, and counts in the memory of a process.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers
