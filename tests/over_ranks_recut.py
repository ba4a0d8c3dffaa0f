"""The tests of sharded runs that are cut off, and go on with as many processes or another number of them.

    torchrun --nproc-per-node 4 -m pytest tests/over_ranks_recut.py

`tests/test_ranks_are_one_process.py` does that.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from agreement import assert_agree, assert_same_bits
from over_ranks import PLAIN, ranks  # noqa: F401  # a fixture
from over_ranks_sharded import OPTIMIZERS, sharded, together

import metagrad as mg
from metagrad import _recut


@pytest.mark.parametrize("schedule", [mg.EveryStep(), mg.Binomial(2)], ids=str)
@pytest.mark.parametrize("when", ["forward", "metric", "reverse"])
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(ranks, tmp_path_factory, monkeypatch, when, schedule):  # noqa: F811
    monkeypatch.setattr("metagrad._resume.PAUSE", 0)
    folder = ranks.first(str(tmp_path_factory.mktemp("run")), "the folder") + "/run"
    metric, step, params, batches, meta = sharded(ranks, PLAIN["shared"](6).arguments(OPTIMIZERS["adamw"]))
    expected = together(mg.metagradient(metric, step, params, batches, meta, schedule=schedule, wrt_params=True))
    calls = 0

    def cut_off(params, batch, meta):
        nonlocal calls
        calls += 1
        if calls == {"forward": 5, "metric": -1, "reverse": 11}[when]:
            raise KeyboardInterrupt
        return step.step.loss(params, batch, meta)

    def failing(state):
        if when == "metric" and state.step == 6:
            raise KeyboardInterrupt
        return metric(state)

    dying = replace(step, step=replace(step.step, loss=cut_off))
    options = {"schedule": schedule, "wrt_params": True, "resume": folder}
    with pytest.raises(KeyboardInterrupt):
        mg.metagradient(failing, dying, params, batches, meta, **options)
    result = mg.metagradient(metric, step, params, batches, meta, **options)
    assert result.stats.forward + result.stats.replayed < 6 or schedule != mg.EveryStep()
    assert_same_bits(together(result), expected)


@pytest.fixture(scope="session")
def half(ranks):  # noqa: F811
    """The first half of the ranks as ranks of their own; None for the others."""
    chosen = list(range(ranks.num_ranks // 2))
    group = torch.distributed.new_group(chosen)
    return type(ranks)(group, ranks.timeout) if ranks.rank in chosen else None


@pytest.mark.parametrize("several", [False, True], ids=["one metric", "several"])
@pytest.mark.parametrize("grows", [False, True], ids=["fewer", "more"])
@pytest.mark.parametrize("cut_at", [5, 9, 17])
def test_another_number_of_ranks_goes_on(ranks, half, tmp_path_factory, monkeypatch, cut_at, grows, several):  # noqa: F811
    """From half the ranks to all, or back; in the forward run, at the metric, in the reverse pass."""
    monkeypatch.setattr("metagrad._resume.PAUSE", 0)
    folder = Path(ranks.first(str(tmp_path_factory.mktemp("run")), "the folder")) / "run"
    metric, *rest = PLAIN["shared"](8).arguments(OPTIMIZERS["adamw"])
    early = mg.Trajectory({3: metric, 8: lambda state: state.params["out.bias"].square().sum()})
    alone = [metric, early] if several else metric, *rest
    expected = mg.metagradient(*alone, wrt_params=True)
    options = {"schedule": mg.Binomial(3), "wrt_params": True, "resume": folder}
    first, last = (half, ranks) if grows else (ranks, half)
    if first is not None:
        metric, step, params, batches, meta = sharded(first, alone)
        calls = 0

        def cut_off(params, batch, meta):
            nonlocal calls
            calls += 1
            if calls == cut_at:
                raise KeyboardInterrupt
            return step.step.loss(params, batch, meta)

        dying = replace(step, step=replace(step.step, loss=cut_off))
        with pytest.raises(KeyboardInterrupt):
            mg.metagradient(metric, dying, params, batches, meta, **options)
    ranks.gathered(None, "the end of the first run")
    if last is not None:
        metric, step, params, batches, meta = sharded(last, alone)
        if cut_at == 5:
            moved = {name: value + 1 for name, value in rest[1].named_parameters()}
            with pytest.raises((mg.ResumeError, mg.distributed.RankError), match="its initial state is another"):
                mg.metagradient(metric, step, moved, batches, meta, **options)
        result = mg.metagradient(metric, step, params, batches, meta, **options)
        assert_agree(together(result), expected, rtol=1e-12)
        assert result.stats.forward < 8  # It did go on.
        assert not list(folder.glob(f"*-of-{first.num_ranks if first else ranks.num_ranks // 2}"))
    ranks.gathered(None, "the end of the second run")


@pytest.mark.parametrize("where", ["written", "renamed", "removed"])
def test_a_change_of_ranks_may_be_cut_off_too(ranks, half, tmp_path_factory, monkeypatch, where):  # noqa: F811
    """By an error of one rank: in the second file, before its folder is in place, after the first old one is gone."""
    monkeypatch.setattr("metagrad._resume.PAUSE", 0)
    folder = Path(ranks.first(str(tmp_path_factory.mktemp("run")), "the folder")) / "run"
    alone = PLAIN["shared"](6).arguments(OPTIMIZERS["adamw"])
    options = {"schedule": mg.Binomial(3), "wrt_params": True, "resume": folder}
    if half is not None:
        metric, *rest = sharded(half, alone)

        def failing(state):
            if state.step == 6:
                raise KeyboardInterrupt
            return metric(state)

        with pytest.raises(KeyboardInterrupt):
            mg.metagradient(failing, *rest, **options)
    ranks.gathered(None, "the end of the first run")

    def fails_at(count, function, matters=lambda *arguments: True):
        left = count

        def failing(*arguments, **more):
            nonlocal left
            if matters(*arguments):
                left -= 1
                if left == 0 and ranks.rank == (0 if where == "removed" else ranks.num_ranks - 1):
                    raise OSError("no more")
            return function(*arguments, **more)

        return failing

    with monkeypatch.context() as patch:
        if where == "written":
            patch.setattr(_recut, "write_tree", fails_at(2, _recut.write_tree))
        elif where == "renamed":
            patch.setattr(Path, "rename", fails_at(1, Path.rename, lambda path, to: path.name.startswith("recut-")))
        else:
            patch.setattr(_recut, "sync_folder", fails_at(1, _recut.sync_folder))
        with pytest.raises((OSError, mg.distributed.RankError), match="no more"):
            mg.metagradient(*sharded(ranks, alone), **options)
    result = mg.metagradient(*sharded(ranks, alone), **options)
    assert result.stats.forward == 0
    assert_agree(together(result), mg.metagradient(*alone, wrt_params=True), rtol=1e-12)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank-{r}-of-{ranks.num_ranks}" for r in range(ranks.num_ranks)
    ]
