"""Where a state cannot be written, the error says what to do, nothing is left torn, and the run can go on."""

import ctypes
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from durable import SETUPS, Setup, call, forked, loss, same, tensors

import metagrad as mg

NUM_STEPS = 20
NO_ROOM = r"could not be written to .*make room, and call again"
CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT = 0x00020000, 0x10000000, 32


def in_a_process(check: Callable[..., None], *arguments: object) -> None:
    """Run `check` where limits, mounts and threads of its own do no harm; it must end by itself."""
    process = forked(check, *arguments)
    process.join(60)
    hung = process.is_alive()
    process.kill()
    assert not hung and process.exitcode == 0


def no_more_writing(evaluation: int) -> Callable[..., torch.Tensor]:
    """The loss, and from this evaluation on no file of this process can grow beyond 500 bytes."""
    left = evaluation

    def limited(params, batch):
        nonlocal left
        left -= 1
        if left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        return loss(params, batch)

    return limited


def room_again() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def check_resume(setup: Setup, folder: Path) -> None:
    wanted = tensors(call(setup._replace(schedule=mg.EveryStep()), NUM_STEPS))
    for evaluation in (1, 12, 12, 12, 8):
        try:
            with pytest.raises(OSError, match=NO_ROOM):
                call(setup, NUM_STEPS, no_more_writing(evaluation), resume=folder)
        finally:
            room_again()
        assert not any(folder.glob("*.unfinished"))
    assert same(tensors(call(setup, NUM_STEPS, resume=folder)), wanted)


@pytest.mark.parametrize("name", SETUPS)
def test_a_run_goes_on_when_there_is_room(name, tmp_path):
    in_a_process(check_resume, SETUPS[name], tmp_path / "run")


def check_first_file(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="run.json " + NO_ROOM):
        call(SETUPS["binomial"], NUM_STEPS, resume=folder)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    room_again()
    wanted = tensors(call(SETUPS["binomial"], NUM_STEPS))
    assert same(tensors(call(SETUPS["binomial"], NUM_STEPS, resume=folder)), wanted)


def test_not_even_room_for_the_first_file(tmp_path):
    in_a_process(check_first_file, tmp_path / "run")


def check_store(setup: Setup, folder: Path) -> None:
    for evaluation in (1, 5, 9):
        with pytest.raises(OSError, match=NO_ROOM):
            call(setup, NUM_STEPS, no_more_writing(evaluation), store=mg.DiskStore(folder / str(evaluation)))
        room_again()
        assert not any((folder / str(evaluation)).glob("*.unfinished"))
        assert threading.active_count() == 1


@pytest.mark.parametrize("name", SETUPS)
def test_an_error_of_the_background_comes_to_the_surface(name, tmp_path):
    in_a_process(check_store, SETUPS[name], tmp_path)


class Stop(Exception):
    """What a loss raises in the middle of a run."""


def check_ends(folder: Path) -> None:
    """Runs that are never finished: the process ends all the same."""
    store, left = mg.DiskStore(folder / "cut off"), 12

    def stopping(params, batch):
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop
        return loss(params, batch)

    with pytest.raises(Stop):
        call(SETUPS["every step"], NUM_STEPS, stopping, store=store)
    assert threading.active_count() == 1
    step = mg.TrainStep(lambda p, batch, meta: (p["w"] - batch).square(), mg.optim.sgd(0.1))
    trained = mg.train(step, {"w": torch.tensor(1.0)}, [torch.ones(2)] * 5, {}, store=mg.DiskStore(folder / "kept"))
    assert trained.step == 5


def test_a_process_ends_after_a_run_that_does_not(tmp_path):
    in_a_process(check_ends, tmp_path)


def test_a_disk_store_can_be_used_again(tmp_path):
    store, setup = mg.DiskStore(tmp_path), SETUPS["hierarchical"]
    first = tensors(call(setup, NUM_STEPS, store=store))
    assert not any(tmp_path.iterdir())
    assert same(tensors(call(setup, NUM_STEPS, store=store)), first)


def mount_small_disk(folder: Path) -> ctypes.CDLL | None:
    """Mount a file system of 80 kB that only this process sees; None where that is not permitted."""
    libc, user = ctypes.CDLL(None, use_errno=True), os.getuid()
    if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)) != 0:
        return None
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    # Private, or the mount would be seen outside too.
    if libc.mount(b"none", b"/", None, 0x44000, None) != 0:
        return None
    return libc if libc.mount(b"small", bytes(folder), b"tmpfs", 0, b"size=80k") == 0 else None


def check_mounted(folder: Path, report: Path) -> None:
    libc = mount_small_disk(folder)
    if libc is None:
        report.write_text("not permitted")
        return
    setup = SETUPS["every step"]
    wanted = tensors(call(setup, NUM_STEPS))
    with pytest.raises(OSError, match=NO_ROOM):
        call(setup, NUM_STEPS, resume=folder / "run")
    assert not any((folder / "run").glob("*.unfinished"))
    num_kept = len(list((folder / "run").glob("state-*")))
    assert libc.mount(b"small", bytes(folder), b"tmpfs", MS_REMOUNT, b"size=4m") == 0
    result = call(setup, NUM_STEPS, resume=folder / "run")
    assert same(tensors(result), wanted)
    # It went on from the last state that had found room.
    assert result.stats.forward == NUM_STEPS - (num_kept - 1)
    report.write_text(str(num_kept))


def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / "disk").mkdir()
    in_a_process(check_mounted, tmp_path / "disk", tmp_path / "report")
    report = (tmp_path / "report").read_text()
    if report == "not permitted":
        pytest.skip("this process may not mount a file system")
    assert 2 <= int(report) < NUM_STEPS
