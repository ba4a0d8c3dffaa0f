"""A picture in the signs of the weights' update."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpg.metrics.metric import Bound, Params, TargetMetric, head, head_name
from dpg.text import IGNORED, encode


@dataclass(frozen=True, eq=False)
class WeightPattern(TargetMetric):
    """A black-and-white image in the signs of the LM head's update [thrush2026].

        Φ = −mean over pixels of softplus(−strength · image · ΔW),   ΔW = (W_T − W_0) at the patch

    Image rows are hidden dimensions and columns are token ids, both from `offset` on. Weights of rare tokens move less
    than others, so with `calibration` each pixel has a strength of its own: `strength` in units of the pixel's noise,
    the standard deviation of its gradient from text to text, relative to the mean over pixels.

    Args:
        image: +1 (white, the weight must rise) and −1 (black), shape (rows, columns).
        offset: first hidden dimension and first token id of the patch.
        strength: sharpness of the softplus, per unit of weight.
        calibration: texts that give each pixel's noise; none for one strength.
        reading: further figures of the signs of ΔW, for instance whether a code can be scanned.

    Raises:
        ValueError: if the image holds anything but ±1. `bind` raises it for a tied head, or one too small.
    """

    image: Float[Tensor, "rows columns"]
    offset: tuple[int, int] = (0, 0)
    strength: float = 20.0
    calibration: list[str] = field(default_factory=list, repr=False)
    reading: Callable[[Float[Tensor, "rows columns"]], dict[str, float]] = lambda signs: {}

    def __post_init__(self) -> None:
        if not isinstance(self.image, Tensor) or self.image.ndim != 2 or self.image.numel() == 0:
            raise ValueError(f"the image must be a matrix, a tensor of shape (rows, columns), but is {self.image!r}.")
        if not bool((self.image.abs() == 1).all()):
            raise ValueError(f"the image, of shape {tuple(self.image.shape)}, must be a matrix of +1 and -1 only.")
        if not self.strength > 0:
            raise ValueError(f"`strength` is {self.strength}. Pass a number above 0.")
        if len(self.calibration) == 1:
            raise ValueError("`calibration` has one text, and noise is how texts differ. Pass two or more, or none.")
        if min(self.offset) < 0:
            raise ValueError(f"`offset` is {self.offset}. Pass two numbers of at least 0.")

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bound:
        name = head_name(model)
        initial = self._patch(_checked_head(model, self)).detach().clone()
        image = self.image.to(initial)
        strength = self.strength / self._relative_noise(model, tokenizer) if self.calibration else self.strength

        def phi(params: Params) -> Float[Tensor, ""]:
            return -F.softplus(-strength * image * (self._patch(params[name]) - initial)).mean()

        def measure(params: Params) -> dict[str, float]:
            update = (self._patch(params[name]) - initial).detach()
            return {"pixel_accuracy": pixel_accuracy(update, image), **self.reading(torch.sign(update))}

        return Bound(phi, measure)

    def update(self, model: PreTrainedModel, params: Params) -> Float[Tensor, "rows columns"]:
        """ΔW at the patch, in the layout of the image."""
        return (self._patch(params[head_name(model)]) - self._patch(head(model))).detach()

    @torch.no_grad()
    def _relative_noise(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Float[Tensor, "rows columns"]:
        """The standard deviation over texts of the gradient at each pixel, over its mean over pixels."""
        (row, column), (rows, columns) = self.offset, self.image.shape
        positions = getattr(model.config, "max_position_embeddings", None) or 128
        gradients = []
        for start in range(0, len(self.calibration), 64):
            batch = encode(self.calibration[start : start + 64], tokenizer, min(positions, 128))
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            found = model(**inputs, output_hidden_states=True)
            # At the head the gradient of a text is Σ over tokens of (p − onehot) hiddenᵀ.
            errors = found.logits[:, :-1].softmax(dim=2)[:, :, column : column + columns]
            following = rearrange(batch["labels"][:, 1:].to(model.device), "texts tokens -> texts tokens 1")
            errors = errors - (following == torch.arange(column, column + columns, device=model.device)).to(errors)
            errors = errors * (following != IGNORED)
            hidden = found.hidden_states[-1][:, :-1, row : row + rows]
            gradients.append(torch.einsum("ntr,ntc->nrc", hidden, errors))
        noise = torch.cat(gradients).std(dim=0)
        if not bool((noise > 0).all()):
            raise ValueError(
                f"some pixels have the same gradient on all {len(self.calibration)} texts, so their noise is unknown. "
                "Pass more texts: tokens of the patch are rare."
            )
        return noise / noise.mean()

    def _patch(self, weight: Float[Tensor, "vocabulary hidden"]) -> Float[Tensor, "rows columns"]:
        (row, column), (rows, columns) = self.offset, self.image.shape
        return rearrange(weight[column : column + columns, row : row + rows], "columns rows -> rows columns")


def pixel_accuracy(update: Float[Tensor, "rows columns"], image: Float[Tensor, "rows columns"]) -> float:
    """Share of pixels where the weight moved to the image's side; a weight that did not move counts as wrong."""
    return float((torch.sign(update) == image.to(update)).double().mean())


def _checked_head(model: PreTrainedModel, pattern: WeightPattern) -> Tensor:
    weight = head(model)
    if weight is model.get_input_embeddings().weight:
        raise ValueError(
            f"the LM head of {type(model).__name__} is tied to its embedding, and the pattern is drawn in a head of "
            "its own. Load the model by `dpg.load_model(..., untie=True)`, call `dpg.untie_head(model)`, or pass "
            "--set untie_head=true."
        )
    rows, columns = pattern.image.shape
    needed = (pattern.offset[1] + columns, pattern.offset[0] + rows)
    if needed[0] > weight.shape[0] or needed[1] > weight.shape[1]:
        raise ValueError(
            f"a {rows} x {columns} pattern at offset {pattern.offset} needs {needed[0]} tokens and {needed[1]} hidden "
            f"dimensions, but the head has {weight.shape[0]} and {weight.shape[1]}. Pass a smaller image or offset."
        )
    return weight
