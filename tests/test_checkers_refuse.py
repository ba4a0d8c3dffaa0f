"""Every ValueError that the docstrings of the referees name: what was given and what to do."""

import re

import pytest
import torch
from quadratic import quadratic

import metagrad as mg


def compare_with(**changes):
    def attempt(**options):
        arguments = quadratic()
        result = mg.metagradient(*arguments, wrt_params=True)._replace(**changes)
        mg.check.finite_differences(*arguments, **options).compare(result)

    return attempt


METRIC = quadratic()[0]


def call(name, *, metric=METRIC, batches=(None,), meta=None, **options):
    def attempt():
        _, step, params, _, own = quadratic()
        rest = step, params, batches, own if meta is None else meta
        if name in ("step_adjoint", "determinism"):
            getattr(mg.check, name)(*rest, **options)
        else:
            getattr(mg.check, name)(metric, *rest, **options)

    return attempt


TARGET = {"lr": torch.tensor(0.1), "target": torch.tensor(2.0)}
ERRORS = {
    "differences of two metrics": (
        call("finite_differences", metric=[len, len]),
        "list of 2. Check one metric at a time",
    ),
    "smoothness of two metrics": (call("metasmoothness", metric=[len, len]), "list of 2. Check one metric at a time"),
    "a metric that is a number": (call("finite_differences", metric=3.0), "`metric` is a float"),
    "a vector for a metric": (
        call("finite_differences", metric=lambda s: torch.ones(2)),
        r"the metric returned.*shape \(2,\)",
    ),
    "no direction": (call("finite_differences", num_directions=0), "`num_directions` is 0"),
    "no step": (call("finite_differences", step_size=0.0), r"`step_size` is 0\.0"),
    "one level": (call("finite_differences", num_levels=1), "`num_levels` is 1. Pass at least 2"),
    "one level of a step": (call("step_adjoint", num_levels=1), "`num_levels` is 1. Pass at least 2"),
    "a negative step": (call("step_adjoint", step_size=-1.0), r"`step_size` is -1\.0"),
    "nothing to move": (
        call("finite_differences", meta={**TARGET, "lr": 0.1, "target": 2.0}),
        "no floating-point tensor to move. Pass one, or wrt_params=True",
    ),
    "no batches": (call("finite_differences", batches=[]), "`batches` is empty"),
    "no batches for a step": (call("step_adjoint", batches=[]), "`batches` is empty"),
    "no batches to repeat": (call("determinism", batches=[]), "`batches` is empty"),
    "another result's metaparameters": (
        compare_with(meta={"other": torch.tensor(1.0)}),
        r"`result\.meta` is \{'other'.*moved \{'lr'.*same run",
    ),
    "another shape": (compare_with(meta={**TARGET, "lr": torch.ones(2)}), r"'lr': a float64 tensor of shape \(2,\)"),
    "a result of several metrics": (compare_with(value=torch.ones(3)), "`result` holds 3 metrics"),
    "another run": (compare_with(value=torch.tensor(7.0)), r"`result\.value` is 7, but the metric of this run is 0\.8"),
    "no gradient of the parameters": (
        lambda: compare_with(params=None)(wrt_params=True),
        r"`result\.params` is None. Pass wrt_params=True",
    ),
    "other parameters": (
        lambda: compare_with(params={"w": torch.tensor(1.0)})(wrt_params=True),
        r"`result\.params` is \{'w'.*moved \{'theta'",
    ),
    "no metric": (call("unrolled", metric=[]), "`metric` is an empty list"),
    "a string for a metric": (call("unrolled", metric=[3]), "`metric` is a int"),
    "a constant metric": (call("unrolled", metric=lambda s: torch.tensor(1.0)), "depends on nothing"),
    "a metric of two axes": (
        call("unrolled", metric=lambda s: torch.ones(1)),
        r"shape \(1,\).*Return a floating-point",
    ),
    "a step outside the run": (call("step_adjoint", at=1), "`at` is 1, but the run has steps 0 to 0"),
    "a step before the run": (call("step_adjoint", at=-1), "`at` is -1"),
    "no size": (call("metasmoothness", step_sizes=[]), r"`step_sizes` is \[\]"),
    "a size of zero": (call("metasmoothness", step_sizes=[0.1, 0.0]), "Pass a number above 0"),
    "no direction to be smooth in": (call("metasmoothness", num_directions=0), "`num_directions` is 0"),
    "an empty list of directions": (call("metasmoothness", directions=[]), "`directions` is empty"),
    "a direction of another shape": (
        call("metasmoothness", directions=[{**TARGET, "lr": torch.ones(2)}]),
        r"a direction is .*shape \(2,\).*`meta` is",
    ),
    "a direction with another key": (
        call("metasmoothness", directions=[{"lr": torch.tensor(0.1), "goal": torch.tensor(2.0)}]),
        "a direction is .*'goal'",
    ),
    "metaparameters that do nothing": (
        call(
            "metasmoothness",
            meta={**TARGET, "idle": torch.ones(2)},
            directions=[{"lr": torch.tensor(0.0), "target": torch.tensor(0.0), "idle": torch.ones(2)}],
        ),
        "do not change with the metaparameters",
    ),
    "no metaparameters": (
        call("metasmoothness", meta={**TARGET, "lr": 0.1, "target": 2.0}),
        "no floating-point tensor",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_work_says_why(case):
    attempt, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        attempt()
