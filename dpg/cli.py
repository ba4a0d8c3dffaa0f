"""The command line, `dpg`: runs and what comes before and after them. A command says what it does by --help."""

import errno
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dpg.plan.command import plan
from dpg.upkeep import collector_paused, forget_what_stays, keep_freed_memory

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Dataset Policy Gradients: train a generator to write the data that makes a model what you want.",
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="Its name; `dpg list` shows them.")],
    seed: Annotated[int | None, typer.Option(help="Of everything random. (default: the preset's, or 0)")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/EXPERIMENT-SEED)")] = None,
    preset: Annotated[str, typer.Option(help="laptop, paper, or a YAML file as `preset.yaml` in a run folder.")] = (
        "laptop"
    ),
    generator: Annotated[str | None, typer.Option(help="Folder or hub name of a causal language model.")] = None,
    target: Annotated[str | None, typer.Option(help="Folder or hub name of a causal language model.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Text or JSON-lines file, or a data set.")] = None,
    metric: Annotated[str | None, typer.Option(help="Of `custom`: module:name or file.py:name.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    engine: Annotated[str, typer.Option(help="What trains: builtin, or trl for its GRPOTrainer.")] = "builtin",
    trl_config: Annotated[Path | None, typer.Option(help="YAML file of further GRPOConfig fields.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Run an experiment; writes figures, pictures, texts and the trained generator into a folder."""
    keep_freed_memory()
    with collector_paused():
        from dpg.engine import engine as engine_of
        from dpg.preset import load, parse
        from dpg.run import run as run_experiment

        training = engine_of(engine, trl_config)
    forget_what_stays()

    options = {"seed": seed, "generator": generator, "target": target, "prompts": prompts, "function": metric}
    given = {key: value for key, value in options.items() if value is not None}
    chosen = load(experiment, preset).changed({**given, **parse(set_ or [])})
    path = out or Path("runs") / f"{experiment}-{chosen.settings.seed}"
    start = time.perf_counter()
    command = shlex.join(["dpg", *(argument for argument in sys.argv[1:] if argument != "--resume")])
    run_experiment(chosen, path, resume=resume, command=command, engine=training)
    if training.is_main:
        print(f"finished in {time.perf_counter() - start:.0f} s: see {path / 'report.md'}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A finished run folder.")],
    debug: Debug = False,
) -> None:
    """Fine-tune a fresh target on a run's data in the ordinary way, beside two controls."""
    from dpg.verify import verify as verify_run

    for source, figures in verify_run(path):
        print(f"{source:<24} {'  '.join(f'{name} {value:.6g}' for name, value in figures.items())}")


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(help="Its name; `dpg list` shows them.")],
    variants: Annotated[str, typer.Option(help="Names in the preset, with commas. (default: all)")] = "",
    seeds: Annotated[str, typer.Option(help="Numbers, with commas.")] = "0,1,2",
    out: Annotated[Path | None, typer.Option(help="Folder. (default: runs/compare-EXPERIMENT)")] = None,
    preset: Annotated[str, typer.Option(help="laptop, paper, or a YAML file.")] = "laptop",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, of one thread each.")] = 1,
    debug: Debug = False,
) -> None:
    """Run variants and seeds of an experiment, and write a table of them with controls; goes on where it stopped."""
    from dpg.compare import compare as run_comparison
    from dpg.preset import load, parse

    chosen = load(experiment, preset).changed(parse(set_ or []))
    names = [name for name in variants.split(",") if name] or list(chosen.variants)
    path = out or Path("runs") / f"compare-{experiment}"
    run_comparison(chosen, names, _numbers("--seeds", seeds, int), path, jobs=jobs)
    print((path / "table.md").read_text())


@app.command()
def transfer(
    path: Annotated[Path, typer.Argument(help="A finished run folder.")],
    texts: Annotated[int, typer.Option(help="Texts of each kind to train on.")] = 16384,
    debug: Debug = False,
) -> None:
    """Train a fresh target on far more of a run's texts than a reward saw, beside two controls."""
    from dpg.transfer import transfer as run_transfer

    for source, points in run_transfer(path, num_texts=texts).items():
        figures = "  ".join(f"{name} {value:.6g}" for name, value in points[-1].figures.items())
        print(f"{source:<24} after {points[-1].num_tokens} tokens: {figures}")


