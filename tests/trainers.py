"""What trainers ask of a reward: from their source where they are installed, else as was read in a stated version."""

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

VERSIONS = {"verl": "0.9.1", "openrlhf": "0.11.2", "verifiers": "0.4.0"}
"""In which all this was read."""

VERL_SAMPLE = {"data_source", "solution_str", "ground_truth", "extra_info"}
"""Keywords of the call of a custom reward function, one sample: experimental/reward_loop/reward_manager/naive.py."""
VERL_BATCH = {"data_sources", "solution_strs", "ground_truths", "extra_infos"}
"""Of a whole batch: workers/reward_manager/batch.py."""
VERL_OPTIONS = {
    "data.train_files": "str",
    "data.val_files": "str",
    "data.train_batch_size": "int",
    "data.val_batch_size": "NoneType",
    "data.max_prompt_length": "int",
    "data.max_response_length": "int",
    "algorithm.adv_estimator": "str",
    "actor_rollout_ref.model.path": "str",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "int",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "NoneType",
    "actor_rollout_ref.actor.use_kl_loss": "bool",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": "NoneType",
    "actor_rollout_ref.rollout.name": "str",
    "actor_rollout_ref.rollout.n": "int",
    "actor_rollout_ref.rollout.temperature": "float",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "NoneType",
    "actor_rollout_ref.rollout.val_kwargs.do_sample": "bool",
    "actor_rollout_ref.rollout.val_kwargs.temperature": "int",
    "actor_rollout_ref.rollout.val_kwargs.n": "int",
    "reward.custom_reward_function.path": "NoneType",
    "reward.custom_reward_function.name": "str",
    "trainer.project_name": "str",
    "trainer.experiment_name": "str",
    "trainer.logger": "list",
    "trainer.n_gpus_per_node": "int",
    "trainer.test_freq": "int",
    "trainer.total_training_steps": "NoneType",
}
"""Options and the types of their defaults: trainer/config/_generated_ppo_trainer.yaml."""

OPENRLHF_REWARD = ["queries", "prompts", "labels"]
"""Positions of the call of a reward function, one sample: utils/agent.py."""
OPENRLHF_EXECUTE = ["prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "llm_engine", "images"]
"""Of `AgentExecutorBase.execute`: utils/agent.py."""
OPENRLHF_READ = {"rewards", "scores", "extra_logs"}
"""Keys that are read of what a reward function returns: utils/agent.py."""
OPENRLHF_OPTIONS = {
    "actor.gradient_checkpointing_enable",
    "actor.model_name_or_path",
    "actor.num_gpus_per_node",
    "actor.num_nodes",
    "algo.advantage.estimator",
    "algo.kl.init_coef",
    "data.input_key",
    "data.max_len",
    "data.prompt_dataset",
    "ds.enable_sleep",
    "ref.num_gpus_per_node",
    "ref.num_nodes",
    "reward.clip_range",
    "reward.remote_url",
    "rollout.batch_size",
    "rollout.max_new_tokens",
    "rollout.micro_batch_size",
    "rollout.n_samples_per_prompt",
    "rollout.temperature",
    "train.agent_func_path",
    "train.batch_size",
    "train.colocate_all",
    "train.micro_batch_size",
    "vllm.enable_sleep",
    "vllm.gpu_memory_utilization",
    "vllm.num_engines",
}
"""Options: cli/train_ppo_ray.py; only those that we use."""

VERIFIERS_ARGUMENTS = {"task", "trace", "runtime"}
"""Names by which a reward's arguments are given: v1/task.py."""
VERIFIERS_TRACE = {"id", "task", "assistant_messages"}
"""What we read of a trace: v1/trace.py."""


def source(package: str, name: str) -> Path | None:
    """A file of an installed package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    places = [] if spec is None else spec.submodule_search_locations
    return next((Path(place) / name for place in places if (Path(place) / name).exists()), None)


def calls_of(path: Path, name: str) -> list[ast.Call]:
    """Every call of `self.NAME` in a file, and of a function that is handed it with its arguments."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    own = [call for call in calls if len(call.args) + len(call.keywords) > 1]
    return [call for call in own if f"self.{name}" in map(ast.unparse, [call.func, *call.args[:1]])]


def options_of(path: Path) -> set[str]:
    """Names of the options of an argument parser."""
    return set(re.findall(r"add_argument\(\s*f?\"--([\w.]+)\"", path.read_text(encoding="utf-8")))


def openrlhf_agent() -> types.ModuleType:
    """`openrlhf.utils.agent`: the installed one without the rest of its package, or one that keeps its contract."""
    path = source("openrlhf", "utils/agent.py")
    for name, place in (("openrlhf", None), ("openrlhf.utils", "utils")):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [] if path is None else [str(path.parents[1] / (place or ""))]
    if path is not None:
        return importlib.import_module("openrlhf.utils.agent")
    module = sys.modules["openrlhf.utils.agent"] = types.ModuleType("openrlhf.utils.agent")
    module.SingleTurnAgentExecutor = _SingleTurn
    return module


class _SingleTurn:
    """What `SingleTurnAgentExecutor` does where it is given no reward."""

    def __init__(self, remote_rm_url=None):
        assert remote_rm_url is None

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        asked = hf_tokenizer(text=prompt, add_special_tokens=False, return_tensors="pt")["input_ids"][0].tolist()
        written = (await llm_engine.generate(asked, sampling_params, multi_modal_data=None)).outputs[0].token_ids
        tokens = asked + written
        ranges = [(len(asked), len(tokens))]
        return {"observation_tokens": tokens, "action_ranges": ranges, "reward": None, "scores": None, "extra_logs": {}}
