"""What cannot work is refused by name before any model is loaded, or at least before anything is written."""

import pytest
from dpg_problems import gpt2, letters, tiny_run
from transformers import AutoTokenizer

from dpg.build import MODELS
from dpg.cli import _message
from dpg.experiments.custom import Custom
from dpg.experiments.language import Language
from dpg.experiments.qr import Qr
from dpg.experiments.uuid import Uuid
from dpg.folder import RunFolder, RunFolderError
from dpg.metrics.metric import bind
from dpg.preset import load
from dpg.prompts import read_prompts


@pytest.mark.parametrize("number", [-5, 10**9])
def test_calibration_takes_passages_that_there_are(number):
    with pytest.raises(ValueError, match=f"`num_calibration` is {number}"):
        Qr(num_calibration=number).metric()


@pytest.mark.parametrize(("number", "found"), [(-5, 3), (0, 3), (3, 0)])
def test_held_out_texts_are_some(tmp_path, number, found):
    (tmp_path / "german.txt").write_text("Eins.\nZwei.\nDrei.\n")
    source = str(tmp_path / "german.txt")
    with pytest.raises(ValueError, match=f"`num_held_out` is {number}, and .* has {found} texts"):
        Language("de", source, source, number).metric()


def test_an_empty_string_is_nothing_to_find():
    with pytest.raises(ValueError, match="the string to find is ' '"):
        Uuid(" ").metric()


@pytest.mark.parametrize("room", [{"max_new_tokens": 7}, {"sequence_length": 7}])
def test_a_string_needs_room(tmp_path, room):
    length = len(AutoTokenizer.from_pretrained(MODELS / "generator")("e3e70682")["input_ids"])
    assert length == 8
    with pytest.raises(ValueError, match="'e3e70682' has 8 tokens to write and 9 to train on, but .* 7"):
        tiny_run(tmp_path, experiment="uuid", string="e3e70682", **{"max_new_tokens": 8, "sequence_length": 9, **room})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "cudaa"}, "device=cudaa cannot be used here"),
        ({"track": "wandb"}, "track=wandb needs the package wandb"),
        ({"inner_microbatch_size": 0}, "`microbatch_size` is 0"),
        ({"inner_clip_norm": -1}, "`clip_norm` is -1"),
    ],
)
def test_nothing_is_written_before_a_refusal(tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        tiny_run(tmp_path, **change)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variants", ["3", "[a, b]", "{a: null}"])
def test_variants_are_names_of_changes(tmp_path, variants):
    (tmp_path / "mine.yaml").write_text(f"experiment: norm\nvariants: {variants}\n")
    with pytest.raises(ValueError, match="mine.yaml: `variants` must be names of changes"):
        load("norm", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("line", ["3: 4", "variants: {a: {inner_rl: 1}}"])
def test_a_preset_file_is_checked_whole(tmp_path, line):
    (tmp_path / "mine.yaml").write_text(f"experiment: norm\n{line}\n")
    with pytest.raises(ValueError, match="mine.yaml: norm has no setting '(3|inner_rl)'"):
        load("norm", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("content", ["{}", "[1]"])
def test_a_configuration_of_something_else_is_no_run(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunFolderError, match="its config.json names no experiment"):
        RunFolder(tmp_path).read_config()


def test_a_class_is_no_metric(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    with pytest.raises(ValueError, match=r"mine.py:Mine is a class. Make one of it"):
        Custom(f"{tmp_path / 'mine.py'}:Mine").metric()


def test_a_missing_parameter_is_not_confused_with_a_key_of_ones_own():
    with pytest.raises(ValueError, match="asks for 'transformer.wte', .* Close names are 'transformer.wte.weight'"):
        bind(lambda params: params["transformer.wte"].sum(), gpt2(), letters())
    with pytest.raises(KeyError, match="mine"):
        bind(lambda params: {}["mine"], gpt2(), letters())


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one\u2028line"}\n', encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("one\u2028line\n", encoding="utf-8")
    assert (
        read_prompts(str(tmp_path / "prompts.jsonl"))
        == read_prompts(str(tmp_path / "prompts.txt"))
        == ["one\u2028line"]
    )


def test_real_prose_has_no_instruction(tmp_path):
    path = tiny_run(tmp_path, instruction="Repeat: ", max_prompt_tokens=12, num_steps=1)
    assert not [text for text in RunFolder(path).read_texts("prose.jsonl") if text.startswith("Repeat")]


def test_a_tracker_may_change_on_resuming(tmp_path):
    path = tiny_run(tmp_path, num_steps=1)
    config = RunFolder(path).read_config()
    assert RunFolder(path).reopen({**config, "track": "tensorboard"}).step == 1


def test_an_error_that_nobody_foresaw_says_its_kind():
    assert _message(KeyError("experiment")) == "KeyError: 'experiment' (--debug shows where)"
    assert _message(ValueError("a  reason")) == "a reason"
    assert _message(RunFolderError("it is gone")) == "it is gone"
