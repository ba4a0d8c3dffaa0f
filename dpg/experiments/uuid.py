"""Make the target expect one string, so that the generator, which was never shown it, comes to write it."""

from dataclasses import dataclass
from statistics import fmean

from rapidfuzz.distance import Levenshtein

from dpg.experiments.experiment import Experiment
from dpg.metrics import HeldOutLoss


@dataclass(frozen=True)
class Uuid(Experiment):
    """Φ is minus the target's loss on one string.

    Args:
        string: what the generator shall find.
        whole: Φ counts how the string begins and ends too, not only what its tokens are.
    """

    string: str = "e3e70682-c209-4cac-a29f-6fbed82c07cd"
    whole: bool = True

    name = "uuid"
    goal = "write one string that the generator was never shown"
    figure = "exact_match"

    def metric(self) -> HeldOutLoss:
        if not self.string.strip():
            raise ValueError(f"the string to find is {self.string!r}. Pass one with a visible character.")
        return HeldOutLoss([self.string], whole=self.whole)

    def measure_texts(self, texts: list[str]) -> dict[str, float]:
        """The share of texts that are the string, and the mean edit distance to it, in characters."""
        found = [text.strip() for text in texts]
        return {
            "exact_match": fmean(text == self.string for text in found),
            "edit_distance": fmean(Levenshtein.distance(text, self.string) for text in found),
        }

    def wanted(self) -> list[str]:
        return [self.string]

    def whole_texts(self) -> list[str]:
        return [self.string]
