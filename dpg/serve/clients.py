"""Reward functions for trainers that ask for one sample at a time; they ask the reward service.

This file, `ask.py` and `config.py` use the standard library alone: where `pip install --no-deps metagrad` is not wanted
either, copy the three as dpg/serve/ into a folder of PYTHONPATH (Python 3.11 or newer). docs/serve.md says how each
trainer is told to call which function.
"""

from typing import Any

from dpg.serve.ask import RewardError, Rollout, reward_of, rewards_of, wait
from dpg.serve.config import Config


async def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """verl: `reward.custom_reward_function`. `extra_info` needs `index`, the prompt's number, and may have `split`."""
    config, split = Config.from_environment(), str((extra_info or {}).get("split", "train"))
    return (await reward_of(Rollout(solution_str, _index(extra_info), split), config)).named(config.scale)


def compute_score_sync(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """verl: as `compute_score`, each call in a thread of its own. There must be as many threads as samples."""
    return wait(compute_score(data_source, solution_str, ground_truth, extra_info))


def compute_scores(
    data_sources: list[str], solution_strs: list[str], ground_truths: list[Any], extra_infos: list[dict[str, Any]]
) -> list[dict[str, float]]:
    """verl before 0.9 with `reward_manager: batch`: a whole batch at once."""
    config = Config.from_environment()
    answers = wait(rewards_of(list(solution_strs), [_index(info) for info in extra_infos], config))
    return [answer.named(config.scale) for answer in answers]


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """OpenRLHF: `--reward.remote_url`, which asks for one sample, in a thread. See docs/serve.md on how many wait."""
    if len(queries) != 1 or len(prompts) != 1:
        raise ValueError(f"expected one query and its prompt, as OpenRLHF 0.11 sends, but there are {len(queries)}.")
    config = Config.from_environment()
    query, prompt = queries[0], prompts[0]
    if not query.startswith(prompt):
        raise ValueError(f"the query {query[:80]!r} does not begin with its prompt {prompt[:80]!r}. Was it cut?")
    text = query[len(prompt) :]
    text = next((text.removesuffix(stop) for stop in config.stop if text.endswith(stop)), text)
    answer = wait(reward_of(Rollout(text, prompt), config))
    score = answer.score(config.scale)
    return {"rewards": score, "scores": score, "extra_logs": answer.figures()}


async def metagradient(trace: Any) -> float:
    """verifiers, and so prime-rl: a reward of a task, of the last thing that the model wrote."""
    config = Config.from_environment()
    written = [message.content or "" for message in trace.assistant_messages]
    if not written:
        raise RewardError(f"the rollout {trace.id} holds nothing that the model wrote.")
    answer = await reward_of(Rollout(written[-1], trace.task.key, id=trace.id), config)
    return answer.score(config.scale)


def _index(info: dict[str, Any] | None) -> str:
    if not info or "index" not in info:
        raise ValueError(
            "`extra_info` has no `index`, which says to which prompt a text was written. Give every row of the data "
            "set one: see docs/serve.md."
        )
    return str(info["index"])
