"""As TRL's reward function, a reward is itself divided by the batch's spread, in one process and in two."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dpg_problems import TEXTS
from trl_processes import BATCH, called, function

from dpg.build import build_reward
from dpg.preset import load
from dpg.reward import Reward, Scores
from dpg.trl import PresetReward, RewardFunction, preset_reward
from dpg.trl.reward import group_size, text_of

ROOT = Path(__file__).parent.parent


def test_trl_is_imported_when_it_is_used():
    code = "import sys, dpg.cli, dpg.run, dpg.trl.preset; print('trl' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "False"


class Given(Reward):
    """Rewards that are known."""

    def __init__(self, *rewards):
        self.rewards = torch.tensor(rewards)

    def score(self, texts, group_size=None):
        return Scores(self.rewards, None, None)


def given(*rewards):
    return called(RewardFunction(Given(*rewards)), TEXTS[: len(rewards)], 0)


def test_rewards_are_in_units_of_their_spread():
    reward = function()
    scores = reward.reward.score(BATCH, 2)
    found = called(reward, BATCH, 0)
    mean = sum(scores.rewards.tolist()) / 8
    spread = (sum((r - mean) ** 2 for r in scores.rewards.tolist()) / 7) ** 0.5
    assert found["rewards"] == pytest.approx([r / spread for r in scores.rewards.tolist()], rel=1e-12)
    assert found["raw_reward"] == scores.rewards.tolist() and found["phi"] == scores.phi
    assert found["raw_reward_std"] == pytest.approx(spread, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e9])
def test_scale_is_nothing_to_trl(scale):
    rewards = given(1 * scale, 2 * scale, 4 * scale, 9 * scale)["rewards"]
    assert rewards == pytest.approx(given(1.0, 2.0, 4.0, 9.0)["rewards"], rel=1e-12)


def test_equal_rewards_stay_equal():
    assert given(-0.3, -0.3, -0.3)["rewards"] == [-1, -1, -1]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ((0.0, 0.0, 0.0), "all 3 rewards are 0"),
        ((1.0, float("nan"), 0.0), "a reward is not finite"),
        ((1.0, float("inf"), 0.0), "a reward is not finite"),
        ((1.0,), "a batch of 1 text has no spread"),
    ],
)
def test_what_is_no_reward_is_raised(rewards, message):
    assert message in given(*rewards)["error"]


def test_evaluation_batches_may_have_other_sizes():
    reward = RewardFunction(function().reward, num_generations=4, num_generations_eval=2)
    assert called(reward, BATCH, 0) == called(function(), BATCH, 0)
    prompts = ["a"] * 4 + ["b"] * 4
    in_training = reward(prompts=prompts, completions=BATCH, completion_ids=[[]] * 8, text=["another column"] * 8)
    assert len(in_training) == 8


@pytest.mark.parametrize(
    ("prompts", "sizes", "found"),
    [
        ("aabbcc", (), 2),
        ("aabbbbcc", (), 2),  # A prompt that was drawn twice in a row.
        ("abc", (), 1),
        ("aaaabb", (2,), 2),
        ("aaaa", (2,), 2),
        ("abcd", (4, 1), 1),
        ("aaaabbbb", (4, 1), 4),
    ],
)
def test_groups_are_found_in_the_prompts(prompts, sizes, found):
    assert group_size(prompts, sizes) == found


@pytest.mark.parametrize(
    ("prompts", "sizes", "message"),
    [
        ("abab", (), "2 prompts of 4 texts .* must stand together"),
        ("abba", (), "2 prompts of 4 texts .* must stand together"),
        ("aaab", (2,), r"\[3, 1\] texts are no groups of 2"),
        ("aaab", (4, 2), "are no groups of 4 or 2"),
    ],
)
def test_texts_of_a_prompt_stand_together(prompts, sizes, message):
    with pytest.raises(ValueError, match=message):
        group_size(prompts, sizes)


def test_a_chat_is_read_by_what_the_assistant_said():
    messages = [[{"role": "assistant", "content": text}] for text in BATCH]
    assert called(function(), messages, 0)["rewards"] == called(function(), BATCH, 0)["rewards"]
    assert (
        text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
        == "ab"
    )


@pytest.mark.parametrize(
    "completion",
    [
        None,
        [],
        [{"role": "assistant", "content": None}],
        [{"content": "a"}, {"content": "b"}],
        [{"content": [{"type": "image"}]}],
    ],
    ids=str,
)
def test_other_completions_are_refused(completion):
    with pytest.raises(ValueError, match="must be a text or a list of one message"):
        text_of(completion)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes got, by case."""
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, str(ROOT / "tests" / "trl_processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
        capture_output=True,
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_get_what_one_gets(processes):
    alone, (first, second) = called(function(), BATCH, 0), [process["whole"] for process in processes]
    for name in ("rewards", "raw_reward"):
        assert first[name] + second[name] == alone[name] and len(first[name]) == 3
    assert first["phi"] == alone["phi"] and "phi" not in second


@pytest.mark.parametrize(
    ("case", "culprit", "message"),
    [("failing", 0, "NonFiniteError"), ("scattered", 0, "are no groups of 2"), ("malformed", 1, "must be a text")],
)
def test_an_error_in_one_process_is_raised_in_both(processes, case, culprit, message):
    errors = [process[case]["error"] for process in processes]
    assert message in errors[culprit] and not errors[culprit].startswith("OtherProcessError")
    assert errors[1 - culprit] == f"OtherProcessError: process {culprit} failed: {errors[culprit]}"


def preset_file(folder):
    small = {"inner_batch_size": 8, "prompts_per_step": 4, "group_size": 2}
    (folder / "mine.yaml").write_text(load("sixseven").changed(small).text())
    return str(folder / "mine.yaml")


def test_a_preset_is_a_reward_without_arguments(tmp_path, monkeypatch):
    path = preset_file(tmp_path)
    texts = ["the file is", "an object", "a string may", "the value of the"]
    wanted = called(RewardFunction(build_reward(load("sixseven", path))[1]), texts, 0)
    monkeypatch.setenv("DPG_PRESET", path)
    assert called(pickle.loads(pickle.dumps(preset_reward)), texts, 0)["rewards"] == wanted["rewards"]
    assert called(RewardFunction(PresetReward(path)), texts, 0)["rewards"] == wanted["rewards"]
    assert preset_reward.__name__ == "PresetReward"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "set DPG_PRESET to a preset"),
        ("sevensix-laptop", "there is no experiment 'sevensix'"),
        ("sixseven-desktop", "there is no preset 'desktop' of sixseven"),
        ("no.yaml", "DPG_PRESET names no.yaml, which is no YAML file"),
        ("list.yaml", "there is no experiment ''"),
        ("naive.yaml", "compares a text with the whole batch"),
    ],
)
def test_presets_that_are_no_reward(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("[1]\n")
    Path("naive.yaml").write_text("experiment: sixseven\nreward: naive\nuntie_head: true\n")
    monkeypatch.setenv("DPG_PRESET", name)
    assert message in called(preset_reward, TEXTS, 0)["error"]


@pytest.mark.parametrize("name", ["num_generations", "num_generations_eval"])
def test_groups_have_a_text(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0"):
        RewardFunction(Given(1.0), **{name: 0})
