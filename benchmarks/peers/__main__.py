"""Metagradients beside plain training and other libraries, by turns.

    nox -s bench                    the usual cases, about twenty minutes on two cores that do nothing else
    nox -s bench -- --quick         four small ones
    nox -s bench -- --full          everything, for days
    nox -s bench -- --device cuda   GPT-2's own sizes, on a GPU of 80 GB
    nox -s bench -- --models mlp-2M --steps 32 --threads 1 --contenders bergson

Writes table.md, peers.json, peers.png and log.txt (what the contenders print) into the folder given by --out. States
that are kept on disk go to the folder for temporary files (TMPDIR).
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers.cases import ON_GPU, QUICK, USUAL, Case, everything, selected
from benchmarks.peers.contenders import CONTENDERS, METRIC, OURS, PLAIN, Named
from benchmarks.peers.picture import draw
from benchmarks.peers.record import machine, record
from benchmarks.peers.rounds import Comparison, compare
from benchmarks.peers.table import LEGEND, table
from benchmarks.peers.tasks import LARGE, MODELS
from benchmarks.peers.worker import Settings


def main() -> None:
    arguments = _arguments()
    cases, contenders = _cases(arguments), _contenders(arguments)
    if arguments.list:
        print(*cases, sep="\n")
        return
    arguments.memory_gb = arguments.memory_gb or (12.0 if arguments.device == "cpu" else math.inf)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "log.txt"
    settings = Settings(arguments.device, arguments.threads, arguments.memory_gb, arguments.turn_seconds, log)
    settings.log.write_text("")
    with TemporaryDirectory() as compiled:
        # Read by the processes to come, before they import torch. A cache of this run alone: the first compilation
        # of each kind is timed cold.
        os.environ.update(OMP_NUM_THREADS=str(arguments.threads), TORCHINDUCTOR_CACHE_DIR=compiled)
        _measure(cases, contenders, settings, arguments.rounds, arguments.out)


def _measure(
    cases: Sequence[Case], contenders: Sequence[Named], settings: Settings, num_rounds: int, out: Path
) -> None:
    given, comparisons, tables = machine(settings, num_rounds), list[Comparison](), [LEGEND]
    print("\n".join(f"{key}: {value}" for key, value in given.items()), LEGEND, sep="\n\n", flush=True)
    for case in cases:
        taking_part = [contender for contender in contenders if case.compiles or not contender.compiles]
        comparisons.append(compare(case, taking_part, settings, num_rounds))
        tables.append(table(comparisons[-1]))
        print(f"\n{tables[-1]}", flush=True)
        # After each case: what is there is worth having if the next is too long.
        (out / "table.md").write_text("\n\n".join(tables) + "\n")
        (out / "peers.json").write_text(json.dumps({"machine": given, "cases": record(comparisons)}, indent=1))
        draw(comparisons, out / "peers.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="four small cases")
    size.add_argument("--full", action="store_true", help="all combinations")
    models = [model.name for model in [*MODELS, *LARGE]]
    parser.add_argument("--models", nargs="+", choices=models, help="of the list: only these")
    parser.add_argument("--optimizers", nargs="+", choices=["adamw", "sgd"])
    parser.add_argument("--steps", nargs="+", type=int, help="numbers of steps T")
    parser.add_argument("--pieces", nargs="+", type=int, help="micro-batches in a batch")
    parser.add_argument("--kept", nargs="+", choices=["all", "sqrt", "8 slots"], help="states that are kept")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--contenders", nargs="+", choices=names, help=f"beside {PLAIN}, {METRIC} and {OURS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn-seconds", type=float, default=2.0, help="shorter attempts are repeated within a turn")
    parser.add_argument("--memory-gb", type=float, help="what a contender may allocate (default: 12; on a GPU all)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args()


def _cases(arguments: argparse.Namespace) -> list[Case]:
    def wanted(case: Case) -> bool:
        asked = [
            (case.model.name, arguments.models),
            (case.optimizer, arguments.optimizers),
            (case.num_steps, arguments.steps),
            (case.num_pieces, arguments.pieces),
            (case.kept, arguments.kept),
        ]
        return all(values is None or value in values for value, values in asked)

    try:
        usual = USUAL if arguments.device == "cpu" else ON_GPU
        return selected(QUICK if arguments.quick else everything() if arguments.full else usual, wanted)
    except ValueError as error:
        raise SystemExit(f"benchmarks.peers: {error}") from None


def _contenders(arguments: argparse.Namespace) -> list[Named]:
    names = arguments.contenders
    always = {PLAIN, METRIC, OURS}
    return [each for each in CONTENDERS if names is None or each.name in always or each.name in names]


if __name__ == "__main__":
    main()
