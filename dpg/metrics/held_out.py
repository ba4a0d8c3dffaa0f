"""How well a target model predicts texts that it was not trained on, as a metric."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpg.metrics.metric import Bound, Params, TargetMetric
from dpg.text import IGNORED, Batch, rows


@dataclass(frozen=True, eq=False)
class HeldOutLoss(TargetMetric):
    """The target's loss on held-out texts, as a metric that is higher for better targets [thrush2026].

        Φ = − Σ over texts and scored tokens of CE(token | the tokens before it) / number of scored tokens

    in nats per token. Scored are all tokens of a text that follow another one (a first token only if the tokenizer puts
    a begin token before it); with `last_word` those of the last word alone, as LAMBADA asks: what stands before the
    last blank is context; with `whole` a text from its beginning, behind a begin token, to its end token. The authors
    divide by the number of texts times 128 instead, which multiplies Φ and all rewards by one constant.

    Args:
        texts: held-out texts.
        test_texts: other texts on which the figures are also taken, as `test_loss`.
        last_word: score the last word only.
        whole: score how a text begins and ends too.
        sequence_length: most tokens of a text, where the model itself has no limit.
        microbatch_size: texts evaluated at a time. Where there are more, each microbatch is evaluated twice, and no
            more than one is in memory.

    Raises:
        ValueError: for no texts, or with `last_word` a text of a single word. `bind` raises it for texts that are too
            long, or of whose tokens none can be scored, or one is unknown to the tokenizer.
    """

    texts: list[str] = field(repr=False)
    test_texts: list[str] = field(default_factory=list, repr=False)
    last_word: bool = False
    whole: bool = False
    sequence_length: int | None = None
    microbatch_size: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or not self.texts:
            raise ValueError(f"the held-out texts must be a list of at least one string, but are {self.texts!r}.")
        if self.last_word and (short := [text for text in self.texts if len(text.split()) < 2]):
            raise ValueError(
                f"the held-out text {short[0]!r} has no word before its last one, so nothing to predict it from. "
                "Leave such texts out, or score all tokens with `last_word=False`."
            )
        if self.last_word and self.whole:
            raise ValueError("`last_word` and `whole` contradict each other. Pass one of them.")
        if self.microbatch_size < 1:
            raise ValueError(f"`microbatch_size` is {self.microbatch_size}. Pass at least 1.")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError(f"`sequence_length` is {self.sequence_length}. Pass at least 2.")

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bound:
        data = {key: value.to(model.device) for key, value in self._encode(model, tokenizer).items()}
        chunks = [rows(data, chosen) for chosen in data["index"].split(self.microbatch_size)]
        test = None
        if self.test_texts:
            test = replace(self, texts=self.test_texts, test_texts=[]).bind(model, tokenizer)
        num_scored = int((data["labels"] != IGNORED).sum())

        def part(params: Params, chunk: Batch) -> Float[Tensor, ""]:
            losses = F.cross_entropy(*_predictions(model, params, chunk), ignore_index=IGNORED, reduction="sum")
            return -losses / num_scored

        def phi(params: Params) -> Float[Tensor, ""]:
            if len(chunks) == 1:
                return part(params, chunks[0])
            # Recomputed in the backward pass, so that the activations of one microbatch are alive at a time.
            options = {"use_reentrant": False, "preserve_rng_state": False}
            return torch.stack([checkpoint(part, params, chunk, **options) for chunk in chunks]).sum()

        @torch.no_grad()
        def measure(params: Params) -> dict[str, float]:
            found = {"held_out_loss": -float(phi(params))}
            if self.last_word:
                right = sum(int(_all_greedy(*_predictions(model, params, chunk)).sum()) for chunk in chunks)
                found["last_word_accuracy"] = right / len(self.texts)
            if test is not None:
                found |= {name.replace("held_out", "test"): value for name, value in test.measure(params).items()}
            return found

        return Bound(phi, measure)

    def _encode(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Batch:
        """`input_ids` padded on the right, `attention_mask`, `labels` at the scored tokens, and `index`."""
        found = [self._ids(text, tokenizer) for text in self.texts]
        limits = [getattr(model.config, "max_position_embeddings", None), self.sequence_length]
        limit = min((each for each in limits if each), default=None)
        for text, (ids, first) in zip(self.texts, found, strict=True):
            problem = None
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                problem = f"holds something that the tokenizer does not know: {tokenizer.decode(ids)!r}"
            elif first >= len(ids):
                problem = f"has {len(ids)} tokens, which leaves none to predict from another"
            elif limit and len(ids) > limit:
                problem = f"has {len(ids)} tokens, but the model or `sequence_length` allows {limit}"
            if problem:
                raise ValueError(f"the held-out text {text[:80]!r} {problem}. Leave it out or change it.")
        longest = max(len(ids) for ids, _ in found)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in found])
        lengths = rearrange(torch.tensor([len(ids) for ids, _ in found]), "texts -> texts 1")
        starts = rearrange(torch.tensor([first for _, first in found]), "texts -> texts 1")
        at = torch.arange(longest)
        return {
            "input_ids": padded,
            "attention_mask": (at < lengths).long(),
            "labels": padded.masked_fill((at < starts) | (at >= lengths), IGNORED),
            "index": torch.arange(len(found)),
        }

    def _ids(self, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
        """A text's tokens and the place of the first that is scored."""
        if self.whole:
            end = tokenizer.eos_token_id
            begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids = _tokens(text, tokenizer)
            return [*([] if ids[:1] == [begin] else [begin]), *ids, end], 1
        if not self.last_word:
            return _tokens(text, tokenizer), 1
        context, word = text.rsplit(maxsplit=1)
        whole, before = _tokens(f"{context} {word}", tokenizer), _tokens(context, tokenizer)
        # Where a token spans the boundary, it belongs to the word.
        shared = next((i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), len(before))
        return whole, max(shared, 1)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # Some tokenizers end a text themselves.


def _predictions(
    model: PreTrainedModel, params: Params, batch: Batch
) -> tuple[Float[Tensor, "texts vocabulary tokens"], Int[Tensor, "texts tokens"]]:
    """Logits of the tokens from the second on, and these tokens where they are scored."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = functional_call(model, params, (), {**inputs, "use_cache": False}).logits
    return rearrange(logits[:, :-1], "texts tokens vocabulary -> texts vocabulary tokens"), batch["labels"][:, 1:]


def _all_greedy(
    logits: Float[Tensor, "texts vocabulary tokens"], labels: Int[Tensor, "texts tokens"]
) -> Bool[Tensor, " texts"]:
    """Whether each scored token of a text is the likeliest one."""
    return ((logits.argmax(dim=1) == labels) | (labels == IGNORED)).all(dim=1)
