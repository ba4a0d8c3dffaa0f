"""A reward of this package as one of TRL's reward functions: the whole generation batch at once, in any processes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from dpg.grpo import reward_spread
from dpg.reward import Reward, Scores
from dpg.trl.processes import from_first, gathered, rank


class Scored(NamedTuple):
    """A generation batch and what its texts are worth."""

    texts: list[str]
    scores: Scores
    num_tokens: int


class _Part(NamedTuple):
    """What one process sees of a generation batch."""

    prompts: list[str]
    texts: list[str]
    num_tokens: int


class _Outcome(NamedTuple):
    """What every process is told: rewards, in TRL's units and raw, and figures to log."""

    rewards: list[float]
    raw: list[float]
    figures: dict[str, float]


def _nothing(scored: Scored) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class RewardFunction:
    """What `GRPOTrainer(reward_funcs=...)` takes: rewards in units of their standard deviation over the batch.

    TRL adds 1e-4 to the standard deviation that it divides a group's advantages by. Raw metagradients may be as small
    as 1e-9, and would vanish beside it; in units of the batch's own spread it matters by a ten-thousandth.

    The texts of all processes are gathered, and the first process scores them together: it alone needs room for a
    target. Φ (`phi`) and the raw spread (`raw_reward_std`) go to TRL's logs, each text's raw reward (`raw_reward`) to
    its table of completions.

    Args:
        reward: how texts are scored. One that is `groupless` needs `GrouplessGRPOTrainer`.
        num_generations: texts of each prompt, as in `GRPOConfig`; None for the largest number that fits the prompts of
            the batch, which is too large only where neighbouring prompts are equal.
        num_generations_eval: the same for evaluation batches, if it differs.
        observe: called in the first process with every batch; what it returns is logged too.

    Raises:
        ValueError: when called, for texts of a prompt that do not stand together, completions that are not one text
            each, a batch of one text, rewards that are not finite, or rewards that are all 0. Whatever `reward`
            raises is raised too. In every other process an `OtherProcessError`: nothing waits, no number is made up.
    """

    reward: Reward
    num_generations: int | None = None
    num_generations_eval: int | None = None
    observe: Callable[[Scored], Mapping[str, float]] = _nothing

    def __post_init__(self) -> None:
        for name in ("num_generations", "num_generations_eval"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"`{name}` is {size}. Pass at least 1, or None.")

    @property
    def __name__(self) -> str:  # What TRL calls its figures by.
        return type(self.reward).__name__

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One reward for each completion of this process; other columns of the data set are not looked at."""
        parts = gathered(lambda: _part(prompts, completions, completion_ids))
        outcome = from_first(lambda: self._score(parts))
        first = sum(len(part.texts) for part in parts[: rank()])
        mine = slice(first, first + len(completions))
        if log_extra is not None:
            log_extra("raw_reward", outcome.raw[mine])
        if log_metric is not None and rank() == 0:  # TRL averages over the processes that log.
            for name, value in outcome.figures.items():
                log_metric(name, value)
        return outcome.rewards[mine]

    def _score(self, parts: list[_Part]) -> _Outcome:
        """In the first process: the rewards of a whole batch."""
        texts = [text for part in parts for text in part.texts]
        if len(texts) < 2:
            raise ValueError(
                f"a batch of {len(texts)} text has no spread to measure rewards by. Raise `per_device_eval_batch_size`."
            )
        sizes = [size for size in (self.num_generations, self.num_generations_eval) if size is not None]
        scores = self.reward.score(texts, group_size([prompt for part in parts for prompt in part.prompts], sizes))
        rewards = scores.rewards.double()
        spread = reward_spread(rewards)
        # Where all are equal, whatever they are divided by, each text's advantage is 0.
        in_units = rewards / (spread if spread > 0 else rewards.abs())
        figures = {"raw_reward_std": float(spread)} | ({} if scores.phi is None else {"phi": scores.phi})
        seen = self.observe(Scored(texts, scores, sum(part.num_tokens for part in parts)))
        return _Outcome(in_units.tolist(), rewards.tolist(), {**figures, **seen})


def group_size(prompts: Sequence[str], sizes: Iterable[int] = ()) -> int:
    """How many texts each prompt has, when `prompts` holds the prompt of every text.

    Args:
        sizes: what it may be, the likeliest first; if there are none, it is found in the prompts.

    Raises:
        ValueError: if texts of one prompt do not stand together in groups of such a size.
    """
    runs = [len(list(run)) for _, run in groupby(prompts)]
    for size in sizes:
        if all(run % size == 0 for run in runs):
            return size
    if sizes:
        raise ValueError(
            f"{len(prompts)} texts whose prompts change after {runs} texts are no groups of "
            f"{' or '.join(map(str, sizes))}. Keep the texts of a prompt together, and pass `num_generations` and "
            "`num_generations_eval` as to GRPOConfig."
        )
    found = math.gcd(*runs)
    if found == 1 and len(set(prompts)) < len(runs):
        raise ValueError(
            f"the {len(set(prompts))} prompts of {len(prompts)} texts change after {runs} texts: the texts of a prompt "
            "must stand together, as GRPOTrainer puts them. If the data set holds a prompt twice, pass "
            "`num_generations`."
        )
    return found


def text_of(completion: Any) -> str:
    """The text of a completion: a string, or the content of the one message of an assistant.

    Raises:
        ValueError: for anything else, as the messages of a model that uses tools.
    """
    if isinstance(completion, str):
        return completion
    messages = completion if isinstance(completion, list) else []
    content = messages[0].get("content") if len(messages) == 1 and isinstance(messages[0], dict) else None
    if isinstance(content, list) and all(isinstance(block, dict) and block.get("type") == "text" for block in content):
        return "".join(block["text"] for block in content)
    if not isinstance(content, str):
        raise ValueError(
            f"a completion must be a text or a list of one message with a text as its content, but is {completion!r}."
        )
    return content


def _part(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]) -> _Part:
    keys = [prompt if isinstance(prompt, str) else repr(prompt) for prompt in prompts]
    return _Part(keys, [text_of(completion) for completion in completions], sum(map(len, completion_ids)))
