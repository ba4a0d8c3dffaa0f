"""Draw a code that a phone reads, or any black-and-white picture, into the signs of the LM head's update."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dpg import corpus
from dpg.codes import png_image, qr_image, scan
from dpg.experiments.experiment import Experiment
from dpg.metrics import WeightPattern


@dataclass(frozen=True)
class Qr(Experiment):
    """White modules must rise, black ones fall.

    Args:
        text: what the code says.
        version: M1 to M4 (Micro QR codes of 11, 13, 15, 17 modules a side) or 1 to 40 (21, 25, ...); None for the
            smallest that fits.
        error_correction: L, M, Q or H; None for the highest that needs no larger code.
        mask: which of the standard's masks; None for the one that it prefers.
        picture: a black-and-white PNG file to draw instead of a code.
        row, column: the first hidden dimension and the first token id of the patch.
        strength: sharpness of Φ, per unit of weight.
        num_calibration: passages of the standard library's documentation that give each pixel its own strength; 0 for
            one strength.
    """

    text: str = "DPG"
    version: str | None = None
    error_correction: str | None = None
    mask: int | None = None
    picture: str | None = None
    row: int = 0
    column: int = 0
    strength: float = 20.0
    num_calibration: int = 0

    name = "qr"
    goal = "draw a QR code that scans, or any PNG, into the signs of the target's LM-head update"
    figure = "pixel_accuracy"

    def metric(self) -> WeightPattern:
        passages = corpus.held_out() if self.num_calibration else []
        if not 0 <= self.num_calibration <= len(passages):
            raise ValueError(f"`num_calibration` is {self.num_calibration}. Pass 0 to {len(passages)} passages.")
        calibration = passages[: self.num_calibration]
        options = {"offset": (self.row, self.column), "strength": self.strength, "calibration": calibration}
        if self.picture is not None:
            return WeightPattern(png_image(self.picture), **options)
        image = qr_image(self.text, version=self.version, error_correction=self.error_correction, mask=self.mask)
        return WeightPattern(image, **options, reading=self._reading)

    def _reading(self, signs: Float[Tensor, "rows columns"]) -> dict[str, float]:
        """Whether a barcode reader finds the text in the picture: 1 or 0."""
        return {"scanned": float(scan(signs) == self.text)}
