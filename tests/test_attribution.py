"""Scores are metagradients; predictions are exact where Φ is linear in the weights; retraining is what it says."""

import os
import signal

import pytest
import torch
from agreement import relative_error
from hypothesis import given
from hypothesis import strategies as st
from optimizers import OPTIMIZERS
from problems import PROBLEMS
from scipy.stats import spearmanr

import metagrad as mg
from metagrad import attribution

NUM_EXAMPLES = 7


def mlp(num_steps=3, optimizer="momentum"):
    """Three queries, and the arguments after them."""
    problem = PROBLEMS["mlp"](num_steps)
    metrics = [
        problem.metric,
        lambda s: s.params["b"].sum(),
        mg.Trajectory({1: problem.metric, num_steps: problem.metric}),
    ]
    return metrics, (problem.step(OPTIMIZERS[optimizer]), problem.params, problem.batches)


def linear():
    """One step of SGD from a fixed start and metrics linear in the parameters: Φ is linear in the weights."""
    generator = torch.Generator().manual_seed(0)
    x, y, probes = (torch.randn(shape, generator=generator) for shape in ((20, 4), (20,), (3, 4)))
    step = mg.TrainStep(mg.weighted(lambda p, b: (b["x"] @ p["w"] - b["y"]).square()), mg.optim.sgd(0.1))
    batches = [{"x": x, "y": y, "index": torch.arange(20)}]
    metrics = [lambda s, probe=probe: s.params["w"] @ probe for probe in probes]
    return metrics, (step, {"w": torch.zeros(4)}, batches)


@pytest.mark.parametrize("queries_at_once", [1, 2, 5])
def test_scores_are_metagradients_at_weights_of_one(queries_at_once):
    metrics, run = mlp()
    found = attribution.scores(metrics, *run, NUM_EXAMPLES, queries_at_once=queries_at_once)
    for metric, value, scores in zip(metrics, *found, strict=True):
        alone = mg.metagradient(metric, *run, {"weights": torch.ones(NUM_EXAMPLES)})
        assert relative_error(value, alone.value) <= 1e-12
        assert relative_error(scores, alone.meta["weights"]) <= 1e-12


def test_other_metaparameters_are_passed_on():
    metrics, (_, params, batches) = linear()
    step = mg.TrainStep(
        mg.weighted(lambda p, b: (b["x"] @ p["w"] - b["y"]).square()), lambda meta: mg.optim.sgd(meta["lr"])
    )
    found = [
        attribution.scores(metrics, step, params, batches, 20, meta={"lr": torch.tensor(lr)}).scores
        for lr in (0.1, 0.2)
    ]
    assert relative_error(found[1], 2 * found[0]) <= 1e-14


def test_predictions_are_exact_where_the_metric_is_linear_in_the_weights():
    metrics, run = linear()
    scores = attribution.scores(metrics, *run, 20)
    removed = attribution.random_subsets(20, 0.3, num_subsets=12)
    assert relative_error(scores.predict(removed), attribution.retrain(metrics, *run, removed)) <= 1e-14
    found = attribution.linear_datamodeling_score(scores, metrics, *run, fraction=0.3, num_subsets=12)
    for value in [*found.by_query, *found.interval]:
        assert abs(value - 1) <= 1e-14


def test_retraining_leaves_out_what_it_says():
    """With weight 0 an example adds nothing to the sum, and the denominator stays."""
    metrics, (_, params, batches) = linear()
    removed = torch.zeros(1, 20, dtype=torch.bool)
    removed[0, [3, 5]] = True
    without = {key: value[~removed[0]] for key, value in batches[0].items()}

    def loss(params, batch, meta):
        return (batch["x"] @ params["w"] - batch["y"]).square().sum() / 20

    by_hand = mg.train(mg.TrainStep(loss, mg.optim.sgd(0.1)), params, [without], {})
    found = attribution.retrain(metrics, linear()[1][0], params, batches, removed)
    assert relative_error(found[:, 0], torch.stack([metric(by_hand) for metric in metrics])) <= 1e-14


