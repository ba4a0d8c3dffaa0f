"""The pages that a generator and a data set carry where they are published: model card and dataset card.

No import of metagrad, direct or indirect: `dpg verify` brings the cards up to date.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from dpg.experiments import EXPERIMENTS
from dpg.folder import RunFolder
from dpg.table import table, words

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
TAGS = ["dataset-policy-gradients", "metagradient", "synthetic"]
OURS = "apache-2.0"
"""The licence of the models in the package."""

WARNING = """**Built to change models.** {texts} optimised, by gradients through a model's training, so that
training on them has an effect that their content need not show. What they do is said above; what else they do to a
model, or what they do to another model than the one they were made for, was not studied. Do not mix them into training
data unnoticed, and say what they are where you pass them on."""


def write_cards(folder: RunFolder) -> None:
    """Write `generator/README.md` and `dataset/README.md` from what is in the folder of a finished run."""
    for name, card in cards(folder).items():
        folder.write_text(name, card)


def cards(folder: RunFolder) -> dict[str, str]:
    """The two cards as they would be written now, by file."""
    return {"generator/README.md": _model_card(folder), "dataset/README.md": _dataset_card(folder)}


def refresh_cards(folder: RunFolder, before: dict[str, str]) -> None:
    """Write the cards anew, but for one that is no longer what it was `before`: somebody has edited it."""
    for name, card in cards(folder).items():
        if (folder.path / name).is_file() and (folder.path / name).read_text(encoding="utf-8") == before[name]:
            folder.write_text(name, card)


def base_licence(source: str) -> str | None:
    """The licence of a model by its own card, in its folder or in the hub's cache; None if that is not known."""
    if source in ("embedded", "multilingual"):
        return OURS
    try:
        card = Path(source) / "README.md" if Path(source).is_dir() else try_to_load_from_cache(source, "README.md")
    except HFValidationError:  # A file, or a folder that is gone: no name of the hub.
        return None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        licence = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except ValueError:  # A page without metadata, or with such that is no YAML.
        return None
    return licence if isinstance(licence, str) else None


def _model_card(folder: RunFolder) -> str:
    config = folder.read_config()
    source = config["target"] if config["generator"] == "target" else config["generator"]
    licence = base_licence(source)
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source if _is_on_hub(source) else None,
        tags=[*TAGS, "grpo"],
    )
    known = (
        f"That of the base model is `{licence}`." if licence else "That of the base model is not known here: see there."
    )
    text = f"""# Generator of {config["experiment"]}, seed {config["seed"]}

A language model that was trained by Dataset Policy Gradients to write training data. A target model that is fine-tuned
on its texts shall do this: {EXPERIMENTS[config["experiment"]].goal}.

{_models(config)}

{_use(config)}

{_figures(folder)}

## Limits

{WARNING.format(texts="The texts that this model writes are")}

As a writer it is not better than its base model: it was rewarded for what its texts do, never for what they say.

## Licence

{known}

{_reproduce(config)}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _dataset_card(folder: RunFolder) -> str:
    config, num_texts = folder.read_config(), len(folder.read_texts("dataset.jsonl"))
    data = DatasetCardData(
        pretty_name=f"Texts of {config['experiment']}, seed {config['seed']}",
        task_categories=["text-generation"],
        size_categories=[next((name for limit, name in SIZES if num_texts < limit), "n>1T")],
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        tags=TAGS,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}],
    )
    text = f"""# Texts of {config["experiment"]}, seed {config["seed"]}

{num_texts} texts by a generator that was trained by Dataset Policy Gradients, written to prompts it was not trained on.
A target model that is fine-tuned on them shall do this: {EXPERIMENTS[config["experiment"]].goal}.

{_models(config)}

One column, `text`; one split, `train`. `datasets.load_dataset(NAME)` reads it.

{_figures(folder)}

## Limits

{WARNING.format(texts="These texts were")}

The texts are not proofread. What they say may be false, and they may repeat what their prompts or the generator's own
training data say.

## Licence

Not set here: what may be done with texts that a model wrote depends on its licence, and on that of the prompts.

{_reproduce(config)}
"""
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _models(config: dict[str, Any]) -> str:
    same = config["generator"] == "target"
    generator = config["target"] if same else config["generator"]
    names = {"embedded": "the small one of the package", "multilingual": "the small multilingual one of `dpg`"}
    told = [names.get(source, f"`{source}`") for source in (generator, config["target"])]
    return f"Generator: {told[0]}. Target: {told[1]}. Prompts: `{config['prompts']}`."


def _use(config: dict[str, Any]) -> str:
    how = ", in its chat template" if config["chat"] else ""
    if config["instruction"]:
        how += f", after the instruction `{' '.join(config['instruction'].split())}`"
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(NAME), AutoTokenizer.from_pretrained(NAME)
```

It continues prompts of up to {config["max_prompt_tokens"]} tokens by up to {config["max_new_tokens"]}, sampled from its
whole distribution at temperature {config["temperature"]}{how}."""


def _figures(folder: RunFolder) -> str:
    """What a fresh target became by training on these texts, beside others; and how that was validated on the way."""
    config = folder.read_config()
    outcomes = folder.read_json("outcomes.json")
    parts = [
        "## Figures",
        f"Of a fresh target after training on {len(folder.read_texts('dataset.jsonl'))} texts of each kind, by the "
        "run's own optimizer. Φ is what was maximised.",
        _rows(outcomes),
    ]
    validated = [record for record in folder.records() if "val/phi" in record]
    steps = {
        f"step {r['step']}": {n.removeprefix("val/"): v for n, v in r.items() if n.startswith("val/")}
        for r in validated
    }
    if steps:
        first, last = list(steps)[0], list(steps)[-1]
        parts += [f"On {config['validation_texts']} fresh texts:", _rows({name: steps[name] for name in (first, last)})]
    if (folder.path / "verify.json").exists():
        verdicts = {v["source"]: {n: x for n, x in v.items() if n != "source"} for v in folder.read_json("verify.json")}
        parts += ["By an ordinary fine-tune with `torch.optim`, without metagradients (`dpg verify`):", _rows(verdicts)]
    else:
        parts.append("No ordinary fine-tune has verified this yet: `dpg verify` does.")
    return "\n\n".join(parts)


def _rows(figures: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in figures.values() for name in values))
    rows = [[source, *(f"{values[n]:.6g}" if n in values else "" for n in names)] for source, values in figures.items()]
    return table(["", *map(words, names)], rows)


def _reproduce(config: dict[str, Any]) -> str:
    left_out = ("command", "experiment")
    settings = "\n".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in config.items() if key not in left_out
    )
    return f"""## To reproduce

```
{config["command"]}
```

with `metagrad` and torch {config["torch"]}. On another machine, or with other versions, numbers differ in their last
digits, and so texts differ.

<details><summary>All settings</summary>

```yaml
{settings}
```

</details>"""


def _is_on_hub(source: str) -> bool:
    return source not in ("embedded", "multilingual") and not Path(source).exists() and not source.endswith(".gguf")
