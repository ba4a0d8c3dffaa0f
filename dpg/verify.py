"""Proof that the data does it: an ordinary fine-tune of a fresh target, with nothing of this project's mathematics.

Plain `torch.optim`, the model's own loss, shuffled batches, one pass. No import of metagrad, direct or indirect.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpg.cards import cards, refresh_cards
from dpg.folder import RunFolder, RunFolderError
from dpg.metrics import bind
from dpg.preset import Preset, restore
from dpg.settings import Settings
from dpg.text import IGNORED, encode, rows

SOURCES = {
    "the run's data": "dataset.jsonl",
    "untrained generator": "untrained.jsonl",
    "real prose": "prose.jsonl",
}


class Verdict(NamedTuple):
    """The figures of a freshly loaded target that was fine-tuned on one source of texts, and of the texts."""

    source: str
    figures: dict[str, float]


def verify(path: Path) -> list[Verdict]:
    """The run's data and its two controls, each in a freshly loaded target; written to `verify.json` and the cards.

    Raises:
        RunFolderError: if the run in `path` is not finished.
    """
    folder = RunFolder(path)
    preset = restore(folder.read_config())
    texts = {name: folder.read_texts(file) for name, file in SOURCES.items()}
    verdicts = [Verdict(name, ordinary_trial(path, texts[name], preset)) for name in texts]
    before = cards(folder) if (path / "outcomes.json").exists() else None  # An older version wrote none.
    folder.write_json("verify.json", [{"source": verdict.source, **verdict.figures} for verdict in verdicts])
    if before is not None:
        refresh_cards(folder, before)
    return verdicts


def ordinary_trial(path: Path, texts: list[str], preset: Preset) -> dict[str, float]:
    """Φ and the figures of the target of a run folder after one ordinary epoch on `texts`."""
    tokenizer = AutoTokenizer.from_pretrained(fresh_target(path))
    bound = bind(preset.experiment.metric(), load(path).to(preset.settings.device), tokenizer)
    trained = dict(fine_tuned(path, texts, preset.settings).named_parameters())
    with torch.no_grad():
        phi = float(bound.phi(trained))
        return {"phi": phi, **bound.measure(trained), **preset.experiment.measure_texts(texts)}


def fine_tuned(path: Path, texts: list[str], settings: Settings) -> PreTrainedModel:
    """The target of a run folder after one ordinary epoch on `texts`."""
    *_, (model, _) = ordinary_steps(path, texts, settings)
    return model


def ordinary_steps(path: Path, texts: list[str], settings: Settings) -> Iterator[tuple[PreTrainedModel, int]]:
    """One ordinary epoch on `texts`: a fresh target and the number of tokens that it has seen, after every step."""
    model, tokenizer = load(path).to(settings.device), AutoTokenizer.from_pretrained(fresh_target(path))
    data = encode(
        texts, tokenizer, settings.sequence_length, train_eos=settings.train_eos, train_bos=settings.train_bos
    )
    optimizer = ordinary_optimizer(model, settings)
    model.eval()  # As in the run: no dropout.
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(settings.seed))
    num_tokens = 0
    for chosen in order.split(settings.inner_batch_size):
        num_scored = int((data["labels"][chosen, 1:] != IGNORED).sum())
        optimizer.zero_grad()
        for part in chosen.split(settings.inner_microbatch_size or len(chosen)):
            batch = {key: value.to(settings.device) for key, value in rows(data, part).items() if key != "index"}
            model(**batch, num_items_in_batch=num_scored).loss.backward()
        optimizer.step()
        num_tokens += int(data["attention_mask"][chosen].sum())
        yield model, num_tokens


def ordinary_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.Optimizer:
    """Torch's own optimizer with the run's learning rate and weight decay, and otherwise as people use it."""
    if settings.inner_optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=settings.inner_lr, weight_decay=settings.inner_weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=settings.inner_lr, weight_decay=settings.inner_weight_decay)


def load(path: Path) -> PreTrainedModel:
    """The target of a run folder, as it was before the run."""
    return AutoModelForCausalLM.from_pretrained(fresh_target(path), dtype=torch.float32)


def fresh_target(path: Path) -> Path:
    """The folder of the target of a run.

    Raises:
        RunFolderError: if it is not there.
    """
    if not (path / "target" / "model.safetensors").exists():
        raise RunFolderError(f"{path} holds no target/ with its weights. It was changed; start a new run.")
    return path / "target"
