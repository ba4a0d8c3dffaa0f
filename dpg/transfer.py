"""Does the data go on working: a fresh target trained on far more of a run's texts than any reward ever saw."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.progress import track
from transformers import AutoTokenizer

from dpg.build import build
from dpg.folder import RunFolder, RunFolderError
from dpg.loop import write
from dpg.metrics import bind
from dpg.preset import Preset, restore
from dpg.table import words
from dpg.target import load_model
from dpg.verify import fresh_target, load, ordinary_steps


class Point(NamedTuple):
    """The figures of a target that has trained on so many tokens."""

    num_tokens: int
    figures: dict[str, float]


def transfer(path: Path, *, num_texts: int = 16384, num_points: int = 12) -> dict[str, list[Point]]:
    """Train fresh targets with plain `torch.optim` on `num_texts` new texts each; writes `transfer.json` and `.png`.

    Args:
        path: a finished run.
        num_texts: of the trained generator, of the untrained one, and of real prose (which repeats if there is less).
        num_points: evaluations of each, at numbers of steps that grow evenly on a logarithmic scale.

    Raises:
        RunFolderError: if the run is not finished.
        ValueError: for fewer texts than one inner step takes.

    Cost: sampling, and an ordinary training run of `num_texts` texts for each of the three.
    """
    folder = RunFolder(path)
    preset = restore(folder.read_config())
    settings = preset.settings
    if not (path / "generator" / "config.json").exists():
        raise RunFolderError(f"{path} holds no generator/: the run in it is not finished. Continue it with --resume.")
    if num_texts < settings.inner_batch_size:
        raise ValueError(f"{num_texts} texts are less than one step of {settings.inner_batch_size}. Pass more.")
    parts = build(preset)
    model, tokenizer = load_model(str(path / "generator"))
    trained = replace(parts.generator, model=model.to(settings.device), tokenizer=tokenizer)
    prompts, prose = parts.validation.prompts, parts.prose
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        texts = {
            "the run's data": write(trained, prompts, num_texts),
            "untrained generator": write(parts.generator, prompts, num_texts),
            "real prose": [prose[i % len(prose)] for i in range(num_texts)],
        }
    curves = {source: list(_curve(path, preset, texts[source], num_points, source)) for source in texts}
    folder.write_json("transfer.json", {source: [point._asdict() for point in curves[source]] for source in curves})
    _draw(path, preset.experiment.figure, curves)
    return curves


def _curve(path: Path, preset: Preset, texts: list[str], num_points: int, source: str) -> Iterator[Point]:
    settings = preset.settings
    tokenizer = AutoTokenizer.from_pretrained(fresh_target(path))
    bound = bind(preset.experiment.metric(), load(path).to(settings.device), tokenizer)
    num_steps = math.ceil(len(texts) / settings.inner_batch_size)
    marks = {round(num_steps ** (i / max(num_points - 1, 1))) for i in range(num_points)}
    steps = track(ordinary_steps(path, texts, settings), source, total=num_steps)
    for step, (model, num_tokens) in enumerate(steps, start=1):
        if step in marks:
            params = dict(model.named_parameters())
            with torch.no_grad():
                yield Point(num_tokens, {"phi": float(bound.phi(params)), **bound.measure(params)})


def _draw(path: Path, figure: str, curves: dict[str, list[Point]]) -> None:
    matplotlib.use("agg")
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    if figure not in curves["real prose"][0].figures:
        figure = "phi"  # A figure of texts says nothing of a target.
    for source, points in curves.items():
        axes.plot([p.num_tokens for p in points], [p.figures[figure] for p in points], marker="o", ms=3, label=source)
    axes.set(xlabel="tokens seen", ylabel=words(figure), xscale="log")
    axes.legend(frameon=False)
    drawing.savefig(path / "transfer.png", dpi=150)
