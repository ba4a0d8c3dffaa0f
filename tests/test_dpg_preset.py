"""A preset is a file a person can read; what a run used can be written down and read back, to the last digit."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpg.experiments import EXPERIMENTS
from dpg.preset import FOLDER, Preset, load, parse, restore
from dpg.settings import REWARDS, Settings

FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_preset_of_the_package_is_read_and_written_back(file, tmp_path):
    experiment, name = file.stem.rsplit("-", 1)
    preset = load(experiment, name)
    assert preset.experiment.name == experiment
    (tmp_path / "saved.yaml").write_text(preset.text(), encoding="utf-8")
    assert load(experiment, str(tmp_path / "saved.yaml")) == preset
    for key, value in yaml.safe_load(file.read_text()).items():
        if key not in ("experiment", "variants"):
            assert preset.as_dict()[key] == value, key
    for changes in preset.variants.values():
        assert preset.changed(changes).as_dict() == {**preset.as_dict(), **changes}


def test_every_experiment_has_a_laptop_preset():
    assert {file.stem for file in FILES} >= {f"{name}-laptop" for name in EXPERIMENTS}


numbers = st.floats(min_value=1e-300, max_value=1e300)


@given(lr=numbers, steps=st.integers(1, 10**9), root=numbers, reward=st.sampled_from(REWARDS), bos=st.booleans())
def test_numbers_survive_the_file_the_command_line_and_the_configuration(
    lr, steps, root, reward, bos, tmp_path_factory
):
    changes = {"inner_lr": lr, "num_steps": steps, "inner_eps_root": root, "reward": reward, "train_bos": bos}
    preset = load("sixseven").changed(changes)
    assert {key: preset.as_dict()[key] for key in changes} == changes
    assert load("sixseven").changed(parse([f"{key}={value}" for key, value in changes.items()])) == preset
    read = yaml.safe_load(preset.text())
    assert {key: read[key] for key in changes} == changes
    again = restore({"experiment": "sixseven", "torch": "2", **preset.as_dict()})
    assert (again.experiment, again.settings) == (preset.experiment, preset.settings)


def test_none_can_be_written():
    preset = load("sixseven").changed(parse(["final_learning_rate=none", "inner_microbatch_size=8"]))
    assert preset.settings.final_learning_rate is None and preset.settings.inner_microbatch_size == 8
    assert load("norm").changed({"parameter": "x"}).experiment.parameter == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("experiment: norm\n", "it must say `experiment: sixseven`"),
        ("- 1\n- 2\n", "it must say `experiment: sixseven`"),
        ("experiment: [sixseven\n", "is not a YAML file"),
        ("experiment: sixseven\nstrenght: 3\n", "has no setting 'strenght'. Did you mean strength"),
        ("experiment: sixseven\nseed: -1\n", "seed is -1. Pass 0 or more"),
        ("experiment: sixseven\nreward: best\n", "reward is 'best'. Choose from: metagradient, naive"),
        ("experiment: sixseven\nnum_steps: [3]\n", r"num_steps must be of type int, but is \[3\]"),
        ("experiment: sixseven\ntrain_eos: 1\n", "train_eos must be of type bool, but is 1"),
        ("experiment: sixseven\ninner_lr: true\n", "inner_lr must be of type float, but is True"),
    ],
)
def test_a_file_that_is_no_preset_says_why(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load("sixseven", str(tmp_path / "mine.yaml"))


def test_what_is_not_there():
    with pytest.raises(ValueError, match="there is no experiment 'eight'. Choose from: sixseven"):
        load("eight")
    with pytest.raises(ValueError, match="there is no preset 'huge' of sixseven. .* one of: laptop, paper"):
        load("sixseven", "huge")


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_learning_rate_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="inner_lr is .* Pass a number above 0"):
        Settings(inner_lr=value)


def test_presets_compare_by_value():
    assert load("sixseven") == load("sixseven") and isinstance(load("sixseven"), Preset)
    assert load("sixseven") != load("sixseven").changed({"seed": 1})
