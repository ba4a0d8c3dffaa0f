"""GRPO whose texts are compared with the whole batch, for rewards that are those of a data set and not of a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from trl import GRPOTrainer

from dpg.grpo import group_advantages

_HOOKS = ("_calculate_rewards", "_generate_and_score_completions")


def refuse_missing_hooks(trainer: type) -> None:
    """Raise an ImportError if a TRL trainer has not the methods that `GrouplessGRPOTrainer` overrides."""
    missing = [name for name in _HOOKS if not callable(getattr(trainer, name, None))]
    if missing:
        raise ImportError(
            f"{trainer.__name__} of TRL {trl.__version__} has no {' and no '.join(missing)}, so its advantages cannot "
            "be replaced. Install trl==1.16.0, with which this was tested."
        )


refuse_missing_hooks(GRPOTrainer)


class GrouplessGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose advantages compare each text with all texts of its generation batch, not with its prompt's.

    The paper's naive reward, Φ of a data set for each of its texts [thrush2026], has nothing to compare within a
    prompt. An advantage is the reward minus the batch's mean, over the batch's standard deviation. TRL's table of
    completions goes on showing what it computed by prompts.

    Raises:
        ValueError: in training, for a reward that is None or not finite, or rewards that are all 0.
    """

    _scored: Float[Tensor, "texts functions"]

    def _calculate_rewards(self, *arguments: Any, **keywords: Any) -> Float[Tensor, "texts functions"]:
        self._scored = super()._calculate_rewards(*arguments, **keywords)
        return self._scored

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rewards = (self._scored * self.reward_weights.to(self._scored.device)).sum(dim=1)
        batch = group_advantages(rearrange(rewards, "texts -> 1 texts"), normalize=self.scale_rewards != "none")[0]
        start = self.accelerator.process_index * len(inputs)
        mine = batch[start : start + len(inputs)]
        if not isinstance(output.get("advantages"), torch.Tensor) or output["advantages"].shape != mine.shape:
            raise ValueError(
                f"TRL {trl.__version__} gives no advantage for each of the {len(inputs)} texts, so there is nothing to "
                "replace. Install trl==1.16.0, with which this was tested."
            )
        return {**output, "advantages": mine}
