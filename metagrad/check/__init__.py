"""Referees for a training run of one's own: slower, simpler ways to the same numbers, each with a readable report.

They never use the replay they check.
"""

from metagrad.check._adjoint import StepAdjoint, step_adjoint
from metagrad.check._determinism import Determinism, determinism
from metagrad.check._differences import FiniteDifferences, finite_differences
from metagrad.check._smoothness import Metasmoothness, metasmoothness
from metagrad.check._unrolled import unrolled
from metagrad.check._verdict import Comparison, Row

__all__ = [
    "Comparison",
    "Determinism",
    "FiniteDifferences",
    "Metasmoothness",
    "Row",
    "StepAdjoint",
    "determinism",
    "finite_differences",
    "metasmoothness",
    "step_adjoint",
    "unrolled",
]
