"""From the settings of a run to the GRPOConfig of TRL that means the same."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import trl
import yaml
from trl import GRPOConfig

from dpg.settings import Settings

OURS = frozenset(
    "output_dir max_steps num_train_epochs num_iterations generation_batch_size steps_per_generation shuffle_dataset "
    "num_generations_eval eval_strategy eval_on_start do_eval logging_strategy logging_steps logging_first_step "
    "save_strategy save_steps save_total_limit save_only_model resume_from_checkpoint ignore_data_skip data_seed "
    "load_best_model_at_end auto_find_batch_size sync_ref_model use_adaptive_entropy model_init_kwargs "
    "remove_unused_columns reward_weights warmup_steps warmup_ratio deepspeed fsdp fsdp_config".split()
)
"""Fields besides those of settings that options may not change: the run's own bookkeeping relies on them."""

ALIKE = {
    # One denominator for all tokens of a step, so that neither micro-batches nor processes weigh some tokens more.
    "loss_type": "dapo",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
    "use_bias_correction_kl": False,
    "mask_truncated_completions": False,
    "top_p": 1.0,
    "top_k": 0,
    "ddp_find_unused_parameters": False,
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
}
"""What makes TRL do as `dpg.loop` does; options may change it."""


def grpo_config(settings: Settings, output_dir: Path, num_processes: int, options: Mapping[str, Any]) -> GRPOConfig:
    """The configuration of a run.

    Args:
        options: fields of GRPOConfig that no setting stands for.

    Raises:
        ValueError: for a setting that TRL cannot carry out, or an option that is not TRL's or is a setting's.
    """
    _refuse_settings(settings)
    of_settings = {
        **_batches(settings, num_processes),
        **_learning_rate(settings),
        "max_steps": settings.num_steps * settings.updates_per_step,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "beta": settings.kl_coefficient,
        "epsilon": settings.clip_range,
        "scale_rewards": "group" if settings.normalize_groups else "none",
        "seed": settings.seed,
        "report_to": settings.track,
        "use_cpu": settings.device == "cpu",
    }
    if settings.entropy_coefficient > 0:
        of_settings["entropy_coef"] = settings.entropy_coefficient
    own = {
        "output_dir": str(output_dir),
        "run_name": output_dir.parent.name,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "save_total_limit": 2,  # The one before the newest, for a kill before it is known that the newest is whole.
    }
    _refuse_options(options, of_settings)
    return GRPOConfig(**{**_known(ALIKE), **options, **of_settings, **own})


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: if it is not there, or holds no names of fields.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--trl-config {path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"--trl-config {path} must hold fields of GRPOConfig, as `use_vllm: true`.")
    return content


def _refuse_settings(settings: Settings) -> None:
    """What TRL has no place for."""
    if settings.device not in ("cpu", "cuda"):
        raise ValueError(
            f"device={settings.device}: accelerate places TRL's models. Pass cpu or cuda, and choose the GPUs by "
            "CUDA_VISIBLE_DEVICES."
        )
    if settings.sampling_dtype is not None:
        raise ValueError(
            f"sampling_dtype={settings.sampling_dtype} is for the built-in sampler. Pass --set sampling_dtype=none, "
            "and `bf16: true` in a --trl-config to compute in bfloat16 throughout."
        )
    if settings.kl_coefficient > 0 and settings.lora_rank is None and settings.generator.endswith(".gguf"):
        raise ValueError(
            "TRL reads the reference of the KL penalty from a folder, and the generator is a .gguf file. Pass "
            "kl_coefficient=0, or lora_rank, with which the adapters are left out instead."
        )


def _batches(settings: Settings, num_processes: int) -> dict[str, Any]:
    """Each step's texts, shared out to processes, updates and micro-batches.

    Raises:
        ValueError: if they cannot be shared out evenly.
    """
    texts, shares = settings.prompts_per_step * settings.group_size, num_processes * settings.updates_per_step
    size = texts // shares
    micro = min(settings.policy_microbatch_size or size, size)
    if texts % shares != 0 or micro < 1 or size % micro != 0:
        raise ValueError(
            f"TRL cannot share {texts} texts a step evenly among {num_processes} processes, "
            f"{settings.updates_per_step} updates (`updates_per_step`) and micro-batches of "
            f"{settings.policy_microbatch_size or 'any number of'} texts (`policy_microbatch_size`). "
            "Change one of them."
        )
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": size // micro,
        "steps_per_generation": size // micro * settings.updates_per_step,
        "num_generations": settings.group_size,
    }


def _learning_rate(settings: Settings) -> dict[str, Any]:
    """Linear from the first to the last rate, or constant."""
    first, last = settings.learning_rate, settings.final_learning_rate
    if last is None or last == first:
        return {"learning_rate": first, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
    if last > first:
        raise ValueError(f"TRL's schedules fall: final_learning_rate {last} must be at most learning_rate {first}.")
    falling = {"lr_end": last, "power": 1.0}
    return {"learning_rate": first, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": falling}


def _refuse_options(options: Mapping[str, Any], of_settings: Mapping[str, Any]) -> None:
    names = {field.name for field in fields(GRPOConfig)}
    for name in options:
        if name not in names:
            raise ValueError(f"--trl-config: GRPOConfig of TRL {trl.__version__} has no field {name!r}.")
        if name in of_settings or name == "entropy_coef":
            raise ValueError(f"--trl-config: {name} is decided by the settings of the run. Change those with --set.")
        if name in OURS:
            raise ValueError(f"--trl-config: {name} cannot be changed in a run of dpg, which keeps its own books.")
    if "entropy_coef" in of_settings and "entropy_coef" not in names:
        raise ValueError(f"TRL {trl.__version__} has no entropy bonus. Pass entropy_coefficient=0, or install 1.16.0.")


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this TRL has; an older one does as they say without them."""
    names = {field.name for field in fields(GRPOConfig)}
    return {name: value for name, value in values.items() if name in names}
