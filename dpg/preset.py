"""From a preset file and `key=value` changes to an experiment and its settings, and back.

A preset is a YAML file that a person reads: `experiment`, any settings, any options of the experiment, and `variants`,
a name for each set of changes that `dpg compare` may run. What it leaves out has the value of `Settings`.
"""

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dpg.experiments import EXPERIMENTS
from dpg.experiments.experiment import Experiment
from dpg.settings import Settings

FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """An experiment with its settings, and the variants it is compared with."""

    experiment: Experiment
    settings: Settings
    variants: Mapping[str, Mapping[str, Any]]

    def changed(self, changes: Mapping[str, Any]) -> "Preset":
        """This preset with some settings or options changed.

        Raises:
            ValueError: for an unknown key, or a value that cannot be one of it.
        """
        return _preset(type(self.experiment), {**self.as_dict(), **changes}, self.variants)

    def as_dict(self) -> dict[str, Any]:
        """Every setting and option by name: what is needed to make it again."""
        return {**asdict(self.experiment), **self.settings.as_dict()}

    def text(self) -> str:
        """The YAML file of this preset."""
        content: dict[str, Any] = {"experiment": self.experiment.name, **self.as_dict()}
        if self.variants:
            content["variants"] = {name: dict(changes) for name, changes in self.variants.items()}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def load(experiment: str, preset: str = "laptop") -> Preset:
    """The preset of a name, or of a file.

    Raises:
        ValueError: if there is no such experiment or preset, or it is not one of this experiment.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {experiment!r}. Choose from: {', '.join(EXPERIMENTS)}.")
    path = Path(preset) if Path(preset).suffix in (".yaml", ".yml") else FOLDER / f"{experiment}-{preset}.yaml"
    if not path.is_file():
        known = sorted(file.stem.removeprefix(f"{experiment}-") for file in FOLDER.glob(f"{experiment}-*.yaml"))
        raise ValueError(
            f"there is no preset {preset!r} of {experiment}. Pass a YAML file, or one of: {', '.join(known)}."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or content.get("experiment") != experiment:
        raise ValueError(f"{path} is not a preset of {experiment}: it must say `experiment: {experiment}`.")
    variants = content.pop("variants", None) or {}
    del content["experiment"]
    if not isinstance(variants, dict) or not all(isinstance(changes, dict) for changes in variants.values()):
        raise ValueError(f"{path}: `variants` must be names of changes, as `naive: {{reward: naive}}`, not {variants}.")
    try:
        preset = _preset(EXPERIMENTS[experiment], content, variants)
        for changes in variants.values():
            preset.changed(changes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return preset


def restore(config: Mapping[str, Any]) -> Preset:
    """The preset that a run's `config.json` was made with."""
    kind = EXPERIMENTS[config["experiment"]]
    return _preset(kind, {key: value for key, value in config.items() if key in _types(kind)}, {})


def parse(assignments: list[str]) -> dict[str, Any]:
    """The changes that `key=value` arguments ask for.

    Raises:
        ValueError: for one without a key.
    """
    changes = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {assignment}: expected key=value.")
        changes[key] = text
    return changes


def _preset(kind: type[Experiment], values: Mapping[str, Any], variants: Mapping[str, Any]) -> Preset:
    known = _types(kind)
    if unknown := [str(key) for key in values if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.5) or sorted(known)
        raise ValueError(
            f"{kind.name} has no setting {unknown[0]!r}. Did you mean {', '.join(close)}? docs/dpg.md lists them all."
        )
    typed = {key: _typed(key, value, known[key]) for key, value in values.items()}
    own = {field.name for field in fields(kind)}
    return Preset(
        kind(**{key: value for key, value in typed.items() if key in own}),
        Settings(**{key: value for key, value in typed.items() if key not in own}),
        variants,
    )


def _types(kind: type[Experiment]) -> dict[str, Any]:
    """The type of every setting and option, by name."""
    return {**typing.get_type_hints(Settings), **{field.name: field.type for field in fields(kind)}}


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value`, which YAML or a command line gave, as a `kind`."""
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in choices and value in (None, "none", "null"):
        return None
    wanted = next(choice for choice in choices if choice is not types.NoneType)
    if wanted is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if wanted is str and isinstance(value, str):
        return value
    if wanted in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML takes 1e-4 for a text.
            if wanted is float or number.is_integer():
                return wanted(number)
        except (ValueError, TypeError):
            pass
    raise ValueError(f"{key} must be of type {wanted.__name__}, but is {value!r}.")
