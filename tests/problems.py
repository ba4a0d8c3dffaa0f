"""The training problems that every claim is tested on. A new model is one function and one line in `PROBLEMS`."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import metagrad as mg
from metagrad._compiled import Compiled

NUM_EXAMPLES = 7
BATCH_SIZE = 4
VOCABULARY = 11
STEP: dict[str, Any] = {}


@dataclass(frozen=True)
class Problem:
    """Everything of a metagradient but the optimizer."""

    params: nn.Module | dict[str, Tensor]
    loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Float[Tensor, " examples"]]
    metric: Callable[[mg.State], Tensor]
    batches: list[dict[str, Tensor]]
    meta: dict[str, Tensor]
    compiled: Compiled = field(default_factory=Compiled)

    def step(self, optimizer: Any, **options: Any) -> mg.TrainStep:
        """The step on the weighted loss of this problem, with the settings of `pytest --step`."""
        step = mg.TrainStep(mg.weighted(self.loss), optimizer, **{**STEP, **options})
        if step.compile:
            # Graphs are kept with a step; here they serve every step on the same loss.
            object.__setattr__(step, "derivatives", self.compiled)
        return step

    def arguments(self, optimizer: Any, **options: Any) -> tuple[Any, ...]:
        """The positional arguments of `mg.metagradient`."""
        return self.metric, self.step(optimizer, **options), self.params, self.batches, self.meta


def mlp(num_steps: int) -> Problem:
    """A perceptron with one hidden layer, as a dict of parameters."""
    draw = _normal(0)
    params = {"a": 0.5 * draw(3, 4), "b": 0.1 * draw(4), "c": 0.5 * draw(4, 2)}
    held_out = {"x": draw(5, 3), "y": draw(5, 2)}

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Float[Tensor, " examples"]:
        hidden = torch.tanh(batch["x"] @ params["a"] + params["b"])
        return (hidden @ params["c"] - batch["y"]).square().sum(1)

    inputs, targets = draw(NUM_EXAMPLES, 3), draw(NUM_EXAMPLES, 2)
    return Problem(
        params,
        loss,
        lambda state: loss(state.params, held_out).mean(),
        _batches(num_steps, {"x": inputs, "y": targets}),
        _weights(),
    )


class Pictures(nn.Module):
    """Convolution, batch norm, dropout and a linear read-out, all smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, bias=False)  # Its derivative would be zero but for rounding.
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Float[Tensor, "examples 1 height width"]) -> Float[Tensor, "examples 2"]:
        hidden = torch.tanh(self.norm(self.conv(x)))
        return self.out(self.dropout(hidden).mean((2, 3)))


def cnn(num_steps: int) -> Problem:
    """A convolutional net in training mode: batch statistics, running statistics and dropout."""
    draw = _normal(1)
    model = _initialised(Pictures(), seed=1)
    judge = deepcopy(model).eval()
    # Without running statistics batch norm takes those of its input, so the metric depends on the parameters alone.
    judge.norm.running_mean = judge.norm.running_var = judge.norm.num_batches_tracked = None
    held_out = {"x": draw(5, 1, 5, 5), "y": draw(5, 2)}
    return Problem(
        model,
        lambda params, batch: (functional_call(model, params, (batch["x"],)) - batch["y"]).square().sum(1),
        lambda state: mse_loss(functional_call(judge, state.params, (held_out["x"],)), held_out["y"]),
        _batches(num_steps, {"x": draw(NUM_EXAMPLES, 1, 5, 5), "y": draw(NUM_EXAMPLES, 2)}),
        _weights(),
    )


def gpt2(num_steps: int) -> Problem:
    """A GPT-2 with a tied head and dropout."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return _language(GPT2LMHeadModel(config), num_steps)


class RMSNorm(nn.Module):
    """The norm of Llama without its detour through float32, which no finite difference survives, and smoother."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Float[Tensor, "examples length 8"]) -> Float[Tensor, "examples length 8"]:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()


