"""Trackers show every figure under the names of `metrics.jsonl`, and a run that goes on is one run there."""

import json
import sqlite3

import pytest

from dpg.records import Record
from dpg.tracking import figures, refuse_missing, tracker

CONFIG = {"experiment": "sixseven", "seed": 0, "lora_rank": None}


def record(step, phi=0.5, validation=None):
    return Record(step, phi, 1e-9, 0.25, 10, 0.125, {"pixel_accuracy": 0.75}, validation, None)


def tracked(name, path, steps, first_step=0):
    path.mkdir(exist_ok=True)
    with tracker(name, path, CONFIG, first_step) as track:
        for step in steps:
            track(record(step, phi=float(step), validation={"phi": -1.0} if step == 0 else None))


def test_figures_have_the_names_of_the_lines():
    found = figures(record(3, validation={"phi": -1.0}))
    assert found == {
        "phi": 0.5,
        "reward_std": 1e-9,
        "seconds": 0.25,
        "num_tokens": 10,
        "kl": 0.125,
        "pixel_accuracy": 0.75,
        "val/phi": -1.0,
    }
    assert "phi" not in figures(record(3, phi=None))


def test_none_shows_nothing(tmp_path):
    tracked("none", tmp_path / "run", [0, 1])
    assert list((tmp_path / "run").iterdir()) == []


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="track=wandb needs the package wandb: pip install wandb"):
        refuse_missing("wandb")


def test_tensorboard_forgets_steps_that_a_kill_has_undone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard", tmp_path / "run", [0, 1, 2, 3])
    tracked("tensorboard", tmp_path / "run", [2, 3, 4], first_step=2)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("phi")] == [(step, float(step)) for step in range(5)]
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore")  # of the tracker's own
def test_trackio_goes_on_with_its_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    tracked("trackio", tmp_path / "run", [0, 1])
    tracked("trackio", tmp_path / "run", [2], first_step=2)
    with sqlite3.connect(tmp_path / "dpg.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by step").fetchall()
    assert len({row[0] for row in rows}) == 1 and {row[1] for row in rows} == {"run"}
    assert [(row[2], json.loads(row[3])["phi"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 2.0)]


@pytest.mark.filterwarnings("ignore")  # of the tracker's own
def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked("wandb", tmp_path / "run", [0, 1])
    first = (tmp_path / "run" / "wandb-id").read_text()
    tracked("wandb", tmp_path / "run", [2], first_step=2)
    assert (tmp_path / "run" / "wandb-id").read_text() == first
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(first.strip()) for name in folders)
