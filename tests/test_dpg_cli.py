"""The command line: what goes wrong is one line on standard error and exit status 1; nothing written is lost."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from dpg_problems import TINY_RUN, prompt_file, tiny_run
from transformers.utils import logging

import dpg.run
from dpg import cli
from dpg.folder import RunFolder
from dpg.generator import Generator


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()  # As `main` asks for, which comes too late in a process that has run others.


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `dpg` with arguments; returns its exit status and its lines on standard error and standard output."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["dpg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.err.splitlines(), captured.out.splitlines()

    return called


@pytest.fixture
def refused(call):
    """The one line that `dpg` leaves on standard error."""

    def line(*arguments):
        status, errors, _ = call(*arguments)
        assert status == 1 and len(errors) == 1 and errors[0].startswith("dpg: "), errors
        return errors[0]

    return line


def tiny(folder, *arguments, out="run"):
    settings = [part for key, value in TINY_RUN.items() for part in ("--set", f"{key}={value}")]
    return ["run", "sixseven", "--out", folder / out, "--prompts", prompt_file(folder), *settings, *arguments]


def test_a_run_and_its_verification(tmp_path, call):
    status, errors, output = call(*tiny(tmp_path, "--seed", 3, "--set", "train_eos=false"))
    assert (status, errors) == (0, [])
    assert output[-1].startswith("finished in ") and output[-1].endswith("report.md")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["seed"] == 3 and config["train_eos"] is False and config["command"].startswith("dpg run sixseven")
    status, errors, output = call("verify", tmp_path / "run")
    assert (status, errors) == (0, []) and len(output) == 3
    verdicts = json.loads((tmp_path / "run" / "verify.json").read_text())
    for line, verdict in zip(output, verdicts, strict=True):
        assert line.startswith(verdict["source"]) and f"pixel_accuracy {verdict['pixel_accuracy']:.6g}" in line


def test_list_names_every_experiment(call):
    status, errors, output = call("list")
    assert (status, errors) == (0, [])
    assert any(line.startswith("sixseven ") for line in output)


def test_an_unknown_experiment(refused):
    assert "there is no experiment 'sevensix'. Choose from: sixseven" in refused("run", "sevensix")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("num_stepz=3", "sixseven has no setting 'num_stepz'. Did you mean num_steps"),
        ("num_steps", "expected key=value"),
        ("num_steps=many", "num_steps must be of type int"),
        ("num_steps=2.5", "num_steps must be of type int"),
        ("learning_rate=fast", "learning_rate must be of type float"),
        ("train_eos=yes", "train_eos must be of type bool"),
    ],
)
def test_a_bad_setting(tmp_path, refused, assignment, message):
    line = refused(*tiny(tmp_path, "--set", assignment))
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--generator", "--target"])
def test_a_model_that_is_not_there(tmp_path, refused, option):
    line = refused(*tiny(tmp_path, option, tmp_path / "no-model"))
    assert "no-model' is neither a folder with a causal language model and its tokenizer" in line


def test_prompts_that_are_not_there(tmp_path, refused):
    line = refused("run", "sixseven", "--out", tmp_path / "run", "--prompts", tmp_path / "no-prompts.txt")
    assert "no-prompts.txt" in line and "is neither a file" in line


def test_prompts_without_a_prompt(tmp_path, refused):
    (tmp_path / "blank.txt").write_text("\n  \n")
    assert "blank.txt holds no prompts" in refused("run", "sixseven", "--prompts", tmp_path / "blank.txt")
    (tmp_path / "other.jsonl").write_text('{"question": "Why?"}\n')
    line = refused("run", "sixseven", "--prompts", tmp_path / "other.jsonl")
    assert "has the row {'question': 'Why?'}, but prompts are strings in a column `prompt` or `text`" in line


def test_too_few_prompts(tmp_path, refused):
    (tmp_path / "four.txt").write_text("One.\nTwo.\nThree.\nFour.\n")  # None is left to validate with.
    line = refused(*tiny(tmp_path, "--prompts", tmp_path / "four.txt"))
    assert "prompts" in line and "4" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_empty(tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert "run is not empty. It holds no checkpoint to resume. Empty it, or pass another" in refused(*tiny(tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_resuming_what_is_not_a_run(tmp_path, refused):
    assert "is not a run folder: it has no config.json" in refused(*tiny(tmp_path, "--resume"))


def test_resuming_with_other_settings(tmp_path, refused):
    tiny_run(tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    line = refused(*tiny(tmp_path, "--resume", "--set", "group_size=4"))
    assert "was started with group_size = 2, not 4. Resume it with the same arguments" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_verifying_a_run_that_is_not_finished(tmp_path, refused):
    tiny_run(tmp_path)
    (tmp_path / "run" / "dataset.jsonl").unlink()
    assert "holds no dataset.jsonl: the run in it is not finished" in refused("verify", tmp_path / "run")
    assert not (tmp_path / "run" / "verify.json").exists()


def test_verifying_what_is_not_a_run(tmp_path, refused):
    assert "is not a run folder: it has no config.json" in refused("verify", tmp_path)
    assert "is not a run folder: it has no config.json" in refused("verify", tmp_path / "nowhere")


def on_a_full_disk(monkeypatch, name):
    """Makes `name` in the run folder a file that cannot be written, from the start of the run."""
    original = RunFolder.create

    def create(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        (self.path / name).symlink_to("/dev/full")

    monkeypatch.setattr(RunFolder, "create", create)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk is Linux's /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.pt.tmp", "dataset.jsonl.tmp", "report.md.tmp"])
def test_a_full_disk_is_said_and_costs_nothing_already_written(tmp_path, refused, call, monkeypatch, name):
    with monkeypatch.context() as patch:
        on_a_full_disk(patch, name)
        line = refused(*tiny(tmp_path))
    path = tmp_path / "run"
    assert "the disk is full" in line and "--resume" in line
    for written in ("untrained.jsonl", "prose.jsonl"):
        assert len([json.loads(row) for row in (path / written).read_text().splitlines()]) == 16
    assert json.loads((path / "config.json").read_text())["experiment"] == "sixseven"
    (path / name).unlink()
    if (path / "checkpoint.pt").exists():
        assert call(*tiny(tmp_path, "--resume"))[0] == 0
        whole = tiny_run(tmp_path, "whole")
        assert (path / "dataset.jsonl").read_bytes() == (whole / "dataset.jsonl").read_bytes()


def test_too_little_space_is_refused_before_training(tmp_path, refused, monkeypatch):
    def sample(*arguments):
        raise AssertionError("the run has begun")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=10**12, free=3_000_000))
    monkeypatch.setattr(Generator, "sample", sample)
    line = refused(*tiny(tmp_path))
    assert "has 3 MB free, and the run needs about" in line and "Free some space" in line
    assert not any((tmp_path / "run").iterdir())


def test_debug_shows_the_whole_trace(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpg", "run", "sevensix", "--debug"])
    with pytest.raises(ValueError, match="there is no experiment"):
        cli.main()


def test_a_second_ctrl_c_ends_at_once(call, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(dpg.run, "run", interrupted)
    status, errors, _ = call("run", "sixseven")
    assert status == 130 and not [line for line in errors if line not in ("", "dpg: interrupted")]


def test_a_plan_of_a_model_and_of_a_run(tmp_path, call):
    planned = "plan", "--model", "gpt2-124m", "--generator", "none", "--batch", 2, "--sequence-length", 8
    status, errors, output = call(*planned, "--gpu-memory", "80GB")
    assert (status, errors) == (0, []) and any(line.startswith("fits: ") for line in output)
    assert "  target's weights" in "\n".join(output) and "124,439,808 x 4 B" in "\n".join(output)
    status, errors, output = call(*planned, "--json", "--flops", "1e12", "--gpu-memory", "1GB")
    told = json.loads("\n".join(output))
    assert (status, errors) == (0, []) and told["fits"] is False and told["seconds"] > 0
    assert told["always"]["lines"] == [
        {"what": "target's weights", "arithmetic": "124,439,808 x 4 B", "bytes": 4 * 124_439_808}
    ]
    status, errors, output = call("plan", "sixseven", "--slots", 2)
    assert (status, errors) == (0, []) and output[0] == "sixseven" and output[1].startswith("target ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name an experiment (`dpg plan sixseven --preset paper`) or pass --model: one of the two"),
        (("sixseven", "--model", "gpt2-124m"), "one of the two"),
        (("sixseven", "--batch", "8"), "--batch goes with --model. With an experiment, say it as `dpg run` would"),
        (("--model", "gpt2-124m", "--set", "seed=1"), "--set goes with an experiment"),
        (("--model", "gpt2-124m", "--share", "0.5"), "--share and --bandwidth go with --flops"),
        (("--model", "gpt2-124m", "--flops", "1e12", "--calibrate"), "Pass one of them"),
        (("--model", "gpt2-124m", "--save", "file"), "--save writes what --calibrate measured"),
        (("--model", "gpt2-124m", "--gpu-memory", "much"), "'much' is no amount of memory"),
        (("--model", "gpt2-124m", "--gpus", "0"), "gpus is 0. Pass at least 1"),
    ],
)
def test_a_plan_that_cannot_be(refused, arguments, message):
    assert message in refused("plan", *arguments)
