"""The pictures and the page that a finished run leaves behind."""

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dpg.folder import RunFolder
from dpg.metrics import WeightPattern, pixel_accuracy
from dpg.reward import MetagradReward

NUM_SAMPLES = 5


def write(folder: RunFolder, reward: MetagradReward) -> None:
    """Write `curve.png`, `pattern.png` and `report.md` from what is in the folder."""
    matplotlib.use("agg")  # A run may have no screen.
    pattern = reward.metric
    assert isinstance(pattern, WeightPattern)
    updates = {}
    for title, name in (("before", "untrained.jsonl"), ("after", "dataset.jsonl")):
        params = reward.target.fine_tune(folder.read_texts(name))
        updates[title] = pattern.update(reward.target.model, params)
    _draw_curve(folder, pattern)
    _draw_pattern(folder, pattern, updates)
    folder.write_text("report.md", _page(folder, pattern))


def majority_accuracy(image: Float[Tensor, "rows columns"]) -> float:
    """The accuracy of guessing the more frequent colour everywhere."""
    white = float((image > 0).double().mean())
    return max(white, 1 - white)


def _draw_curve(folder: RunFolder, pattern: WeightPattern) -> None:
    validated = [r for r in folder.records() if "val/pixel_accuracy" in r]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in validated], [100 * r["val/pixel_accuracy"] for r in validated], marker="o", ms=3)
    guess = 100 * majority_accuracy(pattern.image)
    axes.axhline(guess, color="grey", linestyle="--", linewidth=1)
    axes.annotate(f"majority guess {guess:.1f} %", (0.99, guess + 1), xycoords=("axes fraction", "data"), ha="right")
    axes.set(xlabel="GRPO step", ylabel="pixel accuracy on fresh texts (%)", ylim=(0, 102))
    figure.savefig(folder.path / "curve.png", dpi=150)


def _draw_pattern(folder: RunFolder, pattern: WeightPattern, updates: dict[str, Tensor]) -> None:
    panels = {"wanted": pattern.image, **{title: torch.sign(update) for title, update in updates.items()}}
    figure = Figure(figsize=(2.6 * len(panels), 2.9), layout="constrained")
    for axes, (title, signs) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(signs.numpy(), cmap="gray", vmin=-1, vmax=1)
        right = round(pixel_accuracy(signs, pattern.image) * pattern.image.numel())
        axes.set_title(title if title == "wanted" else f"{title}: {right}/{pattern.image.numel()}")
        axes.set(xticks=[], yticks=[], xlabel="token", ylabel="hidden dimension")
    figure.savefig(folder.path / "pattern.png", dpi=150)


def _page(folder: RunFolder, pattern: WeightPattern) -> str:
    config, records = folder.read_config(), folder.records()
    trained = [r for r in records if r["step"] > 0]
    num_pixels = pattern.image.numel()
    last = next(r for r in reversed(records) if "val/pixel_accuracy" in r)
    seconds = sum(r["seconds"] for r in trained)
    tokens = sum(r["num_tokens"] for r in trained)
    figures = {
        "pixel accuracy on fresh texts": f"{round(last['val/pixel_accuracy'] * num_pixels)}/{num_pixels}",
        "the same before training": f"{round(records[0]['val/pixel_accuracy'] * num_pixels)}/{num_pixels}",
        "majority guess": f"{100 * majority_accuracy(pattern.image):.1f} %",
        "Φ on fresh texts": f"{last['val/phi']:.6f} (before: {records[0]['val/phi']:.6f})",
        "GRPO steps": f"{last['step']}",
        "seconds in GRPO steps": f"{seconds:.0f} ({config['num_threads']} threads, torch {config['torch']})",
        "tokens written": f"{tokens} ({tokens / seconds:.0f} a second)",
    }
    samples = {
        title: "\n".join(f"- `{_inline(text)}`" for text in folder.read_texts(name)[:NUM_SAMPLES])
        for title, name in (("after", "dataset.jsonl"), ("before", "untrained.jsonl"))
    }
    settings = "\n".join(f"| {key} | {value} |" for key, value in config.items() if key != "command")
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""# {config["experiment"]}, seed {config["seed"]}

```
{config["command"]}
```

| figure | value |
|---|---|
{table}

![the wanted picture, and the signs of the weight update before and after](pattern.png)

![pixel accuracy on fresh texts by GRPO step](curve.png)

`dpg verify {folder.path}` repeats the fine-tune with plain `torch.optim.AdamW`, beside two controls.

## Texts of the trained generator

{samples["after"]}

## Texts of the untrained generator

{samples["before"]}

## Settings

| setting | value |
|---|---|
{settings}
"""


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
