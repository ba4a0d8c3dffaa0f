"""Metasmoothness against numbers that can be worked out by hand."""

import pytest
import torch

import metagrad as mg
from metagrad.check._smoothness import student_quantile


def one_step(trained, metric=lambda state: state.params["w"].sum(), size=4):
    """A run of one step that ends at w = `trained`(z), exactly: lr 1 on −Σ w · trained(z), from w = 0."""
    step = mg.TrainStep(lambda p, b, meta: -(p["w"] * trained(meta["z"])).sum(), mg.optim.sgd(1.0))
    return metric, step, {"w": torch.zeros(size)}, [None], {"z": torch.ones(())}


UP = [{"z": torch.ones(())}]


@pytest.mark.parametrize("h", [1e-3, 0.1, 10.0])
def test_a_linear_response_scores_one_and_has_no_curvature(h):
    slopes = torch.tensor([1.0, -2.0, 3.0, -4.0])
    found = mg.check.metasmoothness(*one_step(lambda z: slopes * z), step_sizes=h, num_directions=3)
    torch.testing.assert_close(found.agreement, torch.ones(1, 3), rtol=1e-14, atol=0)
    assert (found.curvature * h**2 <= 1e-14 * (1 + 10 * h)).all()  # rounding of Φ, which is at most 2 (1 + 10 h)
    assert found.mean_agreement() == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)
    assert "near 1: metagradients are usable" in str(found)


def test_a_response_that_turns_back_scores_by_its_share_of_the_distance():
    # From z = 1 by h = 1 to 2 and 3: the first coordinate goes 0, 1, 4; the second 0, 2, 1: d = 4 and 1.
    path = torch.tensor([[0.0, 0.0], [1.0, 2.0], [4.0, 1.0]])
    arguments = one_step(lambda z: path[int(z) - 1], size=2)
    found = mg.check.metasmoothness(*arguments, step_sizes=1.0, directions=UP)
    assert float(found.agreement) == pytest.approx(4 / 5 - 1 / 5, rel=1e-14)
    # Φ = 0, 3, 5: its second difference is −1.
    assert float(found.curvature) == pytest.approx(1.0, rel=1e-14)
    assert found.mean_agreement().lower == -1 and "no interval" in str(found)


def test_several_sizes_are_a_row_each():
    # Φ = z²: second difference 2h² at every h. w = z² for z > 0: S = 1.
    arguments = one_step(lambda z: z**2 * torch.ones(1), size=1)
    found = mg.check.metasmoothness(*arguments, step_sizes=[0.01, 0.1, 1.0], directions=UP * 2)
    assert found.agreement.shape == found.curvature.shape == (3, 2)
    torch.testing.assert_close(found.agreement, torch.ones(3, 2), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.curvature, torch.full((3, 2), 2.0), rtol=1e-9, atol=0)
    assert found.mean_curvature(2).mean == pytest.approx(2.0)
    assert len(str(found).splitlines()) == 5


def test_a_rough_response_is_far_from_one():
    # w = cos(1000 z) with a phase for each coordinate: after h = 0.1 the direction is as good as random.
    phases = torch.linspace(0, 50, 500)
    found = mg.check.metasmoothness(*one_step(lambda z: torch.cos(1000 * z + phases), size=500), num_directions=32)
    assert found.mean_agreement().upper < 0.5
    assert "far from 1" in str(found)


def test_the_interval_is_students():
    # The second coordinate turns back where z passes 1.05, so S differs between the directions.
    arguments = one_step(lambda z: torch.stack([z, (z - 1.05).abs()]), size=2)
    directions = [{"z": torch.tensor(scale)} for scale in (1.0, -1.0, 2.0)]
    found = mg.check.metasmoothness(*arguments, step_sizes=0.1, directions=directions)
    values = found.agreement[0]
    assert values.std() > 0
    half = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 * values.std() / 3**0.5  # t for 2 degrees of freedom in closed form
    assert found.mean_agreement().mean == pytest.approx(float(values.mean()))
    assert found.mean_agreement().lower == pytest.approx(max(-1.0, float(values.mean() - half)), rel=1e-4)
    assert found.mean_agreement().upper == pytest.approx(min(1.0, float(values.mean() + half)), rel=1e-4)


def test_students_quantiles():
    p = 0.95
    assert student_quantile(1) == pytest.approx(torch.tan(torch.tensor(torch.pi * p / 2)).item(), rel=1e-4)
    assert student_quantile(2) == pytest.approx(p * (2 / (1 - p**2)) ** 0.5, rel=1e-4)
    # Far out Student's distribution is the normal one.
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + p) / 2)).item()
    assert student_quantile(10_000) == pytest.approx(normal, rel=1e-3)


def test_what_is_not_finite_says_how_far_it_was_moved():
    with pytest.raises(mg.NonFiniteError, match="moved by up to 2 h = 2e"):
        mg.check.metasmoothness(*one_step(lambda z: (1.5 - z).sqrt() * torch.ones(4)), step_sizes=1.0, directions=UP)
