"""A comparison runs what is missing, judges all alike and states its rule; its statistics are those of numpy."""

import json
import math

import numpy as np
import pytest
from dpg_problems import tiny_preset, tiny_run
from hypothesis import given
from hypothesis import strategies as st

import dpg.compare
from dpg.compare import CONTROLS, Row, best_control, compare, is_above, pooled_sd, write
from dpg.folder import RunFolder, RunFolderError
from dpg.preset import load
from dpg.transfer import transfer
from dpg.verify import verify

values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6)


@given(left=values, right=values)
def test_the_pooled_sd_is_that_of_the_textbook(left, right):
    a, b = (np.array(each) for each in (left, right))
    squares = ((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()
    wanted = math.sqrt(squares / (len(a) + len(b) - 2))
    assert pooled_sd(Row("left", left), Row("right", right)) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_one_seed_each_proves_nothing():
    assert math.isnan(pooled_sd(Row("left", [1.0]), Row("right", [2.0])))
    assert not is_above(Row("left", [5.0]), Row("shuffled", [0.0]))
    assert is_above(Row("left", [5.0]), Row("shuffled", [0.0, 1.0]))


def test_the_rule_is_two_pooled_sds_above_the_best_control(tmp_path):
    rows = [
        Row("metagradient", [10.0, 11.0, 12.0]),
        Row("metagradient-sgd", [8.0, 9.0, 10.0]),
        Row("shuffled", [6.0, 7.0, 8.0]),
        Row("random", [0.0, 1.0, 2.0]),
    ]
    assert best_control(rows).name == "shuffled"
    assert [is_above(row, rows[2]) for row in rows[:2]] == [True, False]  # 4 and exactly 2 sds of 1
    write(tmp_path, tiny_preset(tmp_path), rows)
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| meta")]
    assert lines == ["| metagradient | 11 | 1 | 3 | 4.0 | yes |", "| metagradient-sgd | 9 | 1 | 3 | 2.0 | no |"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    write(tmp_path, tiny_preset(tmp_path), [Row("metagradient", [5.0]), Row("random", [1.0])])
    assert "| metagradient | 5 | – | 1 | – | – |" in (tmp_path / "table.md").read_text()


def test_a_comparison_runs_what_is_missing_and_judges_as_verify_does(tmp_path, monkeypatch):
    preset = tiny_preset(tmp_path)
    rows = compare(preset, ["metagradient", "random"], [1], tmp_path / "all", jobs=2)
    assert [row.name for row in rows] == ["metagradient", "random", "untrained generator", "real prose"]
    found = {row.name: row.values[0] for row in rows}
    verdicts = {
        verdict.source: verdict.figures["pixel_accuracy"] for verdict in verify(tmp_path / "all/metagradient-1")
    }
    assert found["metagradient"] == verdicts["the run's data"]
    assert [found[name] for name in verdicts if name in CONTROLS] == [verdicts[n] for n in verdicts if n in CONTROLS]
    # The run itself is the one that `dpg run` makes.
    alone = tiny_run(tmp_path, "alone", seed=1)
    assert (alone / "dataset.jsonl").read_bytes() == (tmp_path / "all/metagradient-1/dataset.jsonl").read_bytes()

    def never(*arguments, **keywords):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(dpg.compare.subprocess, "run", never)
    assert compare(preset, ["metagradient", "random"], [1], tmp_path / "all") == rows
    table = json.loads((tmp_path / "all" / "table.json").read_text())
    assert table["rows"] == {row.name: list(row.values) for row in rows}
    with pytest.raises(RunFolderError, match="holds a comparison with other settings"):
        compare(preset.changed({"num_steps": 3}), ["random"], [0], tmp_path / "all")


def test_a_run_that_fails_is_named_with_what_it_said(tmp_path):
    preset = tiny_preset(tmp_path, prompts=str(tmp_path / "gone.txt"))
    with pytest.raises(RunFolderError, match="metagradient-0 failed: .*gone.txt.* neither a file"):
        compare(preset, ["metagradient"], [0], tmp_path / "all")


def test_a_variant_may_have_a_dot_in_its_name(tmp_path, monkeypatch):
    preset, started = tiny_preset(tmp_path), []

    def note(command, **options):
        started.append(load("sixseven", str(command[command.index("--preset") + 1])).settings.seed)
        return dpg.compare.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(dpg.compare.subprocess, "run", note)
    for name in ("lr-0.1-0", "lr-0.5-1"):
        dpg.compare._run(tmp_path / name, preset.changed({"seed": int(name[-1])}))
    assert started == [0, 1]
    assert {file.name for file in tmp_path.glob("lr*.yaml")} == {"lr-0.1-0.yaml", "lr-0.5-1.yaml"}


def test_an_unknown_variant_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no variant 'best'. Choose from: metagradient"):
        compare(tiny_preset(tmp_path), ["best"], [0], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_transfer_trains_fresh_targets_on_more_than_the_run_saw(tmp_path):
    path = tiny_run(tmp_path)
    curves = transfer(path, num_texts=32, num_points=3)
    assert list(curves) == ["the run's data", "untrained generator", "real prose"]
    for points in curves.values():
        assert len(points) == 3 and points[0].num_tokens < points[-1].num_tokens  # after 1, 2 and 4 steps
    # One epoch on as much prose as a control of the run has is what `verify` does.
    prose = RunFolder(path).read_texts("prose.jsonl")
    last = transfer(path, num_texts=len(prose), num_points=2)["real prose"][-1]
    wanted = {verdict.source: verdict.figures for verdict in verify(path)}["real prose"]
    assert last.figures == wanted
    assert json.loads((path / "transfer.json").read_text()).keys() == curves.keys()
    assert (path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="4 texts are less than one step of 8"):
        transfer(path, num_texts=4)
    (path / "generator" / "config.json").unlink()
    with pytest.raises(RunFolderError, match="holds no generator"):
        transfer(path)
