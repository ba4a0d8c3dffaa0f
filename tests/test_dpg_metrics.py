"""A pattern in the signs of the head's update: where it lies, what it is worth, and what is refused."""

import math
import re

import pytest
import torch
from dpg_problems import gpt2, letters, parameters, target, text_loss

import dpg
import metagrad as mg
from dpg.metrics import WeightPattern, head_name, pixel_accuracy
from dpg.reward import MetagradReward
from dpg.target import Target

IMAGE = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])  # 2 hidden dimensions, 3 tokens
HEAD = "lm_head.weight"
OFFSETS = [(0, 0), (3, 5), (6, 9)]


def moved(model, seed=3):
    """The parameters of `model` with a head that was moved at random."""
    params = parameters(model)
    step = torch.randn(params[HEAD].shape, generator=torch.Generator().manual_seed(seed))
    return params | {HEAD: params[HEAD] + 0.1 * step}, 0.1 * step


def phi_by_hand(step, image, offset, strength):
    """Pixel by pixel: row r is hidden dimension offset[0] + r, column c is token offset[1] + c."""
    total = 0.0
    for r in range(image.shape[0]):
        for c in range(image.shape[1]):
            change = float(step[offset[1] + c, offset[0] + r])
            total -= math.log1p(math.exp(-strength * float(image[r, c]) * change))
    return total / image.numel()


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_patch_is_tokens_by_hidden_dimensions_transposed(offset):
    model = gpt2()
    params, step = moved(model)
    i, j = offset
    wanted = step[j : j + 3, i : i + 2].T
    torch.testing.assert_close(WeightPattern(IMAGE, offset).update(model, params), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("strength", [20.0, 3.0, 2000.0])
@pytest.mark.parametrize("offset", OFFSETS)
def test_phi_is_the_loop_over_pixels(offset, strength):
    model = gpt2()
    params, step = moved(model)
    value = float(WeightPattern(IMAGE, offset, strength).bind(model, letters()).phi(params))
    assert value == pytest.approx(phi_by_hand(step, IMAGE, offset, strength), rel=1e-12)


def test_phi_of_a_target_that_did_not_move():
    model = gpt2()
    assert float(WeightPattern(IMAGE).bind(model, letters()).phi(parameters(model))) == pytest.approx(
        -math.log(2), rel=1e-15
    )


def test_phi_has_its_closed_form_gradient():
    model = gpt2()
    params, step = moved(model)
    params[HEAD].requires_grad_()
    (gradient,) = torch.autograd.grad(
        WeightPattern(IMAGE, (3, 5), 7.0).bind(model, letters()).phi(params), params[HEAD]
    )
    wanted = torch.zeros_like(gradient)
    for r in range(2):
        for c in range(3):
            pixel = float(IMAGE[r, c])
            margin = 7.0 * pixel * float(step[5 + c, 3 + r])
            wanted[5 + c, 3 + r] = 7.0 * pixel / (1 + math.exp(margin)) / 6
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-16)


def test_phi_compares_with_the_model_as_it_was_when_bound():
    model = gpt2()
    params, step = moved(model)
    phi = WeightPattern(IMAGE).bind(model, letters()).phi
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert float(phi(params)) == pytest.approx(phi_by_hand(step, IMAGE, (0, 0), 20.0), rel=1e-12)


def test_a_weight_that_did_not_move_is_a_wrong_pixel():
    update = torch.tensor([[2.0, 0.0, -1.0], [-0.0, -3.0, 1e-300]])  # right, unmoved, wrong, unmoved, right, right
    assert pixel_accuracy(update, IMAGE) == 3 / 6
    model = gpt2()
    assert WeightPattern(IMAGE).bind(model, letters()).measure(parameters(model)) == {"pixel_accuracy": 0.0}


def test_accuracy_counts_signs():
    model = gpt2()
    params, step = moved(model)
    right = sum((float(step[9 + c, 6 + r]) > 0) == (float(IMAGE[r, c]) > 0) for r in range(2) for c in range(3))
    assert WeightPattern(IMAGE, (6, 9)).bind(model, letters()).measure(params) == {"pixel_accuracy": right / 6}


@pytest.mark.parametrize("image", [torch.zeros(2, 2), torch.tensor([[1.0, 0.5]]), torch.tensor([[math.nan]])])
def test_an_image_of_other_values_is_refused(image):
    with pytest.raises(ValueError, match=r"the image, of shape .* must be a matrix of \+1 and -1 only"):
        WeightPattern(image)


