"""Inside a real GRPOTrainer: which advantages come of the rewards, by prompt and without groups, and what is logged."""

import pytest
import torch
from datasets import Dataset
from dpg_problems import gpt2, letters
from trl import GRPOConfig, GRPOTrainer

from dpg.reward import Reward, Scores
from dpg.trl import GrouplessGRPOTrainer, RewardFunction
from dpg.trl.trainer import refuse_missing_hooks

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own.

SCALE = 1e-7
"""Of raw rewards: TRL's 1e-4 would be all there is."""


class LongestLetters(Reward):
    """A small number for each text, different for texts that differ; remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def score(self, texts, group_size=None):
        rewards = [SCALE * (i % 5 + len(text) + 0.1 * i) for i, text in enumerate(texts)]
        self.calls.append((texts, group_size, rewards))
        return Scores(torch.tensor(rewards), 0.25, None)


def recording(kind):
    """A trainer that keeps the advantages of every batch."""

    class Recording(kind):
        advantages = []

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            self.advantages = [*self.advantages, output["advantages"].tolist()]
            return output

    return Recording


@pytest.fixture
def trained(tmp_path):
    """A trainer of a kind after two generation batches of twelve texts and an evaluation, and its reward."""

    def train(kind, **options):
        settings = {
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 2,
            "num_generations": 3,
            "num_generations_eval": 2,
            "per_device_eval_batch_size": 4,
            "max_completion_length": 5,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        reward = LongestLetters()
        data = Dataset.from_dict({"prompt": ["ab", "cd", "efg", "h", "ij", "ka", "ba", "dc"]})
        torch.set_default_dtype(torch.float32)  # A user's.
        try:
            trainer = recording(kind)(
                gpt2(seed=1).float(),
                RewardFunction(reward, 3, 2),
                GRPOConfig(output_dir=str(tmp_path), **{**settings, **options}),
                data,
                data.select(range(4)),
                processing_class=letters(),
            )
            trainer.train()
            trainer.evaluate()
        finally:
            torch.set_default_dtype(torch.float64)
        return trainer, reward

    return train


def normalized(rewards, groups, epsilon):
    """Minus the mean and over the standard deviation, of each group."""
    found = []
    for start in range(0, len(rewards), groups):
        group = rewards[start : start + groups]
        mean = sum(group) / len(group)
        spread = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        found += [(r - mean) / (spread + epsilon) for r in group]
    return found


def test_trl_compares_the_texts_of_a_prompt(trained):
    trainer, reward = trained(GRPOTrainer)
    assert [(len(texts), size) for texts, size, _ in reward.calls] == [(12, 3), (12, 3), (4, 2), (4, 2)]
    for (_, size, rewards), advantages in zip(reward.calls, trainer.advantages, strict=True):
        # In TRL 1e-4 is added to a group's spread, which is about 1 in units of the batch's.
        assert advantages == pytest.approx(normalized(rewards, size, 0.0), rel=1e-3, abs=1e-5)
        mean = sum(rewards) / len(rewards)
        spread = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        in_units = [r / spread for r in rewards]
        assert advantages == pytest.approx(normalized(in_units, size, 1e-4), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_groupless_advantages_compare_the_whole_batch(trained, scale):
    trainer, reward = trained(GrouplessGRPOTrainer, scale_rewards=scale)
    assert len(reward.calls) == len(trainer.advantages) == 4
    for (_, _, rewards), advantages in zip(reward.calls, trainer.advantages, strict=True):
        assert advantages == pytest.approx(normalized(rewards, len(rewards), 0.0), rel=1e-5, abs=1e-5)


def test_figures_are_in_trls_logs(trained):
    trainer, reward = trained(GRPOTrainer)
    training = [log for log in trainer.state.log_history if "loss" in log]
    assert len(training) == 2
    for log, (_, _, rewards) in zip(training, reward.calls, strict=False):
        assert log["phi"] == 0.25
        assert log["raw_reward_std"] == pytest.approx(float(torch.tensor(rewards).std()), rel=1e-6)
        assert log["rewards/LongestLetters/std"] == pytest.approx(1.0, rel=1e-5)
    (evaluated,) = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert evaluated["eval_phi"] == 0.25


def test_raw_rewards_are_in_the_table_of_completions(trained):
    trainer, reward = trained(GRPOTrainer, log_completions=True)
    assert list(trainer._logs["extra"]["raw_reward"])[-4:] == pytest.approx(reward.calls[-1][2])


def test_an_error_in_the_reward_stops_training(trained, monkeypatch):
    monkeypatch.setattr(LongestLetters, "score", lambda self, texts, size: Scores(torch.zeros(len(texts)), None, None))
    with pytest.raises(ValueError, match="all 12 rewards are 0"):
        trained(GRPOTrainer)


def test_a_trl_without_the_hooks_is_refused():
    class GRPOTrainerOfTomorrow:
        def _calculate_rewards(self):
            pass

    message = "GRPOTrainerOfTomorrow of TRL .* has no _generate_and_score_completions.* Install trl==1.16.0"
    with pytest.raises(ImportError, match=message):
        refuse_missing_hooks(GRPOTrainerOfTomorrow)
