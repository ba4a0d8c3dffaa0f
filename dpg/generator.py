"""The language model that writes the texts: batched sampling, and the log-probability of what it wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class Rollouts(NamedTuple):
    """Sampled continuations; the continuations of one prompt stand together.

    Attributes:
        prompt_ids: prompts padded on the left.
        prompt_mask: False at their padding.
        token_ids: what was written, its end token included.
        token_mask: False after the end token.
        texts: what was written, decoded.
    """

    prompt_ids: Int[Tensor, "rollouts prompt"]
    prompt_mask: Bool[Tensor, "rollouts prompt"]
    token_ids: Int[Tensor, "rollouts tokens"]
    token_mask: Bool[Tensor, "rollouts tokens"]
    texts: list[str]

    def rows(self, chosen: Int[Tensor, " chosen"]) -> "Rollouts":
        """Some of the rollouts."""
        tensors = (tensor[chosen] for tensor in self[:4])
        return Rollouts(*tensors, [self.texts[i] for i in chosen.tolist()])


@dataclass(frozen=True)
class Generator:
    """A causal language model that continues prompts.

    Args:
        model: any Hugging Face causal language model; in evaluation mode throughout, so that sampling and training
            see the same distribution.
        tokenizer: the model's own.
        max_prompt_tokens: prompts are cut to their first tokens.
        max_new_tokens: longest continuation.
        temperature: of the sampling distribution; log-probabilities are taken at the same temperature.
        chat: put each prompt into the tokenizer's chat template, as what a user says.
        batch_size: continuations sampled at a time; None for all at once.
        sampling_dtype: compute in this type while sampling (autocast); weights and log-probabilities keep their own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 128
    temperature: float = 1.0
    chat: bool = False
    batch_size: int | None = None
    sampling_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.model.eval()
        if min(self.max_prompt_tokens, self.max_new_tokens) < 1 or not self.temperature > 0:
            raise ValueError(
                f"`max_prompt_tokens` {self.max_prompt_tokens} and `max_new_tokens` {self.max_new_tokens} must be at "
                f"least 1, and `temperature` {self.temperature} above 0."
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the generator's tokenizer has no end-of-sequence token. Set `tokenizer.eos_token`.")
        if self.chat and self.tokenizer.chat_template is None:
            raise ValueError("the generator's tokenizer has no chat template. Pass chat=False, or another model.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` is {self.batch_size}. Pass at least 1, or None.")

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """The tokens of each prompt, cut to `max_prompt_tokens`; in a chat the prompt is cut, the template is not.

        Raises:
            ValueError: for no prompts, one without any token, or one that leaves the model no room to write.
        """
        if not prompts:
            raise ValueError("there are no prompts to continue. Pass at least one.")
        end = self.tokenizer.eos_token_id
        if self.chat:
            rows = [self._chat_ids(prompt) for prompt in prompts]
        else:
            rows = [ids[: self.max_prompt_tokens] for ids in self.tokenizer(prompts, verbose=False)["input_ids"]]
            # Some tokenizers end a text themselves; a continuation of that would start another one.
            rows = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in rows]
        if empty := [prompt for prompt, ids in zip(prompts, rows, strict=True) if not ids]:
            raise ValueError(f"prompt {empty[0]!r} holds no token. Leave empty prompts out.")
        longest = max(map(len, rows))
        positions = getattr(self.model.config, "max_position_embeddings", None)  # Not every architecture has a limit.
        if positions and longest + self.max_new_tokens > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and `max_new_tokens` {self.max_new_tokens} exceed the model's "
                f"{positions} positions. Lower `max_prompt_tokens` or `max_new_tokens`."
            )
        return rows

    @torch.no_grad()
    def sample(self, prompts: list[str], group_size: int = 1) -> Rollouts:
        """`group_size` continuations of every prompt, drawn with torch's global random numbers.

        Raises:
            ValueError: as `encode`.
        """
        rows = [row for row in self.encode(prompts) for _ in range(group_size)]
        size = self.batch_size or len(rows)
        parts = [self._sample(rows[i : i + size]) for i in range(0, len(rows), size)]
        return parts[0] if len(parts) == 1 else _joined(parts, self.tokenizer.eos_token_id)

    def _sample(self, rows: list[list[int]]) -> Rollouts:
        """One continuation of each row of tokens."""
        end = self.tokenizer.eos_token_id
        longest = max(map(len, rows))
        padded = torch.tensor([[end] * (longest - len(ids)) + ids for ids in rows], device=self.model.device)
        lengths = torch.tensor([[len(ids)] for ids in rows], device=self.model.device)
        mask = torch.arange(longest, device=self.model.device) >= longest - lengths
        device, dtype = self.model.device.type, self.sampling_dtype
        with _without_defaults(self.model), torch.autocast(device, dtype, enabled=dtype is not None):
            output = self.model.generate(
                input_ids=padded, attention_mask=mask.long(), generation_config=self._sampling()
            )
        written = output[:, longest:]
        ended = (written == end).long()
        alive = ended.cumsum(dim=1) - ended == 0  # Up to and including the first end token.
        texts = self.tokenizer.batch_decode(
            [ids[keep] for ids, keep in zip(written, alive, strict=True)], skip_special_tokens=True
        )
        return Rollouts(padded, mask, written, alive, texts)

    def log_probs(self, rollouts: Rollouts) -> Float[Tensor, "rollouts tokens"]:
        """log π of every written token, given the prompt and what came before."""
        return token_log_probs(self.logits(rollouts), rollouts.token_ids)

    def logits(self, rollouts: Rollouts) -> Float[Tensor, "rollouts tokens vocabulary"]:
        """What every written token was drawn from: the logits of π, at the sampling temperature."""
        mask = torch.cat([rollouts.prompt_mask, torch.ones_like(rollouts.token_mask)], dim=1).long()
        first = rollouts.prompt_ids.shape[1] - 1  # The position that predicts the first written token.
        logits = self.model(
            input_ids=torch.cat([rollouts.prompt_ids, rollouts.token_ids], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=torch.arange(first, first + rollouts.token_ids.shape[1], device=mask.device),
            use_cache=False,
        ).logits
        return logits / self.temperature

    def _chat_ids(self, prompt: str) -> list[int]:
        def within_template(content: str) -> list[int]:
            said = [{"role": "user", "content": content}]
            return self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)

        whole = within_template(prompt)
        if len(whole) <= self.max_prompt_tokens:
            return whole
        room = self.max_prompt_tokens - len(within_template(""))
        if room < 1:
            raise ValueError(f"`max_prompt_tokens` {self.max_prompt_tokens} leaves no room in the chat template.")
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return within_template(self.tokenizer.decode(ids[:room]))

    def _sampling(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )


