"""Proof that the data does it: an ordinary fine-tune of a fresh target, with nothing of this project's mathematics.

Plain `torch.optim.AdamW`, the model's own loss, shuffled batches, one pass. No import of metagrad, direct or indirect.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpg.experiments import EXPERIMENTS
from dpg.folder import RunFolder, RunFolderError
from dpg.metrics import WeightPattern
from dpg.settings import Settings
from dpg.text import encode, rows

SOURCES = {
    "the run's data": "dataset.jsonl",
    "untrained generator": "untrained.jsonl",
    "real prose": "prose.jsonl",
}


class Verdict(NamedTuple):
    """The pixel accuracy that one source of texts leaves in a freshly loaded target."""

    source: str
    pixel_accuracy: float
    num_pixels: int


def verify(path: Path) -> list[Verdict]:
    """The run's data and its two controls, each in a freshly loaded target; also written to `verify.json`.

    Raises:
        RunFolderError: if the run in `path` is not finished.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    settings = Settings(**{key: value for key, value in config.items() if key in Settings.__dataclass_fields__})
    metric = EXPERIMENTS[config["experiment"]].metric(settings)
    if not (path / "target" / "model.safetensors").exists():
        raise RunFolderError(f"{path} holds no target/ with its weights. It was changed; start a new run.")
    texts = {name: folder.read_texts(file) for name, file in SOURCES.items()}
    verdicts = [
        Verdict(name, fine_tuned_accuracy(path / "target", texts[name], metric, settings), metric.image.numel())
        for name in texts
    ]
    folder.write_json("verify.json", [verdict._asdict() for verdict in verdicts])
    return verdicts


def fine_tuned_accuracy(target: Path, texts: list[str], metric: WeightPattern, settings: Settings) -> float:
    """Pixel accuracy of the LM head's update after one ordinary epoch on `texts`."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    data = encode(texts, AutoTokenizer.from_pretrained(target), settings.sequence_length, train_eos=settings.train_eos)
    untrained = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.inner_lr)
    model.eval()  # As in the run: no dropout.
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(settings.seed))
    for chosen in order.split(settings.inner_batch_size):
        batch = rows(data, chosen)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metric.measure(untrained, dict(model.named_parameters()))["pixel_accuracy"]
