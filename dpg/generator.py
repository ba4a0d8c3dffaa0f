"""The language model that writes the texts: batched sampling, and the log-probability of what it wrote."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpg.sampling import draw


class Rollouts(NamedTuple):
    """Sampled continuations; the continuations of one prompt stand together.

    Attributes:
        prompt_ids: prompts padded on the left.
        prompt_mask: False at their padding.
        token_ids: what was written, its end token included.
        token_mask: False after the end token.
        log_probs: log π of every written token, in the precision it was drawn in; 0 after the end token.
        texts: what was written, decoded.
    """

    prompt_ids: Int[Tensor, "rollouts prompt"]
    prompt_mask: Bool[Tensor, "rollouts prompt"]
    token_ids: Int[Tensor, "rollouts tokens"]
    token_mask: Bool[Tensor, "rollouts tokens"]
    log_probs: Float[Tensor, "rollouts tokens"]
    texts: list[str]

    def rows(self, chosen: Int[Tensor, " chosen"]) -> "Rollouts":
        """Some of the rollouts, without the padding that all of them share."""
        prompt, written = (int(mask[chosen].sum(dim=1).max()) for mask in (self.prompt_mask, self.token_mask))
        prompts = (tensor[chosen, -prompt:] for tensor in self[:2])
        tokens = (tensor[chosen, :written] for tensor in self[2:5])
        return Rollouts(*prompts, *tokens, [self.texts[i] for i in chosen.tolist()])


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
            read = self.tokenizer(prompts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
            rows = [ids[: self.max_prompt_tokens] for ids in read["input_ids"]]
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
        end, device, dtype = self.tokenizer.eos_token_id, self.model.device, self.sampling_dtype
        prompts = list(dict.fromkeys(map(tuple, rows)))  # What several rows continue is read once.
        longest = max(map(len, rows))
        padded = torch.tensor([[end] * (longest - len(ids)) + [*ids] for ids in prompts], device=device)
        lengths = torch.tensor([[len(ids)] for ids in prompts], device=device)
        mask = torch.arange(longest, device=device) >= longest - lengths
        places = {ids: place for place, ids in enumerate(prompts)}
        owners = torch.tensor([places[tuple(ids)] for ids in rows], device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            written, log_probs = draw(
                self.model,
                padded,
                mask,
                owners,
                num_tokens=self.max_new_tokens,
                end=end,
                temperature=self.temperature,
            )
        ended = (written == end).long()
        alive = ended.cumsum(dim=1) - ended == 0  # Up to and including the first end token.
        texts = self.tokenizer.batch_decode(
            [ids[:length] for ids, length in zip(written.tolist(), alive.sum(dim=1).tolist(), strict=True)],
            skip_special_tokens=True,
        )
        return Rollouts(padded[owners], mask[owners], written, alive, log_probs, texts)

    def log_probs(self, rollouts: Rollouts) -> Float[Tensor, "rollouts tokens"]:
        """log π of every written token, given the prompt and what came before."""
        return token_log_probs(self.logits(rollouts), rollouts.token_ids)

    def logits(self, rollouts: Rollouts) -> Float[Tensor, "rollouts tokens vocabulary"]:
        """What every written token was drawn from: the logits of π, at the sampling temperature."""
        read = rollouts.token_ids[:, :-1]  # Nothing is predicted from the last one.
        mask = torch.cat([rollouts.prompt_mask, torch.ones_like(read, dtype=torch.bool)], dim=1).long()
        logits = self.model(
            input_ids=torch.cat([rollouts.prompt_ids, read], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=rollouts.token_ids.shape[1],
            use_cache=False,
        ).logits
        return logits if self.temperature == 1 else logits / self.temperature

    def cut(self, prompt: str) -> str:
        """The part of a prompt that is read, as text; in a chat, of what the user says.

        A tokenizer may split the cut text elsewhere than the whole one: never into more than `max_prompt_tokens`.
        """
        if self.chat:
            return self._said(prompt)
        ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        if len(ids) <= self.max_prompt_tokens:
            return prompt
        for length in range(self.max_prompt_tokens, 0, -1):
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # No character is cut.
            if text and whole and len(self.tokenizer(text, verbose=False)["input_ids"]) <= self.max_prompt_tokens:
                return text
        raise ValueError(f"`max_prompt_tokens` {self.max_prompt_tokens} leaves nothing of the prompt {prompt!r}.")

    def _chat_ids(self, prompt: str) -> list[int]:
        return self._within_template(self._said(prompt))

    def _said(self, prompt: str) -> str:
        """As much of a prompt as fits into the chat template."""
        if len(self._within_template(prompt)) <= self.max_prompt_tokens:
            return prompt
        room = self.max_prompt_tokens - len(self._within_template(""))
        if room < 1:
            raise ValueError(f"`max_prompt_tokens` {self.max_prompt_tokens} leaves no room in the chat template.")
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return self.tokenizer.decode(ids[:room])

    def _within_template(self, content: str) -> list[int]:
        said = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)


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
    prompts, tokens = [(prompt, True, end), (prompt, True, False)], [(written, False, end), (written, False, False)]
    sides = [*prompts, *tokens, (written, False, 0.0)]
    tensors = []
    for i, (width, left, filler) in enumerate(sides):
        gaps = [width - part[i].shape[1] for part in parts]
        padded = [F.pad(p[i], (gap, 0) if left else (0, gap), value=filler) for p, gap in zip(parts, gaps, strict=True)]
        tensors.append(torch.cat(padded))
    return Rollouts(*tensors, [text for part in parts for text in part.texts])
