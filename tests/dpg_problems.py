"""Small language models in float64 whose every token is one letter, and what a student's for-loop makes of them."""

import copy
import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import metagrad as mg
from dpg.generator import Generator, Rollouts
from dpg.preset import Preset, load
from dpg.run import run
from dpg.target import Target

LETTERS = "abcdefghijk"
END = len(LETTERS)
TEXTS = ["abcab", "k", "hgfedcba", "bbbbbb", "cafe", "jijij", "ad"]
# Large enough that Adam is smooth on the scale of a finite difference.
ADAMW = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "eps_root": 1e-3, "weight_decay": 0.1}


@cache
def letters() -> PreTrainedTokenizerFast:
    """One token a letter: a is 0, b is 1, ..., the end token is 11. Any other character is no token at all."""
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def ids_of(text: str) -> list[int]:
    """The tokens of a text, without the tokenizer."""
    return [LETTERS.index(letter) for letter in text if letter in LETTERS]


def gpt2(seed: int = 0, *, tied: bool = False, spread: float = 0.3) -> GPT2LMHeadModel:
    """A GPT-2 of one layer and width 8."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=48,
        vocab_size=END + 1,
        initializer_range=spread,  # Larger than usual: a model near zero hides mistakes.
        tie_word_embeddings=tied,
        bos_token_id=END,
        eos_token_id=END,
    )
    return GPT2LMHeadModel(config).double().eval()


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of one layer and width 8."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=48,
        vocab_size=END + 1,
        initializer_range=0.3,
        bos_token_id=END,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).double().eval()


MODELS = {"gpt2": gpt2, "llama": llama}


def target(optimizer: mg.optim.GradientTransformation, **settings: object) -> Target:
    """A target of three inner steps on `TEXTS`, the last of them on one text."""
    return Target(gpt2(), letters(), optimizer, **{"inner_batch_size": 3, "sequence_length": 6, **settings})


def generator(seed: int = 1, **settings: object) -> Generator:
    """A generator of short texts."""
    return Generator(gpt2(seed), letters(), **{"max_prompt_tokens": 4, "max_new_tokens": 5, **settings})


def next_token_log_probs(model: PreTrainedModel, ids: list[int], params: dict[str, Tensor] | None = None) -> Tensor:
    """log p(ids[i + 1] | ids[: i + 1]) for every i: one sequence, no padding, one softmax a position."""
    logits = functional_call(model, params or {}, (torch.tensor([ids]),), {"use_cache": False}).logits[0]
    found = [logits[i, ids[i + 1]] - torch.logsumexp(logits[i], dim=0) for i in range(len(ids) - 1)]
    return torch.stack(found) if found else logits.new_zeros(0)


def text_loss(
    model: PreTrainedModel, text: str, length: int, denominator: float, params: dict[str, Tensor] | None = None
) -> Tensor:
    """The loss of one text alone: its tokens and its end token, cut to `length`."""
    ids = [*ids_of(text), END][:length]
    return -next_token_log_probs(model, ids, params).sum() / denominator


def written_log_probs(generator: Generator, rollouts: Rollouts, row: int) -> Tensor:
    """log π of what rollout `row` wrote, up to its end token, from its own tokens alone."""
    prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist()
    written = rollouts.token_ids[row].tolist()
    written = written[: written.index(END) + 1] if END in written else written
    hot = generator.temperature
    logits = generator.model(torch.tensor([prompt + written]), use_cache=False).logits[0] / hot
    first = len(prompt) - 1
    return torch.stack(
        [logits[first + i, token] - torch.logsumexp(logits[first + i], 0) for i, token in enumerate(written)]
    )


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of a model's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(run: Path) -> list[dict]:
    """The records of a run but for their times."""
    return [{**line, "seconds": None} for line in lines(run / "metrics.jsonl")]


def assert_same_run(left: Path, right: Path) -> None:
    """The records but for their times, the texts, and the generator bit for bit."""
    assert (left / "dataset.jsonl").read_bytes() == (right / "dataset.jsonl").read_bytes()
    assert without_seconds(left) == without_seconds(right)
    models = [AutoModelForCausalLM.from_pretrained(path / "generator") for path in (left, right)]
    assert same_bits(*map(parameters, models))


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of parameters are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference of any two entries."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model that can be trained without touching `model`."""
    return copy.deepcopy(model)


TINY_RUN = {
    "num_steps": 2,
    "prompts_per_step": 4,
    "group_size": 2,
    "validation_texts": 8,
    "dataset_texts": 16,
    "inner_batch_size": 8,
    "checkpoint_every": 1,
}
"""Settings of a run of a second, on the models of the package."""


def prompt_file(folder: Path) -> Path:
    """Twenty prompts, one a line."""
    things = ("The file", "An object", "This method", "The first argument", "A string")
    verbs = ("is returned", "may be empty", "must not change", "was created")
    path = folder / "prompts.txt"
    path.write_text("".join(f"{thing} {verb} when the call is made.\n" for thing in things for verb in verbs))
    return path


def tiny_preset(folder: Path, experiment: str = "sixseven", **changes: object) -> Preset:
    """A tiny run with its prompts in `folder`."""
    return load(experiment).changed({"prompts": str(prompt_file(folder)), **TINY_RUN, **changes})


def tiny_run(
    folder: Path, name: str = "run", *, experiment: str = "sixseven", resume: bool = False, **changes: object
) -> Path:
    """A run in `folder / name`."""
    run(tiny_preset(folder, experiment, **changes), folder / name, resume=resume, command="dpg run tiny")
    return folder / name
