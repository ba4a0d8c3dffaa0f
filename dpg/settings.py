"""Every number that decides a run, in one flat place: what `--set` changes and `config.json` holds."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """A run's settings. Lengths are in tokens, sizes in texts.

    Args:
        generator, target: a folder in Hugging Face format, a hub name, or "embedded" for the models of the package.
        prompts: a text file (one prompt a line), a JSON-lines file or hub data set with a `prompt` or `text` column, or
            "embedded" for held-out passages of the standard library's documentation.
        seed: of everything random.
        inner_*: the target's training; `inner_lr`, `inner_eps_root` and so on are those of `metagrad.optim.adamw`.
        dataset_texts: texts written at the end, and the size of each control of `dpg verify`.
        checkpoint_every: GRPO steps between checkpoints.
        The others: see `Generator`, `Target`, `GrpoConfig` and `Validation`.
    """

    generator: str = "embedded"
    target: str = "embedded"
    prompts: str = "embedded"
    seed: int = 0
    max_prompt_tokens: int = 8
    max_new_tokens: int = 32
    temperature: float = 1.0
    inner_lr: float = 1e-4
    inner_beta1: float = 0.9
    inner_beta2: float = 0.95
    inner_eps: float = 1e-8
    inner_eps_root: float = 1e-3
    inner_weight_decay: float = 0.0
    inner_batch_size: int = 256
    sequence_length: int = 48
    train_eos: bool = True
    strength: float = 2e5
    cross_group: bool = True
    num_steps: int = 70
    prompts_per_step: int = 64
    group_size: int = 4
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    updates_per_step: int = 4
    clip_range: float = 0.2
    kl_coefficient: float = 0.03
    max_grad_norm: float = 1.0
    normalize_groups: bool = True
    validation_texts: int = 1024
    validate_every: int = 10
    dataset_texts: int = 1024
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        for name in ("dataset_texts", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Pass at least 1.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}. Pass 0 or more.")
        for name in ("inner_lr", "learning_rate", "final_learning_rate", "clip_range", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}. Pass a number above 0.")
        for name in ("inner_eps", "inner_weight_decay", "kl_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}. Pass a number of at least 0.")

    def override(self, assignments: list[str]) -> "Settings":
        """These settings with `key=value` assignments applied.

        Raises:
            ValueError: for an unknown key or a value of the wrong type.
        """
        types = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        changes: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or key not in types:
                raise ValueError(f"--set {assignment}: expected key=value with one of the keys {', '.join(types)}.")
            try:
                changes[key] = _parse(text, types[key])
            except ValueError:
                raise ValueError(f"--set {assignment}: {key} must be of type {types[key].__name__}.") from None
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)


def _parse(text: str, kind: type) -> Any:
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
