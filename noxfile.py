"""The project's checks: `nox` runs lint, types and tests; `nox -s demo` runs the demonstration and its proof."""

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types: mypy, strict on `metagrad`."""
    session.install(*CONSTRAINTS, "-e", ".[types]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, on two processes of one thread each (more threads than cores spin against each other)."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize(
    "step",
    [
        '{"curvature": "auto"}',
        '{"curvature": "forward-over-reverse"}',
        '{"curvature": "reverse-over-forward"}',
        '{"compile": true}',
    ],
    ids=["auto", "forward-over-reverse", "reverse-over-forward", "compiled"],
)
def exactness(session: nox.Session, step: str) -> None:
    """The tests of exact gradients once more, with second derivatives computed in each way (up to an hour compiled)."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    claims = ["gradients_are_exact", "schedules_change_no_number", "several_metrics_share_one_replay", "step_adjoint"]
    paths = [f"tests/test_{claim}.py" for claim in claims]
    # Not those that count bytes: a gradient is kept with each state.
    options = ["-n", "2", "-k", "not kept", "--step", step]
    session.run("pytest", *options, *paths, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize("num_ranks", [2, 4])
def ranks(session: nox.Session, num_ranks: int) -> None:
    """The tests of runs over several processes, in as many."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    command = ["torchrun", "--nproc-per-node", str(num_ranks), "--module", "pytest"]
    for file in "over_ranks", "over_ranks_sharded", "over_ranks_recut":
        session.run(*command, f"tests/{file}.py", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a CUDA device, with whatever torch is asked for by `-- TORCH`, or the newest that fits."""
    session.install(*session.posargs or ["torch>=2.11"])
    session.install("-e", ".[test]")
    session.run("pytest", "tests/test_on_a_gpu.py", "tests/test_dpg_on_a_gpu.py", "-rs")


@nox.session
def docs(session: nox.Session) -> None:
    """The pages and the API reference as a site, build/site/index.html; a broken link or name fails."""
    session.install(*CONSTRAINTS, "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def demo(session: nox.Session) -> None:
    """Draw "67" into a language model's weights and prove that the data does it."""
    session.install(*CONSTRAINTS, "-e", ".[demo]")
    out = session.create_tmp() + "/sixseven"
    session.run("dpg", "run", "sixseven", "--out", out, *session.posargs)
    session.run("dpg", "verify", out)


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory beside plain training and other libraries; `nox -s bench -- --quick` for a first look."""
    session.install(*CONSTRAINTS, "-e", ".[bench]")
    # Alone: it asks for torchvision, torchaudio and bitsandbytes, of which its trainer imports none.
    session.install(*CONSTRAINTS, "--no-deps", "bergson==2.5.1")
    session.run("python", "-m", "benchmarks.peers", *session.posargs)
