"""A folder that is damaged, of another run, or in use is refused, and the error says what of it does not fit."""

import json
import shutil
from pathlib import Path
from time import sleep

import pytest
import torch
from durable import SETUPS, Death, Setup, call, corner, forked, loss, mortal_run, same, tensors

import metagrad as mg

NUM_STEPS = 12
SETUP = Setup(mg.Binomial(3), wrt_params=True)
KINDS = ["run", "state", "final", "witness", "reverse"]


class Stop(Exception):
    """What a loss raises in the middle of a run."""


def cut_off(folder: Path, evaluations: int, setup: Setup = SETUP) -> Path:
    """A run's folder after so many evaluations of the loss."""
    left = evaluations

    def stopping(params, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop
        return loss(params, batch)

    with pytest.raises(Stop):
        call(setup, NUM_STEPS, stopping, resume=folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run in the middle of its reverse pass."""
    folder = cut_off(tmp_path_factory.mktemp("original") / "run", NUM_STEPS + 2)
    # The second process writes down how far it came at once.
    cut_off(folder, 6)
    assert {path.name.split("-")[0].split(".")[0] for path in folder.iterdir()} == {*KINDS, "lock"}
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.mark.parametrize("place", ["first", "header", "middle", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found(kind, place, folder):
    # Of the states the first, which every run has to read.
    path = min(folder.glob(f"{kind}*"))
    content = bytearray(path.read_bytes())
    content[{"first": 0, "header": 11, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    path.write_bytes(content)
    with pytest.raises(mg.ResumeError) as caught:
        call(SETUP, NUM_STEPS, resume=folder)
    assert str(path) in str(caught.value)
    content[{"first": 0, "header": 11, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    path.write_bytes(content)
    assert same(tensors(call(SETUP, NUM_STEPS, resume=folder)), tensors(call(SETUP, NUM_STEPS)))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_shortened_file_is_found(kind, folder):
    path = min(folder.glob(f"{kind}*"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(mg.ResumeError, match=f"{path.name} is damaged"):
        call(SETUP, NUM_STEPS, resume=folder)


def test_a_missing_trained_state_is_found(folder):
    next(folder.glob("final*")).unlink()
    with pytest.raises(mg.ResumeError, match="holds no final-"):
        call(SETUP, NUM_STEPS, resume=folder)


def test_missing_states_and_digests_are_made_again(folder):
    for path in [*folder.glob("state*"), *folder.glob("witness*")]:
        path.unlink()
    assert same(tensors(call(SETUP, NUM_STEPS, resume=folder)), tensors(call(SETUP, NUM_STEPS)))


def weights_but_one() -> torch.Tensor:
    weights = torch.ones(6)
    weights[4] += 1e-15
    return weights


def swapped_batches() -> list[dict[str, torch.Tensor]]:
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(4.0)
    return [{"index": torch.arange(4), "x": x, "y": y}] * NUM_STEPS


OTHERS = {
    "another weight": ({"meta": {"weights": weights_but_one()}}, r"meta\['weights'\] was"),
    "another name in meta": ({"meta": {"weights": torch.ones(6), "lr": torch.tensor(1.0)}}, r"meta\['lr'\] was None"),
    "other batches": ({"batches": swapped_batches()}, r"batches\[0\] was"),
    "other parameters": ({"params": {"a": torch.ones(3, 5), "b": torch.ones(5)}}, r"state.params\['a'\] was"),
    "another metric": ({"metric": corner}, "metric 0 was"),
    "more metrics": ({"metric": [corner, corner]}, "metric [01] was"),
    "other gradients asked for": ({"wrt_params": False}, "wrt_params was True and is False"),
    "another optimizer": ({"step": mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.1))}, "state.optimizer.* was"),
    "another loss": (
        {"step": mg.TrainStep(mg.weighted(lambda p, b: 2 * loss(p, b)), mg.optim.adamw(lr=0.02))},
        "begun with another step",
    ),
    "another seed": ({"step": mg.TrainStep(mg.weighted(loss), mg.optim.adamw(lr=0.02), seed=1)}, r"state.rng\[0\] was"),
    "other micro-batches": (
        {"step": mg.TrainStep(mg.weighted(loss), mg.optim.adamw(lr=0.02), microbatch_size=1)},
        "begun with another step",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused(name, folder):
    options, message = OTHERS[name]
    with pytest.raises(mg.ResumeError, match=message):
        call(SETUP, NUM_STEPS, **options, resume=folder)
    # Nothing was changed, and the folder is not left locked.
    assert same(tensors(call(SETUP, NUM_STEPS, resume=folder)), tensors(call(SETUP, NUM_STEPS)))


def test_another_number_of_steps_is_refused(folder):
    with pytest.raises(mg.ResumeError, match="number of steps was 12 and is 13"):
        call(SETUP, NUM_STEPS + 1, resume=folder)


@pytest.mark.parametrize("evaluations", [2, 3, 5, 9])
@pytest.mark.parametrize("name", SETUPS)
def test_another_learning_rate_is_refused_from_the_second_step_on(name, evaluations, tmp_path):
    pieces = 1 if SETUPS[name].microbatch_size is None else 2
    folder = cut_off(tmp_path / "run", evaluations * pieces, SETUPS[name])
    with pytest.raises(mg.ResumeError, match="begun with another step"):
        call(SETUPS[name], NUM_STEPS, lr=0.03, resume=folder)


def test_another_number_of_threads_is_refused(folder):
    try:
        torch.set_num_threads(2)
        with pytest.raises(mg.ResumeError, match="number of threads was 1 and is 2"):
            call(SETUP, NUM_STEPS, resume=folder)
    finally:
        torch.set_num_threads(1)


def test_another_version_of_the_code_is_refused(folder):
    marks = json.loads((folder / "run.json").read_text())
    marks["version of metagrad"] = "0" * 16
    (folder / "run.json").write_text(json.dumps(marks, indent=0, sort_keys=True))
    with pytest.raises(mg.ResumeError, match="version of metagrad was 0000000000000000 and is"):
        call(SETUP, NUM_STEPS, resume=folder)


def test_a_folder_of_other_things_is_refused_and_left_as_it_was(tmp_path):
    for name in ("thesis.txt", "chapter.unfinished"):
        (tmp_path / name).write_text("years of work")
    with pytest.raises(mg.ResumeError, match="has no run.json, but holds chapter.unfinished"):
        call(SETUP, NUM_STEPS, resume=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "chapter.unfinished", "lock"}


def test_a_file_that_no_run_wrote_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(mg.ResumeError, match="model.safetensors is damaged: no file of a run has such a name"):
        call(SETUP, NUM_STEPS, resume=folder)


def test_a_store_does_not_take_a_folder_with_states(folder):
    with pytest.raises(ValueError, match="already holds states, such as state-00000000"):
        mg.DiskStore(folder)


def slow_run(folder: Path) -> None:
    def slow(params, batch):
        sleep(60)
        return loss(params, batch)

    call(SETUP, NUM_STEPS, slow, resume=folder)


def test_a_folder_in_use_is_refused_until_the_other_process_is_dead(tmp_path):
    other = forked(slow_run, tmp_path / "run")
    while not (tmp_path / "run" / "run.json").exists():
        assert other.is_alive()
        sleep(0.01)
    with pytest.raises(mg.ResumeError, match=f"{tmp_path / 'run'} is in use by another process"):
        call(SETUP, NUM_STEPS, resume=tmp_path / "run")
    other.kill()
    other.join()
    assert same(tensors(call(SETUP, NUM_STEPS, resume=tmp_path / "run")), tensors(call(SETUP, NUM_STEPS)))


def test_a_store_besides_the_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Leave `store` out"):
        call(SETUP, NUM_STEPS, store=mg.RamStore(), resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_killed_process_leaves_no_lock(tmp_path):
    process = forked(mortal_run, SETUP, NUM_STEPS, tmp_path / "run", tmp_path / "out", Death("evaluation", 3))
    process.join()
    assert (tmp_path / "run" / "lock").exists()
    assert same(tensors(call(SETUP, NUM_STEPS, resume=tmp_path / "run")), tensors(call(SETUP, NUM_STEPS)))