def token_log_probs(
    logits: Float[Tensor, "rollouts tokens vocabulary"], token_ids: Int[Tensor, "rollouts tokens"]
) -> Float[Tensor, "rollouts tokens"]:
    """The log-probability of each token under its logits."""
    losses = F.cross_entropy(
        rearrange(logits, "rollouts tokens vocabulary -> (rollouts tokens) vocabulary"),
        rearrange(token_ids, "rollouts tokens -> (rollouts tokens)"),
        reduction="none",
    )
    return -rearrange(losses, "(rollouts tokens) -> rollouts tokens", rollouts=len(token_ids))


def _joined(parts: list[Rollouts], end: int) -> Rollouts:
    """Rollouts below one another: prompts padded to the longest on the left, what was written on the right."""
    prompt, written = (max(part[i].shape[1] for part in parts) for i in (0, 2))
    sides = [(prompt, True, end), (prompt, True, False), (written, False, end), (written, False, False)]
    tensors = []
    for i, (width, left, filler) in enumerate(sides):
        gaps = [width - part[i].shape[1] for part in parts]
        padded = [F.pad(p[i], (gap, 0) if left else (0, gap), value=filler) for p, gap in zip(parts, gaps, strict=True)]
        tensors.append(torch.cat(padded))
    return Rollouts(*tensors, [text for part in parts for text in part.texts])


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """`generate` without the model's own generation settings: they bias what is sampled, unseen by `log_probs`."""
    base = getattr(model, "base_model", model)  # Of adapters, whose wrapper hands its own settings on.
    owners = [each for each in (model, getattr(base, "model", None)) if hasattr(each, "generation_config")]
    own = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, settings in zip(owners, own, strict=True):
            owner.generation_config = settings
