"""Group relative policy optimization [shao2024]: advantages within each prompt's group, clipped policy loss."""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class GrpoConfig:
    """How the generator is trained.

    Args:
        num_steps: GRPO steps.
        prompts_per_step: prompts sampled at each step.
        group_size: continuations of each prompt.
        learning_rate: of AdamW on the generator, at the first step.
        final_learning_rate: at the last step, linear in between; None to stay constant.
        updates_per_step: optimizer updates that share a step's rollouts.
        clip_range: how far a token's probability ratio may move the loss.
        kl_coefficient: weight of the penalty for leaving the initial generator; 0 keeps no copy of it.
        entropy_coefficient: weight of a bonus for the entropy of what the next token is drawn from.
        max_grad_norm: of the generator's gradient.
        weight_decay: of AdamW on the generator.
        microbatch_size: rollouts whose log-probabilities are computed at a time; None for all of an update. Changes
            memory, and no number but by rounding.
        normalize_groups: divide each group's advantages by their own standard deviation.
    """

    num_steps: int = 100
    prompts_per_step: int = 64
    group_size: int = 4
    learning_rate: float = 1e-3
    final_learning_rate: float | None = None
    updates_per_step: int = 1
    clip_range: float = 0.2
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    normalize_groups: bool = True
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"`group_size` is {self.group_size}; an advantage compares texts of one prompt. Pass >= 2."
            )
        if min(self.num_steps, self.prompts_per_step, self.updates_per_step) < 1:
            raise ValueError(
                f"`num_steps` {self.num_steps}, `prompts_per_step` {self.prompts_per_step} and `updates_per_step` "
                f"{self.updates_per_step} must be at least 1."
            )
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise ValueError(f"`microbatch_size` is {self.microbatch_size}. Pass at least 1, or None.")

    def check(self, prompts: list[str]) -> None:
        """Raise a ValueError if there are fewer `prompts` than a step draws."""
        if len(prompts) < self.prompts_per_step:
            raise ValueError(
                f"{len(prompts)} prompts were given to train on, but every step draws {self.prompts_per_step} of them. "
                "Give more, or a smaller `prompts_per_step`."
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if self.final_learning_rate is None or self.num_steps == 1:
            return self.learning_rate
        done = (step - 1) / (self.num_steps - 1)
        return self.learning_rate + done * (self.final_learning_rate - self.learning_rate)


def group_advantages(rewards: Float[Tensor, "prompts group"], *, normalize: bool) -> Float[Tensor, "prompts group"]:
    """Each reward minus the mean reward of its prompt, in units of the batch's spread.

    Rewards are first divided by their standard deviation over the whole batch: metagradients may be as small as 1e-9,
    and no epsilon may decide what they are worth.

    Args:
        normalize: also divide each group by its own standard deviation.

    Raises:
        ValueError: as `reward_spread`.
    """
    spread = reward_spread(rewards)
    if spread == 0:  # All texts are worth the same, as those of a generator that has learned one.
        return torch.zeros_like(rewards)
    centred = (rewards - reduce(rewards, "prompts group -> prompts 1", "mean")) / spread.to(rewards.dtype)
    if not normalize:
        return centred
    # A group whose rewards all agree has zero advantages, whatever its scale; 1e-6 is in units of the batch's spread.
    return centred / (centred.std(dim=1, keepdim=True) + 1e-6)


def reward_spread(rewards: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The standard deviation of a batch's rewards in float64; 0 where all texts are worth the same.

    Raises:
        ValueError: if a reward, or the deviation, is NaN or infinite, or all rewards are 0: then nothing that was
            written has anything to do with the metric.
    """
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"a reward is not finite: {rewards.flatten().tolist()[:10]}.")
    if not bool(rewards.any()):
        raise ValueError(
            f"all {rewards.numel()} rewards are 0: what was written has nothing to do with the metric. Is it about "
            "weights that these texts can move?"
        )
    spread = rewards.double().std()  # The square of a reward of 1e-20 is no float32.
    if not bool(torch.isfinite(spread)):
        raise ValueError(f"the rewards are too large for a standard deviation: {rewards.flatten().tolist()[:10]}.")
    return spread


def policy_loss(
    log_probs: Float[Tensor, "rollouts tokens"],
    old_log_probs: Float[Tensor, "rollouts tokens"],
    advantages: Float[Tensor, " rollouts"],
    mask: Bool[Tensor, "rollouts tokens"],
    clip_range: float,
) -> Float[Tensor, ""]:
    """The clipped surrogate, averaged over all written tokens: −mean min(ρA, clip(ρ, 1 ± clip_range)·A)."""
    ratio = (log_probs - old_log_probs).exp()
    advantage = rearrange(advantages, "rollouts -> rollouts 1")
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    return -_token_mean(surrogate, mask)


def kl_estimate(
    log_probs: Float[Tensor, "rollouts tokens"],
    reference: Float[Tensor, "rollouts tokens"],
    mask: Bool[Tensor, "rollouts tokens"],
) -> Float[Tensor, ""]:
    """KL(π ‖ reference) per token, by the estimator r − 1 − log r with r = reference / π [shao2024]: never negative."""
    log_ratio = reference - log_probs
    return _token_mean(log_ratio.exp() - 1 - log_ratio, mask)


def mean_entropy(
    logits: Float[Tensor, "rollouts tokens vocabulary"], mask: Bool[Tensor, "rollouts tokens"]
) -> Float[Tensor, ""]:
    """The entropy of the distribution of each token in nats, averaged over all written tokens."""
    return _token_mean(torch.special.entr(logits.softmax(dim=2)).sum(dim=2), mask)


def _token_mean(values: Float[Tensor, "rollouts tokens"], mask: Bool[Tensor, "rollouts tokens"]) -> Float[Tensor, ""]:
    return (values * mask).sum() / mask.sum()
