"""Contract 6: a run that is killed at any moment, or cut off by an error, goes on and gives the same bits."""

import random
from pathlib import Path

import pytest
import torch
from durable import SETUPS, Death, Setup, call, forked, loss, mortal_run, same, tensors

import metagrad as mg

NUM_STEPS = 60
MOST_STATES = {"binomial": 3, "hierarchical": 4}


def moments(draw: random.Random) -> list[Death | float]:
    """Moments of death in the order in which one run meets them; a number is in seconds after the process began."""

    def evaluations(times: int, least: int) -> list[Death]:
        return [Death("evaluation", draw.randint(least, 3 * least)) for _ in range(times)]

    forward = [Death("os.rename", 1, "run"), Death("open", 1, "state-00000000"), Death("os.rename", 1, "witness")]
    forward += [*evaluations(3, 4), draw.uniform(0, 0.08), Death("os.rename", 2, "state"), draw.uniform(0, 0.08)]
    trained = [Death("os.rename", 1, "final"), Death("open", 1, "reverse"), Death("os.rename", 1, "reverse")]
    # From the second bookmark on each process has one to begin with.
    reverse = [Death("os.rename", 2, "reverse"), *evaluations(3, 3), draw.uniform(0, 0.08), *evaluations(2, 3)]
    return [*forward, *trained, *reverse, Death("os.remove", 1, "reverse"), Death("os.remove", 1, "state")]


def kinds(folder: Path) -> set[str]:
    """The kinds of files in a run's folder."""
    whole = {path.name.split("-")[0] for path in folder.glob("*.safetensors")}
    return whole | ({"unfinished"} if any(folder.glob("*.unfinished")) else set())


def uninterrupted(setup: Setup, folder: Path) -> list[torch.Tensor]:
    store = mg.DiskStore(folder) if isinstance(setup.schedule, mg.Hierarchical) else None
    return tensors(call(setup, NUM_STEPS, store=store))


@pytest.mark.parametrize("name", SETUPS)
def test_twenty_kills_change_no_bit(name, tmp_path):
    folder, results, setup = tmp_path / "run", tmp_path / "results", SETUPS[name]
    seen: list[set[str]] = []
    for moment in moments(random.Random(name)):
        process = forked(mortal_run, setup, NUM_STEPS, folder, results, moment if isinstance(moment, Death) else None)
        process.join(moment if isinstance(moment, float) else 60)
        process.kill()
        process.join()
        assert process.exitcode == -9, f"the run was over before {moment}"
        seen.append(kinds(folder) if folder.exists() else set())
        # A bookmark besides, and a second one while it is replaced.
        assert len(list(folder.glob("state-*.safetensors"))) <= MOST_STATES.get(name, NUM_STEPS) + 2
    assert len(seen) >= 20
    assert sum("final" not in each for each in seen) >= 8
    assert sum("final" in each and "reverse" not in each for each in seen) >= 2
    assert sum("reverse" in each for each in seen) >= 6
    assert sum("unfinished" in each for each in seen) >= 6

    process = forked(mortal_run, setup, NUM_STEPS, folder, results, None)
    process.join()
    wanted = uninterrupted(setup, tmp_path / "states")
    assert process.exitcode == 0 and same(torch.load(results), wanted)
    assert kinds(folder) == {"final", "witness", "reverse"}

    again = call(setup, NUM_STEPS, resume=folder)
    assert again.stats[:3] == (0, 0, 0) and same(tensors(again), wanted)


class Stop(Exception):
    """What a loss raises in the middle of a run."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("name", SETUPS)
def test_a_run_cut_off_by_an_error_goes_on(name, kind, tmp_path):
    setup, left = SETUPS[name], 0

    def stopping(params, batch):
        nonlocal left
        left -= 1
        if left == 0:
            raise kind
        return loss(params, batch)

    for evaluations in (35, 35, 130):  # Twice in the forward run, with micro-batches too; then anywhere.
        left = evaluations
        with pytest.raises(kind):
            call(setup, NUM_STEPS, stopping, resume=tmp_path / "run")
        assert not any((tmp_path / "run").glob("*.unfinished"))
    result = call(setup, NUM_STEPS, resume=tmp_path / "run")
    assert result.stats.forward < NUM_STEPS
    assert same(tensors(result), uninterrupted(setup, tmp_path / "states"))


@pytest.mark.parametrize("operation", ["os.rename", "os.remove"])
@pytest.mark.parametrize("name", SETUPS)
def test_a_kill_before_any_operation_on_files_changes_no_bit(name, operation, tmp_path):
    # With a bookmark at every step there are all operations that there can be; the last number meets none any more.
    setup, num_steps, wanted = SETUPS[name], 4, tensors(call(SETUPS[name], 4, store=mg.DiskStore(tmp_path / "store")))
    for count in range(1, 100):
        folder, results = tmp_path / f"run{count}", tmp_path / f"results{count}"
        process = forked(mortal_run, setup, num_steps, folder, results, Death(operation, count), 0.0)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        assert same(tensors(call(setup, num_steps, resume=folder)), wanted)
    assert count > num_steps and same(torch.load(results), wanted)


def test_a_single_step_goes_on(tmp_path):
    setup = SETUPS["binomial"]
    wanted = tensors(call(setup, 1))
    for death in (Death("os.rename", 1, "final"), Death("os.rename", 1, "reverse")):
        process = forked(mortal_run, setup, 1, tmp_path / "run", tmp_path / "results", death)
        process.join()
        assert process.exitcode == -9
    assert same(tensors(call(setup, 1, resume=tmp_path / "run")), wanted)


def test_states_for_ram_stay_in_ram_after_a_kill(tmp_path):
    setup = Setup(mg.Hierarchical(3, 1))
    process = forked(mortal_run, setup, NUM_STEPS, tmp_path / "run", tmp_path / "results", Death("evaluation", 20))
    process.join()
    # The rest of the plan wants no state on disk any more. Each holds 5 kB of random numbers alone; how many there are
    # depends on how many bookmarks the killed process had the time to write.
    stats = call(setup, NUM_STEPS, resume=tmp_path / "run").stats
    assert process.exitcode == -9 and stats.ram_bytes > 5000
