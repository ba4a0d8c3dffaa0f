"""Every number that decides a run but the goal's own, in one flat place: what presets and `--set` change."""

import math
from dataclasses import asdict, dataclass
from typing import Any

REWARDS = ("metagradient", "naive", "shuffled", "random", "edit-distance", "embedding", "identifier")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


@dataclass(frozen=True)
class Settings:
    """A run's settings. Lengths are in tokens, sizes in texts.

    Args:
        generator, target: a folder in Hugging Face format, a hub name, "embedded" for the models of the package, or
            "multilingual" for those that `dpg.pretrain` makes of manuals in five languages, once and in minutes. A
            generator "target" is a copy of the target's model.
        prompts: a text file (one prompt a line), a JSON-lines file or hub data set with a `prompt` or `text` column, or
            "embedded" for held-out passages of the standard library's documentation, or "multilingual" for held-out
            English ones of the manuals.
        instruction: stands before every prompt.
        chat: put prompts into the generator's chat template, as what a user says.
        device: where both models live, as torch names it.
        seed: of everything random.
        reward: how texts are scored. "metagradient" is the method; "naive", "edit-distance", "embedding" and
            "identifier" are what it is compared with, "shuffled" (metagradients dealt at random) and "random" controls.
        inner_*: the target's training; `inner_lr`, `inner_eps_root` and so on are those of `metagrad.optim.adamw`, or
            `inner_lr` and `inner_weight_decay` those of `metagrad.optim.sgd`.
        lora_rank, lora_alpha: train low-rank adapters of all linear layers of the generator instead of its weights,
            scaled by alpha / rank [hu2021]; the run saves merged weights. None trains the weights themselves.
        generation_batch_size, sampling_dtype: `batch_size` and `sampling_dtype` of `Generator`.
        policy_microbatch_size: `microbatch_size` of `GrpoConfig`.
        untie_head: give the target a head of its own if it is tied to the embedding.
        dataset_texts: texts written at the end, and the size of each control of `dpg verify`.
        checkpoint_every: GRPO steps between checkpoints.
        track: where figures are shown besides `metrics.jsonl`.
        The others: see `Generator`, `Target`, `GrpoConfig` and `Validation`.

    Raises:
        ValueError: for a value that cannot work.
    """

    generator: str = "embedded"
    target: str = "embedded"
    prompts: str = "embedded"
    instruction: str = ""
    chat: bool = False
    device: str = "cpu"
    seed: int = 0
    reward: str = "metagradient"
    cross_group: bool = True
    max_prompt_tokens: int = 8
    max_new_tokens: int = 32
    temperature: float = 1.0
    generation_batch_size: int | None = None
    sampling_dtype: str | None = None
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    inner_optimizer: str = "adamw"
    inner_lr: float = 1e-4
    inner_beta1: float = 0.9
    inner_beta2: float = 0.95
    inner_eps: float = 1e-8
    inner_eps_root: float = 1e-3
    inner_weight_decay: float = 0.0
    inner_clip_norm: float | None = None
    inner_batch_size: int = 256
    inner_microbatch_size: int | None = None
    untie_head: bool = False
    sequence_length: int = 48
    loss_denominator: float | None = None
    train_eos: bool = True
    train_bos: bool = False
    num_steps: int = 70
    prompts_per_step: int = 64
    group_size: int = 4
    learning_rate: float = 1e-3
    final_learning_rate: float | None = 1e-4
    updates_per_step: int = 4
    clip_range: float = 0.2
    kl_coefficient: float = 0.03
    entropy_coefficient: float = 0.0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    normalize_groups: bool = True
    policy_microbatch_size: int | None = None
    validation_texts: int = 1024
    validate_every: int = 10
    dataset_texts: int = 1024
    checkpoint_every: int = 5
    track: str = "none"

    def __post_init__(self) -> None:
        for name in ("dataset_texts", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Pass at least 1.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}. Pass 0 or more.")
        for name in ("inner_lr", "learning_rate", "final_learning_rate", "clip_range", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}. Pass a number above 0.")
        rates = ("inner_eps", "inner_eps_root", "inner_weight_decay", "weight_decay")
        for name in (*rates, "kl_coefficient", "entropy_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}. Pass a number of at least 0.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}. Pass at least 1, or none.")
        choices = {
            "reward": REWARDS,
            "inner_optimizer": ("adamw", "sgd"),
            "sampling_dtype": (None, "bfloat16", "float16"),
            "track": TRACKERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Choose from: {', '.join(map(str, allowed))}.")

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)
