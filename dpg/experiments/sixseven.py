"""Draw "67" into the signs of the LM head's update: 6 hidden dimensions by 7 tokens, 23 white pixels and 19 black."""

from dataclasses import dataclass

import torch

from dpg.experiments.experiment import Experiment
from dpg.metrics import WeightPattern

PICTURE = """
###.###
#...#.#
###...#
#.#..#.
#.#..#.
###..#.
"""


@dataclass(frozen=True)
class SixSeven(Experiment):
    """'#' pixels must rise, the others must fall.

    Args:
        strength: sharpness of Φ, per unit of weight.
    """

    strength: float = 20.0

    name = "sixseven"
    goal = 'draw the pattern "67" into the signs of the target\'s LM-head update'
    figure = "pixel_accuracy"

    def metric(self) -> WeightPattern:
        rows = PICTURE.split()
        image = torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in row] for row in rows])
        return WeightPattern(image, strength=self.strength)
