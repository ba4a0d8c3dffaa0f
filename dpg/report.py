"""The pictures and the page that a finished run leaves behind."""

from typing import Any

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dpg.folder import RunFolder
from dpg.judge import Judge
from dpg.metrics import WeightPattern, pixel_accuracy
from dpg.table import table, words

NUM_SAMPLES = 5
SOURCES = {"untrained generator": "untrained.jsonl", "trained generator": "dataset.jsonl", "real prose": "prose.jsonl"}


def write(folder: RunFolder, judge: Judge, figure: str) -> None:
    """Write `curve.png` (of `figure`), `report.md`, `outcomes.json` and, for a pattern, `pattern.png`."""
    matplotlib.use("agg")  # A run may have no screen.
    outcomes, updates = {}, {}
    for source, name in SOURCES.items():
        texts = folder.read_texts(name)
        params = judge.target.fine_tune(texts)
        outcomes[source] = {"phi": judge.phi(params), **judge.measures(params, texts)}
        if isinstance(judge.metric, WeightPattern):
            updates[source] = judge.metric.update(judge.target.model, params)
    folder.write_json("outcomes.json", outcomes)
    _draw_curve(folder, figure, outcomes)
    if isinstance(judge.metric, WeightPattern):
        _draw_pattern(folder, judge.metric.image, updates)
    folder.write_text("report.md", _page(folder, outcomes, bool(updates)))


def _draw_curve(folder: RunFolder, figure: str, outcomes: dict[str, dict[str, float]]) -> None:
    key = f"val/{figure}"
    validated = [record for record in folder.records() if key in record]
    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    axes.plot([r["step"] for r in validated], [r[key] for r in validated], marker="o", ms=3, label="fresh texts")
    axes.axhline(outcomes["real prose"][figure], color="grey", linestyle="--", linewidth=1, label="real prose")
    axes.set(xlabel="GRPO step", ylabel=words(figure))
    axes.legend(frameon=False)
    drawing.savefig(folder.path / "curve.png", dpi=150)


def _draw_pattern(folder: RunFolder, image: Float[Tensor, "rows columns"], updates: dict[str, Tensor]) -> None:
    panels = {"wanted": image, **{source: torch.sign(update) for source, update in updates.items()}}
    drawing = Figure(figsize=(2.6 * len(panels), 2.9), layout="constrained")
    for axes, (title, signs) in zip(drawing.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(signs.cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
        right = round(pixel_accuracy(signs, image) * image.numel())
        axes.set_title(title if title == "wanted" else f"{title}: {right}/{image.numel()}", fontsize="medium")
        axes.set(xticks=[], yticks=[], xlabel="token", ylabel="hidden dimension")
    drawing.savefig(folder.path / "pattern.png", dpi=150)


def _page(folder: RunFolder, outcomes: dict[str, dict[str, float]], has_pattern: bool) -> str:
    config, records = folder.read_config(), folder.records()
    names = list(outcomes["trained generator"])
    figures = table(
        ["", *map(words, names)],
        [[source, *(f"{values[name]:.6g}" for name in names)] for source, values in outcomes.items()],
    )
    samples = {
        source: "\n".join(f"- `{_inline(text)}`" for text in folder.read_texts(SOURCES[source])[:NUM_SAMPLES])
        for source in ("trained generator", "untrained generator")
    }
    pattern = "![the wanted picture, and the signs of the weight update](pattern.png)\n\n" if has_pattern else ""
    settings = table(["setting", "value"], [[key, config[key]] for key in config if key != "command"])
    return f"""# {config["experiment"]}, seed {config["seed"]}

```
{config["command"]}
```

A target fine-tuned on {len(folder.read_texts("dataset.jsonl"))} texts of each kind:

{figures}

{_speed(config, records)}

{pattern}![{words(config["experiment"])} on fresh texts by GRPO step](curve.png)

`dpg verify {folder.path}` repeats the fine-tune with plain `torch.optim`.

## Texts of the trained generator

{samples["trained generator"]}

## Texts of the untrained generator

{samples["untrained generator"]}

## Settings

{settings}
"""


def _speed(config: dict[str, Any], records: list[dict[str, Any]]) -> str:
    trained = [record for record in records if record["step"] > 0]
    seconds, tokens = (sum(record[name] for record in trained) for name in ("seconds", "num_tokens"))
    return (
        f"{len(trained)} GRPO steps took {seconds:.0f} s ({config['num_threads']} threads, torch {config['torch']}); "
        f"the generator wrote {tokens} tokens, {tokens / seconds:.0f} a second."
    )


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
