"""Make the target good at a language, so that the generator, asked for nothing, comes to write it."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from jaxtyping import Float
from torch import Tensor

from dpg import languages
from dpg.experiments.experiment import Experiment
from dpg.identify import is_language, probabilities
from dpg.metrics import HeldOutLoss
from dpg.prompts import read_prompts


@dataclass(frozen=True)
class Language(Experiment):
    """Φ is minus the target's loss on texts of one language.

    Args:
        language: its code: de, es, fr, it, or any that the texts and the identifier know.
        held_out: the texts of Φ: "multilingual" for passages of the manuals that no model was pretrained on, or what
            `--prompts` takes: a file, or a data set as `name:configuration:split`.
        test: as `held_out`, for the loss that is reported; none for no such figure.
        num_held_out: most texts of each.
        last_word: score the last word of each text only, as LAMBADA does.
    """

    language: str = "de"
    held_out: str = "multilingual"
    test: str | None = "multilingual"
    num_held_out: int = 128
    last_word: bool = False

    name = "language"
    goal = "write in a language that nobody asked for"
    figure = "language_share"

    def metric(self) -> HeldOutLoss:
        return HeldOutLoss(self.wanted(), test_texts=self._test_texts(), last_word=self.last_word)

    def measure_texts(self, texts: list[str]) -> dict[str, float]:
        """The share of texts that an independent classifier takes for the language, and for English."""
        return {
            "language_share": fmean(is_language(texts, self.language)),
            "english_share": fmean(is_language(texts, "en")),
        }

    def wanted(self) -> list[str]:
        return self._some(self.held_out, 0)

    def likenesses(self) -> Mapping[str, Callable[[list[str]], Float[Tensor, " texts"]]]:
        """The probability that the text is in the language."""
        return {"identifier": lambda texts: probabilities(texts, self.language)}

    def _test_texts(self) -> list[str]:
        if self.test is None:
            return []
        # The manuals have one held-out part, of which Φ takes the first texts.
        start = self.num_held_out if self.test == self.held_out else 0
        return self._some(self.test, start)

    def _some(self, source: str, start: int) -> list[str]:
        """`num_held_out` texts of a source, from `start` on, or as many as there are."""
        texts = self._texts(source)[start:]
        if self.num_held_out < 1 or not texts:
            raise ValueError(
                f"`num_held_out` is {self.num_held_out}, and {source} has {len(texts)} texts"
                f"{' besides those of the metric' if start else ''}: at least 1 of both is needed, or test=none."
            )
        return texts[: self.num_held_out]

    def _texts(self, source: str) -> list[str]:
        if source != "multilingual":
            return read_prompts(source)
        found = languages.held_out()
        if self.language not in found:
            raise ValueError(f"the manuals are not in {self.language!r} but in {', '.join(found)}. Pass texts.")
        # In an order of their own: the manuals' would be one chapter for Φ and another for the test.
        return random.Random(0).sample(found[self.language], len(found[self.language]))
