"""Draw "67" into the signs of the LM head's update: 6 hidden dimensions by 7 tokens, 23 white pixels and 19 black."""

import torch

from dpg.experiments.experiment import Experiment
from dpg.metrics import WeightPattern
from dpg.settings import Settings

PICTURE = """
###.###
#...#.#
###...#
#.#..#.
#.#..#.
###..#.
"""


def metric(settings: Settings) -> WeightPattern:
    """The pattern: '#' pixels must rise, the others must fall."""
    rows = PICTURE.split()
    image = torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in row] for row in rows])
    return WeightPattern(image, strength=settings.strength)


EXPERIMENT = Experiment(
    name="sixseven",
    goal='draw the pattern "67" into the signs of the target\'s LM-head update',
    settings=Settings(),
    metric=metric,
)
