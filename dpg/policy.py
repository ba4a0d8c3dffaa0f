"""The generator as it learns: one step of policy optimization, and what a checkpoint of it holds."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

import metagrad as mg
from dpg.generator import Generator, Rollouts, token_log_probs
from dpg.grpo import GrpoConfig, kl_estimate, mean_entropy, policy_loss
from dpg.records import Checkpoint


@dataclass(frozen=True)
class Policy:
    """The generator, how it learns, and the frozen copy that it must not stray from (None without a KL penalty)."""

    generator: Generator
    reference: Generator | None
    optimizer: torch.optim.Optimizer
    config: GrpoConfig

    @classmethod
    def of(cls, generator: Generator, config: GrpoConfig) -> "Policy":
        """A policy that starts from `generator` as it is."""
        learned = [p for p in generator.model.parameters() if p.requires_grad]  # All, or those of an adapter.
        optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        penalized = config.kl_coefficient > 0
        reference = replace(generator, model=copy.deepcopy(generator.model)) if penalized else None
        return cls(generator, reference, optimizer, config)

    def improve(self, rollouts: Rollouts, advantages: Float[Tensor, " rollouts"], learning_rate: float) -> float:
        """One pass over the rollouts in `updates_per_step` optimizer steps; the mean KL to the reference.

        Raises:
            NonFiniteError: if the generator's gradient is NaN or infinite.
        """
        config, kls = self.config, []
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        lengths = rollouts.token_mask.sum(dim=1).cpu()
        updates = torch.randperm(len(lengths)).chunk(config.updates_per_step)
        size = config.microbatch_size or len(updates[0])
        by_length = lengths.argsort(stable=True).split(size)
        if self.generator.sampling_dtype is not None:  # A ratio compares what is trained with itself.
            rollouts = rollouts._replace(log_probs=_log_probs(self.generator, rollouts, by_length))
        start = None if self.reference is None else _log_probs(self.reference, rollouts, by_length)
        for chosen in updates:
            self.optimizer.zero_grad()
            num_tokens, kl_of_update = lengths[chosen].sum(), 0.0
            # Texts of like lengths together: less padding.
            in_order = chosen[lengths[chosen].argsort(stable=True)]
            for places in in_order.split(size):
                part = rollouts.rows(places)
                kept = None if start is None else start[places, : part.token_ids.shape[1]]
                loss, kl = self._loss(part, kept, advantages[places])
                share = lengths[places].sum() / num_tokens  # Losses are means over tokens.
                (share * loss).backward()
                kl_of_update += float(share * kl)
            kls.append(kl_of_update)
            norm = torch.nn.utils.clip_grad_norm_(self.generator.model.parameters(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise mg.NonFiniteError(
                    f"the generator's gradient is not finite (its loss is {float(loss.detach())}). Lower "
                    "`learning_rate` or raise `kl_coefficient`."
                )
            self.optimizer.step()
        return sum(kls) / len(kls)

    def _loss(
        self,
        part: Rollouts,
        start: Float[Tensor, "rollouts tokens"] | None,
        advantages: Float[Tensor, " rollouts"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The mean over the tokens of `part` of what is minimised, and of the KL to the reference.

        Args:
            start: the reference's log-probabilities; None without a KL penalty.
        """
        config, kl = self.config, torch.zeros(())
        logits = self.generator.logits(part)
        log_probs = token_log_probs(logits, part.token_ids)
        loss = policy_loss(log_probs, part.log_probs, advantages, part.token_mask, config.clip_range)
        if start is not None:
            kl = kl_estimate(log_probs, start, part.token_mask)
            loss = loss + config.kl_coefficient * kl
        if config.entropy_coefficient > 0:
            loss = loss - config.entropy_coefficient * mean_entropy(logits, part.token_mask)
        return loss, kl.detach()

    def checkpoint(self, step: int) -> Checkpoint:
        """What `restore` needs to go on after `step`; a copy, which further training leaves alone."""
        state = {"generator": self.generator.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        device = self.generator.model.device
        drawn = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return Checkpoint(step=step, rng=torch.get_rng_state(), device_rng=drawn, **copy.deepcopy(state))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put generator, optimizer and random numbers where `checkpoint` left them."""
        self.generator.model.load_state_dict(checkpoint.generator)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        torch.set_rng_state(checkpoint.rng)
        if checkpoint.device_rng is not None:
            torch.cuda.set_rng_state(checkpoint.device_rng, self.generator.model.device)


@torch.no_grad()
def _log_probs(
    generator: Generator, rollouts: Rollouts, parts: Sequence[Int[Tensor, " part"]]
) -> Float[Tensor, "rollouts tokens"]:
    """log π of every written token in the generator's own precision, one part of the rollouts at a time."""
    found = torch.zeros_like(rollouts.log_probs, dtype=generator.model.dtype)
    for places in parts:
        part = rollouts.rows(places)
        found[places, : part.token_ids.shape[1]] = generator.log_probs(part)
    return found
