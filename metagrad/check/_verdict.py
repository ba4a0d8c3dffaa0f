"""Whether a number agrees with a measured one, as far as the measurement can tell; and the tables that say so."""

from typing import Literal, NamedTuple, TypeAlias

from metagrad.check._slope import Slope

Verdict: TypeAlias = Literal["agree", "disagree", "cannot tell"]

MARGIN = 3.0  # Error bars are estimates: three of them before anything is called wrong.
DECISIVE = 0.01  # An agreement to within more than one part in a hundred proves nothing.
NEGLIGIBLE = 1e-6  # As a part of Φ: what is smaller counts as a derivative of zero.


class Row(NamedTuple):
    """One derivative computed in two ways.

    Attributes:
        name: what it is the derivative along.
        value: the one under test.
        difference: by finite differences.
        error: estimated absolute error of `difference`.
        verdict: "agree", "disagree", or "cannot tell" where the error bar is too wide for either.
    """

    name: str
    value: float
    difference: float
    error: float
    verdict: Verdict


class Comparison(NamedTuple):
    """A metagradient beside finite differences, direction by direction.

    Attributes:
        rows: one for each direction.
    """

    rows: list[Row]

    @property
    def verdict(self) -> Verdict:
        """ "disagree" if one direction does, "agree" if one does and none disagrees, otherwise "cannot tell"."""
        return overall(self.rows)

    def __str__(self) -> str:
        meaning = {
            "agree": "the metagradient is the derivative of this run, as far as these directions see.",
            "disagree": "one of the two is wrong. A kink (relu, max, clipping) or a batch, loss or metric that is not "
            "the same at every call misleads the differences: mg.check.determinism and a smaller `step_size` tell. A "
            "step that hides a part of its derivative (detach, .data, .item()) misleads the metagradient: "
            "mg.check.step_adjoint tells where.",
            "cannot tell": "the error bars are too wide. Run this check in float64, on fewer steps, or with another "
            "`step_size`.",
        }[self.verdict]
        return f"{table('direction', 'metagradient', self.rows)}\nVerdict: {self.verdict}: {meaning}"


def row(name: str, value: float, slope: Slope, size: float, precision: float) -> Row:
    """`value` beside the measured `slope`, judged.

    Args:
        size: of the function that was differentiated.
        precision: relative spacing of the numbers that the run computes with.
    """
    difference, error = float(slope.derivative), float(slope.error)
    scale = max(abs(value), abs(difference))
    # The square root: far above the rounding of a long run, far below a missing term.
    allowed = MARGIN * error + precision**0.5 * scale
    if not abs(value - difference) <= allowed:
        return Row(name, value, difference, error, "disagree")
    decisive = allowed <= max(DECISIVE * scale, NEGLIGIBLE * size)
    return Row(name, value, difference, error, "agree" if decisive else "cannot tell")


def overall(rows: list[Row]) -> Verdict:
    """The verdict on all of `rows`."""
    verdicts = {row.verdict for row in rows}
    for verdict in ("disagree", "agree"):
        if verdict in verdicts:
            return verdict
    return "cannot tell"


def table(what: str, tested: str, rows: list[Row]) -> str:
    """`rows` as text, under a head that says what stands in the first two columns."""
    width = max(len(what), *(len(row.name) for row in rows))
    head = f"{what:{width}s}  {tested:>14s}  {'difference':>14s}  {'+- error':>8s}  verdict"
    lines = [
        f"{row.name:{width}s}  {row.value:14.6e}  {row.difference:14.6e}  {row.error:8.0e}  {row.verdict}"
        for row in rows
    ]
    return "\n".join([head, *lines])