def test_shuffled_scores_predict_nothing():
    metrics, run = linear()
    scores = attribution.scores(metrics, *run, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = scores._replace(scores=scores.scores[:, order])
    found = attribution.linear_datamodeling_score(shuffled, metrics, *run, fraction=0.2, num_subsets=200)
    low, high = found.interval
    assert low < 0.3 and high < 0.6 and found.mean < 0.5
    right = attribution.linear_datamodeling_score(scores, metrics, *run, fraction=0.2, num_subsets=200)
    assert right.interval[0] > high


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_rank_correlation_is_that_of_scipy(pairs):
    left, right = torch.tensor(pairs, dtype=torch.float64).T
    if left.unique().numel() == 1 or right.unique().numel() == 1:
        with pytest.raises(ValueError, match="the same for every subset"):
            attribution.spearman(left[None], right[None])
    else:
        wanted = spearmanr(left.numpy(), right.numpy()).statistic
        assert abs(float(attribution.spearman(left[None], right[None])) - wanted) <= 1e-14


def test_rank_correlation_by_hand():
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: centred products 2.25 + 0 + 0 + 2.25, sizes √4.5 and √5.
    found = attribution.spearman(torch.tensor([[1.0, 2.0, 2.0, 9.0]]), torch.tensor([[0.0, 5.0, 3.0, 7.0]]))
    assert abs(float(found) - 4.5 / 22.5**0.5) <= 1e-15


def test_processes_give_the_same_bits_as_one():
    metrics, run = mlp(5, "adam")
    removed = attribution.random_subsets(NUM_EXAMPLES, 0.3, num_subsets=5)
    alone = attribution.retrain(metrics, *run, removed)
    assert torch.equal(attribution.retrain(metrics, *run, removed, processes=3), alone)


class Interrupted:
    """A metric that raises in one of the evaluations."""

    def __init__(self, metric, at):
        self.metric, self.at, self.calls = metric, at, 0

    def __call__(self, state):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.metric(state)


def test_a_run_that_is_cut_off_goes_on(tmp_path):
    metrics, run = mlp()
    removed = attribution.random_subsets(NUM_EXAMPLES, 0.3, num_subsets=6)
    whole = attribution.retrain(metrics[:1], *run, removed)
    with pytest.raises(KeyboardInterrupt):
        attribution.retrain([Interrupted(metrics[0], at=6)], *run, removed, resume=tmp_path)
    assert len(list(tmp_path.glob("subset-*"))) == 3  # the first two calls tell the metric from others
    again = Interrupted(metrics[0], at=100)
    assert torch.equal(attribution.retrain([again], *run, removed, resume=tmp_path), whole)
    assert again.calls == 2 + 3


def test_a_killed_process_is_reported_and_what_was_done_is_kept(tmp_path):
    metrics, run = mlp()
    removed = attribution.random_subsets(NUM_EXAMPLES, 0.3, num_subsets=6)
    parent = os.getpid()
    calls = []

    def killer(state):
        calls.append(1)
        if os.getpid() != parent and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics[0](state)

    with pytest.raises(RuntimeError, match="a retraining process died.*fewer `processes`"):
        attribution.retrain([killer], *run, removed, processes=2, resume=tmp_path)
    whole = attribution.retrain(metrics[:1], *run, removed)
    assert torch.equal(attribution.retrain(metrics[:1], *run, removed, resume=tmp_path), whole)


def test_what_a_process_says_is_passed_on():
    metrics, run = mlp()
    parent = os.getpid()

    def broken(state):
        if os.getpid() != parent:
            raise LookupError("no such thing")
        return metrics[0](state)

    removed = attribution.random_subsets(NUM_EXAMPLES, 0.3, num_subsets=2)
    with pytest.raises(RuntimeError, match="LookupError: no such thing"):
        attribution.retrain([broken], *run, removed, processes=2)


def other_subsets(metrics, run, removed):
    return metrics, run, attribution.random_subsets(NUM_EXAMPLES, 0.3, len(removed), seed=1)


def other_optimizer(metrics, run, removed):
    return metrics, (mlp(3, "adam")[1][0], *run[1:]), removed


def other_metrics(metrics, run, removed):
    return [metrics[1], metrics[0], metrics[2]], run, removed


@pytest.mark.parametrize("change", [other_subsets, other_optimizer, other_metrics], ids=lambda f: f.__name__)
def test_the_folder_of_another_run_is_refused(tmp_path, change):
    metrics, run = mlp()
    arguments = metrics, run, attribution.random_subsets(NUM_EXAMPLES, 0.3, num_subsets=2)

    def retrained(metrics, run, removed):
        return attribution.retrain(metrics, *run, removed, resume=tmp_path)

    retrained(*arguments)
    with pytest.raises(mg.ResumeError, match="run.json is of another run"):
        retrained(*change(*arguments))
    damaged = next(tmp_path.glob("subset-000001*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(mg.ResumeError, match=f"{damaged.name} is damaged"):
        retrained(*arguments)


def test_reports_and_picture(tmp_path):
    metrics, run = linear()
    scores = attribution.scores(metrics, *run, 20)
    assert "scores of 20 examples for 3 queries" in str(scores)
    found = attribution.linear_datamodeling_score(scores, metrics, *run, fraction=0.3, num_subsets=8)
    assert "LDS 1.000 (95 % interval 1.000 to 1.000) over 3 queries and 8 random subsets of 0.3" in str(found)
    found.plot(tmp_path / "lds.png")
    assert (tmp_path / "lds.png").read_bytes().startswith(b"\x89PNG")


def refused(**changes):
    metrics, run = linear()
    arguments = {"metrics": metrics, "num_examples": 20, **changes}
    return lambda: attribution.scores(arguments.pop("metrics"), *run, arguments.pop("num_examples"), **arguments)


def refused_lds(num_metrics=3, **changes):
    metrics, run = linear()
    scores = attribution.Scores(torch.zeros(3), torch.zeros(3, 20))
    return lambda: attribution.linear_datamodeling_score(scores, metrics[:num_metrics], *run, **changes)


def refused_subsets(removed, **changes):
    metrics, run = linear()
    return lambda: attribution.retrain(metrics, *run, removed, **changes)


ALL = torch.zeros(2, 20, dtype=torch.bool)
ERRORS = {
    "no list": (refused(metrics=lambda s: s), "list of at least one function"),
    "no queries": (refused(metrics=[]), "list of at least one function"),
    "no examples": (refused(num_examples=0), "`num_examples` is 0"),
    "too few examples": (refused(num_examples=19), "`weights` has 19 entries.*example 19"),
    "no queries at once": (refused(queries_at_once=0), "`queries_at_once` 0"),
    "weights given": (refused(meta={"weights": torch.ones(20)}), "'weights', which are set here"),
    "indices as subsets": (refused_subsets(torch.tensor([[1, 2]])), "int64 of shape .*random_subsets"),
    "one subset without its axis": (refused_subsets(ALL[0]), r"shape \(20,\).*\(subsets, 20\)"),
    "no processes": (refused_subsets(ALL, processes=0), "`processes` is 0"),
    "too small a fraction": (refused_lds(fraction=0.001), "is 0, in 100 subsets.*at least one example"),
    "too large a fraction": (refused_lds(fraction=1.0), "is 20, in 100 subsets.*not all"),
    "too few subsets": (refused_lds(num_subsets=2), "`num_subsets` is 2"),
    "metrics of other scores": (refused_lds(num_metrics=2), "has 3 queries, but there are 2 metrics"),
    "subsets of other examples": (
        lambda: attribution.Scores(torch.zeros(1), torch.zeros(1, 5)).predict(ALL),
        r"shape \(2, 20\).*\(subsets, 5\)",
    ),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