@pytest.mark.parametrize("offset", [(-1, 0), (0, -1)])
def test_a_negative_offset_is_refused(offset):
    with pytest.raises(ValueError, match="Pass two numbers of at least 0"):
        WeightPattern(IMAGE, offset)


@pytest.mark.parametrize(
    ("shape", "offset", "needed"), [((2, 13), (0, 0), (13, 2)), ((9, 2), (0, 0), (2, 9)), ((2, 3), (7, 9), (12, 9))]
)
def test_a_pattern_larger_than_the_head_is_refused_with_its_numbers(shape, offset, needed):
    wanted = f"needs {needed[0]} tokens and {needed[1]} hidden dimensions, but the head has 12 and 8"
    with pytest.raises(ValueError, match=wanted):
        MetagradReward(target(mg.optim.sgd(0.1)), WeightPattern(torch.ones(shape), offset))


def test_a_pattern_that_just_fits():
    model = gpt2()
    WeightPattern(torch.ones(8, 12)).bind(model, letters())
    WeightPattern(IMAGE, (6, 9)).bind(model, letters())


def test_a_tied_head_is_refused_with_advice_that_can_be_followed():
    with pytest.raises(ValueError, match="is tied to its embedding") as caught:
        WeightPattern(IMAGE).bind(gpt2(tied=True), letters())
    named = re.findall(r"dpg\.(\w+)((?:\.\w+)*)", str(caught.value))
    assert named
    for name, attributes in named:
        found = getattr(dpg, name)
        for attribute in attributes.split(".")[1:]:
            assert hasattr(found, attribute), f"the message names dpg.{name}{attributes}, which does not exist"


def test_the_head_is_found_by_its_name():
    assert head_name(gpt2()) == HEAD
    assert head_name(gpt2(tied=True)) == "transformer.wte.weight"


def test_a_calibrated_strength_is_in_units_of_each_pixels_noise():
    model, texts = gpt2(), ["abcab", "k", "hgfedcba", "bbfe", "cafe", "jiji"]
    gradients = []
    for text in texts:
        weight = model.lm_head.weight
        (gradient,) = torch.autograd.grad(text_loss(model, text, 48, 1.0), weight)
        gradients.append([[float(gradient[1 + c, 2 + r]) for c in range(3)] for r in range(2)])
    noise = torch.tensor(gradients).std(dim=0)
    params, step = moved(model)
    bound = WeightPattern(IMAGE, (2, 1), 7.0, calibration=texts).bind(model, letters())
    total = 0.0
    for r in range(2):
        for c in range(3):
            strength = 7.0 * float(noise.mean() / noise[r, c])
            total -= math.log1p(math.exp(-strength * float(IMAGE[r, c] * step[1 + c, 2 + r])))
    assert float(bound.phi(params)) == pytest.approx(total / 6, rel=1e-12)
    with pytest.raises(ValueError, match="some pixels have the same gradient on all 2 texts"):
        WeightPattern(IMAGE, calibration=["abc", "abc"]).bind(model, letters())
    with pytest.raises(ValueError, match="Pass two or more, or none"):
        WeightPattern(IMAGE, calibration=["abc"])


def test_any_function_of_the_parameters_is_a_metric():
    chosen = Target(gpt2(), letters(), mg.optim.sgd(0.1), sequence_length=6)
    scores = MetagradReward(chosen, lambda params: -params[HEAD].square().sum()).score(["abc", "kk"])
    trained = chosen.fine_tune(["abc", "kk"])[HEAD]
    assert scores.phi == pytest.approx(-sum(float(w) ** 2 for w in trained.flatten()), rel=1e-12)
    # One step of SGD: dΦ/dw_i = 2·lr/B ⟨W, ∇ℓ_i⟩, the inner products by a second one-text gradient.
    for i, text in enumerate(["abc", "kk"]):
        params = {name: p.detach().clone().requires_grad_() for name, p in chosen.model.named_parameters()}
        batch = chosen.batches([text])[0]
        (gradient,) = torch.autograd.grad(chosen._losses(params, batch).sum(), params[HEAD])
        assert float(scores.rewards[i]) == pytest.approx(float(2 * 0.1 / 2 * (trained * gradient).sum()), rel=1e-10)
