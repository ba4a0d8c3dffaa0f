"""The generator as it learns: one step of policy optimization, and what a checkpoint of it holds."""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
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
        optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay)
        penalized = config.kl_coefficient > 0
        reference = replace(generator, model=copy.deepcopy(generator.model)) if penalized else None
        return cls(generator, reference, optimizer, config)

    def improve(self, rollouts: Rollouts, advantages: Float[Tensor, " rollouts"], learning_rate: float) -> float:
        """One pass over the rollouts in `updates_per_step` optimizer steps; the mean KL to the reference.

        Raises:
            NonFiniteError: if the generator's gradient is NaN or infinite.
        """
        config, parameters = self.config, self.generator.model.parameters
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        old = self._log_probs(self.generator, rollouts)
        start = old if self.reference is None else self._log_probs(self.reference, rollouts)
        kls = []
        for chosen in torch.randperm(len(advantages)).chunk(config.updates_per_step):
            self.optimizer.zero_grad()
            num_tokens, kl_of_update = rollouts.token_mask[chosen].sum(), 0.0
            for places in chosen.split(config.microbatch_size or len(chosen)):
                part = rollouts.rows(places)
                logits = self.generator.logits(part)
                log_probs = token_log_probs(logits, part.token_ids)
                share = part.token_mask.sum() / num_tokens  # Losses are means over tokens.
                loss = policy_loss(log_probs, old[places], advantages[places], part.token_mask, config.clip_range)
                if self.reference is not None:
                    kl = kl_estimate(log_probs, start[places], part.token_mask)
                    loss = loss + config.kl_coefficient * kl
                    kl_of_update += float(share * kl.detach())
                if config.entropy_coefficient > 0:
                    loss = loss - config.entropy_coefficient * mean_entropy(logits, part.token_mask)
                (share * loss).backward()
            kls.append(kl_of_update)
            norm = torch.nn.utils.clip_grad_norm_(parameters(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise mg.NonFiniteError(
                    f"the generator's gradient is not finite (its loss is {float(loss.detach())}). Lower "
                    "`learning_rate` or raise `kl_coefficient`."
                )
            self.optimizer.step()
        return sum(kls) / len(kls)

    @torch.no_grad()
    def _log_probs(self, generator: Generator, rollouts: Rollouts) -> Float[Tensor, "rollouts tokens"]:
        """log π of every written token, some rollouts at a time."""
        places = torch.arange(len(rollouts.texts)).split(self.config.microbatch_size or len(rollouts.texts))
        return torch.cat([generator.log_probs(rollouts.rows(chosen)) for chosen in places])

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