@app.command()
def fidelity(
    path: Annotated[Path, typer.Argument(help="A finished run folder.")],
    texts: Annotated[int, typer.Option(help="Texts that the target trains on.")] = 128,
    left_out: Annotated[int, typer.Option(help="Texts left out, one at a time.")] = 32,
    changes: Annotated[int, typer.Option(help="Random changes of all weights.")] = 16,
    spread: Annotated[float, typer.Option(help="Standard deviation of the changes.")] = 0.1,
    inner_steps: Annotated[str, typer.Option(help="Numbers of inner steps, with commas.")] = "1,2,4",
    lr_factors: Annotated[
        str, typer.Option(help="Learning rates as multiples of the run's, with commas.")
    ] = "0.1,1,10",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    debug: Debug = False,
) -> None:
    """Compare a run's rewards with true changes of Φ: texts left out, weights changed, and the target trained again."""
    from dpg.fidelity import fidelity as study
    from dpg.fidelity_page import summary

    cells = study(
        path,
        num_texts=texts,
        num_left_out=left_out,
        num_changes=changes,
        spread=spread,
        inner_steps=_numbers("--inner-steps", inner_steps, int),
        lr_factors=_numbers("--lr-factors", lr_factors, float),
        seed=seed,
    )
    print(summary(cells))
    print(f"see {path / 'fidelity.md'}")


@app.command("enumerate")
def enumerate_gradients(
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("runs/enumeration"),
    seed: Annotated[int, typer.Option(help="Of the tiny problem.")] = 0,
    debug: Debug = False,
) -> None:
    """Compare the DPG gradient with the true policy gradient of a generator small enough to sum over all data sets."""
    from dpg.enumeration import enumeration
    from dpg.enumeration_page import summary

    print(summary(enumeration(out, seed=seed)))
    print(f"see {out / 'enumeration.md'}")


@app.command()
def serve(
    experiment: Annotated[str, typer.Argument(help="Its name; `dpg list` shows them.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback want a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any free one.")] = 8067,
    token_file: Annotated[Path | None, typer.Option(help="Holds the token. (default: DPG_REWARD_TOKEN)")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.jsonl. (default: none)")] = None,
    preset: Annotated[str, typer.Option(help="laptop, paper, or a YAML file.")] = "laptop",
    target: Annotated[str | None, typer.Option(help="Folder or hub name of a causal language model.")] = None,
    metric: Annotated[str | None, typer.Option(help="Of `custom`: module:name or file.py:name.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    limit: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change a limit: docs/serve.md.")] = None,
    debug: Debug = False,
) -> None:
    """Serve an experiment's rewards to a trainer that asks for one sample at a time: verl, OpenRLHF, prime-rl."""
    keep_freed_memory()
    with collector_paused():
        from dpg.preset import load, parse
        from dpg.serve.command import serve as serve_rewards
    forget_what_stays()

    options = {"target": target, "function": metric}
    given = {key: value for key, value in options.items() if value is not None}
    chosen = load(experiment, preset).changed({**given, **parse(set_ or [])})
    serve_rewards(chosen, host, port, token_file, out, limit or [])


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="A finished run folder.")],
    repo: Annotated[str, typer.Option(help="NAME or OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Of repositories that are made now.")] = False,
    what: Annotated[str, typer.Option(help="generator, dataset or both.")] = "both",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and do not.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a run's generator and data set, with their cards, to the Hugging Face hub."""
    from dpg.publish import push as push_run
    from dpg.publish import uploads

    print(*(uploads(path, repo, what) if dry_run else push_run(path, repo, private=private, what=what)), sep="\n")


app.command()(plan)


@app.command("list")
def list_experiments(debug: Debug = False) -> None:
    """Show the experiments."""
    from dpg.experiments import EXPERIMENTS

    for experiment in EXPERIMENTS.values():
        print(f"{experiment.name:<12} {experiment.goal}")


def main() -> None:
    """Run the command line; errors of the user's become one line on standard error."""
    # Loading bars and advice to developers would break the display; what the user set goes first.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        print(f"dpg: {_message(error)}", file=sys.stderr)
        sys.exit(1)


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of an option, which commas separate."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        name = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} {text}: expected {name} with commas, as 0,1,2.") from None


def _message(error: Exception) -> str:
    """One line for a person; an error nobody foresaw says its kind and how to see more."""
    if os.strerror(errno.ENOSPC) in str(error):  # Not every library says so with an OSError.
        return f"the disk is full ({error}). What was written before is intact: free some space. A run has --resume."
    text, kind = " ".join(str(error).split()), type(error)
    if text and (
        kind is ValueError or isinstance(error, OSError) or kind.__module__.split(".")[0] in ("dpg", "metagrad")
    ):
        return text
    return f"{kind.__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    main()