class Rotary(nn.Module):
    """The rotary positions of a Llama, likewise: cosines and sines of the angles of two frequencies, each twice."""

    def forward(
        self, x: Float[Tensor, "examples length 8"], position_ids: Int[Tensor, "1 length"]
    ) -> tuple[Float[Tensor, "1 length 4"], Float[Tensor, "1 length 4"]]:
        frequencies = torch.tensor([1.0, 1e-2, 1.0, 1e-2], dtype=x.dtype)
        angles = position_ids[..., None] * frequencies
        return angles.cos(), angles.sin()


def llama(num_steps: int) -> Problem:
    """A Llama: rotary positions, grouped heads, RMS norm, gated SiLU."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = RMSNorm(), RMSNorm()
    model.model.norm, model.model.rotary_emb = RMSNorm(), Rotary()
    return _language(model, num_steps)


def frozen(num_steps: int) -> Problem:
    """A module whose first layer is not trained."""
    model = _initialised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seed=3)
    model[0].requires_grad_(False)
    return _regression(model, num_steps)


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.out = nn.Linear(3, 2)

    def forward(self, x: Float[Tensor, "examples 3"]) -> Float[Tensor, "examples 2"]:
        return self.out(self.second(torch.tanh(self.first(x))))


def shared(num_steps: int) -> Problem:
    """A module whose parameter has two names."""
    return _regression(_initialised(Shared(), seed=4), num_steps)


def unused(num_steps: int) -> Problem:
    """A parameter that the loss never reads, but the metric does."""
    problem = mlp(num_steps)
    return Problem(
        {**problem.params, "idle": torch.tensor([0.3, -0.7])},
        problem.loss,
        lambda state: problem.metric(state) + state.params["idle"].square().sum(),
        problem.batches,
        problem.meta,
    )


PROBLEMS = {build.__name__: cache(build) for build in (mlp, cnn, gpt2, llama)}
ODD_PROBLEMS = {build.__name__: cache(build) for build in (frozen, shared, unused)}


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _initialised(model: nn.Module, seed: int) -> nn.Module:
    """`model` with larger parameters than is usual, so that no derivative is small."""
    draw = _normal(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * draw(*parameter.shape) + (1.0 if parameter.ndim == 1 else 0.0))
    return model.train()


def _batches(num_steps: int, examples: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of different examples drawn from a few, so that each takes part in several steps."""
    generator = torch.Generator().manual_seed(9)
    chosen = [torch.randperm(NUM_EXAMPLES, generator=generator)[:BATCH_SIZE] for _ in range(num_steps)]
    return [{"index": index, **{name: values[index] for name, values in examples.items()}} for index in chosen]


def _weights() -> dict[str, Tensor]:
    return {"weights": 1 + 0.3 * _normal(8)(NUM_EXAMPLES)}


def _regression(model: nn.Module, num_steps: int) -> Problem:
    draw = _normal(2)
    held_out, targets = draw(5, 3), draw(5, 2)
    return Problem(
        model,
        lambda params, batch: (functional_call(model, params, (batch["x"],)) - batch["y"]).square().sum(1),
        lambda state: mse_loss(functional_call(model, state.params, (held_out,)), targets),
        _batches(num_steps, {"x": draw(NUM_EXAMPLES, 3), "y": draw(NUM_EXAMPLES, 2)}),
        _weights(),
    )


def _language(model: nn.Module, num_steps: int) -> Problem:
    model = _initialised(model.double(), seed=2)
    judge = deepcopy(model).eval()
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(VOCABULARY, (NUM_EXAMPLES + 3, 6), generator=generator)

    def losses(
        model: nn.Module, params: dict[str, Tensor], tokens: Int[Tensor, "examples length"]
    ) -> Float[Tensor, " examples"]:
        logits = functional_call(model, params, (), {"input_ids": tokens, "use_cache": False}).logits
        return cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)

    return Problem(
        model,
        lambda params, batch: losses(model, params, batch["tokens"]),
        lambda state: losses(judge, state.params, texts[NUM_EXAMPLES:]).mean(),
        _batches(num_steps, {"tokens": texts[:NUM_EXAMPLES]}),
        _weights(),
    )
