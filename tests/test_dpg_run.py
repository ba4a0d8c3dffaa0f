"""A run leaves what it promises in its folder, and one that was stopped anywhere can be finished with the same bits."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from dpg_problems import (
    TINY_RUN,
    assert_same_run,
    lines,
    parameters,
    same_bits,
    tiny_preset,
    tiny_run,
    without_seconds,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpg.build
import dpg.run
from dpg.build import MODELS, build
from dpg.folder import RunFolder, RunFolderError
from dpg.generator import Generator
from dpg.loop import write
from dpg.run import Interrupted
from dpg.target import load_model

FILES = {"config.json", "metrics.jsonl", "curve.png", "dataset.jsonl", "generator", "target", "report.md"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder):
    return tiny_run(folder)


def test_every_promised_file_is_there(finished):
    present = {path.name for path in finished.iterdir()}
    assert FILES <= present and {"untrained.jsonl", "prose.jsonl"} <= present
    assert not [name for name in present if name.endswith(".tmp")]


def test_metrics_have_one_line_a_step(finished):
    records = lines(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records:
        assert {"step", "phi", "reward_std", "seconds"} <= record.keys()
        assert all(math.isfinite(value) for value in record.values())
        validated = record["step"] in (0, 2)
        assert ({"val/phi", "val/pixel_accuracy"} <= record.keys()) == validated
    assert all(record["seconds"] > 0 and record["reward_std"] > 0 for record in records[1:])


def test_the_configuration_says_how_to_repeat_the_run(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["experiment"] == "sixseven" and config["torch"] == torch.__version__ and config["seed"] == 0
    assert {key: config[key] for key in TINY_RUN} == TINY_RUN
    assert config["command"] == "dpg run tiny"


def test_pictures_are_pictures(finished):
    for name in ("curve.png", "pattern.png"):
        content = (finished / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.rstrip().endswith(b"IEND\xaeB`\x82")


def test_the_report_shows_what_is_in_the_folder(finished):
    page = (finished / "report.md").read_text()
    for name in ("curve.png", "pattern.png"):
        assert f"({name})" in page
    rows = {
        cells[1]: cells[2:-1]
        for cells in ([c.strip() for c in row.split("|")] for row in page.splitlines() if "|" in row)
    }
    assert (
        rows[""] == ["Φ", "pixel accuracy"]
        and {"untrained generator", "trained generator", "real prose"} <= rows.keys()
    )


def test_texts_are_one_a_line(finished):
    for name in ("dataset.jsonl", "untrained.jsonl", "prose.jsonl"):
        texts = lines(finished / name)
        assert len(texts) == 16 and all(set(text) == {"text"} for text in texts)


def test_the_target_is_the_one_before_training(finished):
    saved = AutoModelForCausalLM.from_pretrained(finished / "target")
    assert same_bits(parameters(saved), parameters(load_model(str(MODELS / "target"), untie=True)[0]))
    assert AutoTokenizer.from_pretrained(finished / "target")("ab").input_ids


def test_the_saved_generator_wrote_the_data(finished, folder):
    model = AutoModelForCausalLM.from_pretrained(finished / "generator")
    chosen = Generator(model, AutoTokenizer.from_pretrained(finished / "generator"), 8, 32)
    prompts = build(tiny_preset(folder)).validation.prompts
    torch.manual_seed(0)
    assert write(chosen, prompts, 16) == [line["text"] for line in lines(finished / "dataset.jsonl")]
    assert not same_bits(parameters(model), parameters(load_model(str(MODELS / "generator"))[0]))


def test_validation_prompts_are_never_trained_on(folder):
    parts = build(tiny_preset(folder))
    assert len(parts.validation.prompts) == 4 and len(parts.prompts) == 16
    assert not set(parts.validation.prompts) & set(parts.prompts)


def test_embedded_prompts_are_the_passages_held_out(folder, monkeypatch):
    passages = [f"Sentence {i} is short." for i in range(30)]
    monkeypatch.setattr(dpg.build.corpus, "held_out", lambda: passages)
    parts = build(tiny_preset(folder, prompts="embedded"))
    assert sorted(parts.validation.prompts + parts.prompts) == sorted(passages)


def raised_once(original, when, error):
    """A function that raises once, where `when` says so, and is `original` otherwise."""
    raised = []

    def function(*arguments, **keywords):
        if not raised and when(*arguments):
            raised.append(True)
            raise error
        return original(*arguments, **keywords)

    return function


@pytest.mark.parametrize("step", [0, 1])
def test_ctrl_c_finishes_the_step_and_can_be_resumed(finished, folder, monkeypatch, step):
    original = RunFolder.record

    def record(self, entry):
        original(self, entry)
        if entry.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    name = f"interrupted-{step}"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", record)
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 2; nothing is lost.*--resume --out"):
            tiny_run(folder, name)
    assert signal.getsignal(signal.SIGINT) is before
    assert [line["step"] for line in lines(folder / name / "metrics.jsonl")] == list(range(step + 1))
    assert not (folder / name / "dataset.jsonl").exists()
    assert_same_run(tiny_run(folder, name, resume=True), finished)


def test_a_run_killed_between_a_record_and_its_checkpoint_can_be_resumed(finished, folder, monkeypatch):
    killed = raised_once(RunFolder.save, lambda self, checkpoint: checkpoint.step == 2, KeyboardInterrupt)
    monkeypatch.setattr(RunFolder, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(folder, "killed")
    assert [line["step"] for line in lines(folder / "killed" / "metrics.jsonl")] == [0, 1, 2]
    assert_same_run(tiny_run(folder, "killed", resume=True), finished)


def test_a_run_killed_inside_a_line_can_be_resumed(finished, folder, monkeypatch):
    killed = raised_once(RunFolder.record, lambda self, record: record.step == 2, KeyboardInterrupt)
    monkeypatch.setattr(RunFolder, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(folder, "half-line")
    with (folder / "half-line" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "phi": -0.6')
    assert_same_run(tiny_run(folder, "half-line", resume=True), finished)


def test_a_run_killed_after_its_last_step_can_be_resumed(finished, folder, monkeypatch):
    killed = raised_once(dpg.run.report.write, lambda *arguments: True, KeyboardInterrupt)
    monkeypatch.setattr(dpg.run.report, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(folder, "unreported")
    assert_same_run(tiny_run(folder, "unreported", resume=True), finished)
    assert (folder / "unreported" / "report.md").exists()


def test_a_run_killed_before_its_first_checkpoint_says_so(folder, monkeypatch):
    monkeypatch.setattr(RunFolder, "save", raised_once(RunFolder.save, lambda *arguments: True, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny_run(folder, "early")
    with pytest.raises(RunFolderError, match="it holds no checkpoint.pt. Delete it and start anew"):
        tiny_run(folder, "early", resume=True)


def test_a_finished_run_can_be_resumed_in_vain(finished, folder):
    before = (finished / "dataset.jsonl").read_bytes(), without_seconds(finished)
    tiny_run(folder, resume=True)
    assert before == ((finished / "dataset.jsonl").read_bytes(), without_seconds(finished))


def test_another_seed_is_another_run(finished, folder):
    other = tiny_run(folder, "other-seed", seed=1)
    assert (other / "dataset.jsonl").read_bytes() != (finished / "dataset.jsonl").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 1},
        {"num_steps": 0},
        {"prompts_per_step": 17},
        {"checkpoint_every": 0},
        {"validate_every": 0},
        {"temperature": 0.0},
        {"sequence_length": -3},
        {"inner_batch_size": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_work_leave_no_folder_behind(folder, change):
    path = folder / f"refused-{next(iter(change))}"
    with pytest.raises(ValueError):
        tiny_run(folder, path.name, **change)
    assert not path.exists() or not any(path.iterdir())


def damaged(finished, folder, name, content=None):
    """A copy of a finished run in which one file is gone, or cut to `content`."""
    copy = folder / f"damaged-{name}-{content is None}"
    shutil.copytree(finished, copy)
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    return copy.name


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", b'{"experiment": "sixs', "config.json is damaged"),
        ("checkpoint.pt", b"PK", "checkpoint.pt is damaged"),
        ("checkpoint.pt", None, "holds no checkpoint.pt"),
        ("metrics.jsonl", b'{"step": 0}\n{"step": 1', "does not hold every step up to 2"),
        ("metrics.jsonl", None, "holds no metrics.jsonl"),
        ("untrained.jsonl", None, "holds no untrained.jsonl"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(finished, folder, name, content, message):
    run_name = damaged(finished, folder, name, content)
    with pytest.raises(RunFolderError, match=message):
        tiny_run(folder, run_name, resume=True)


def test_a_file_is_not_a_run_folder(folder):
    (folder / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        tiny_run(folder, "file")
