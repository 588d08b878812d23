"""The objective of self-supervised training against stored values of MONAI 1.6.1 and cases worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from medseg3d.losses import PretrainingLoss, contrastive_loss


def stored(shared, name):
    arrays = np.load(shared("golden", "3d", "losses", f"{name}.npz"))
    return {key: torch.from_numpy(arrays[key]) for key in arrays}


def manifest(shared):
    return json.loads(shared("golden", "3d", "losses", "manifest.json").read_text())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_contrast_and_its_gradient_are_those_stored(number, shared):
    """Tolerances of the stored values: 2e-6 max(1, value), and for gradients 1e-6 + 1e-5 of the greatest."""
    arrays, case = stored(shared, "contrastive"), manifest(shared)[f"contrastive_{number}"]
    views = [arrays[f"{number}.{name}"].requires_grad_() for name in "ab"]
    loss = contrastive_loss(torch.cat(views), case["args"]["temperature"])
    assert loss.item() == pytest.approx(case["value"], abs=2e-6 * max(1, abs(case["value"])))
    loss.backward()
    for name, view in zip("ab", views, strict=True):
        expected = arrays[f"{number}.grad_{name}"]
        atol = 1e-6 + 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(view.grad, expected, rtol=0, atol=atol)


def test_the_objective_and_its_terms_are_those_stored(shared):
    arrays, case = stored(shared, "ssl_objective"), manifest(shared)["ssl_objective"]
    terms = PretrainingLoss()((arrays["rot"], arrays["z"], arrays["rec"]), arrays["rot_target"], arrays["rec_target"])
    for name, value in terms.items():
        assert value.item() == pytest.approx(case[name], abs=2e-6 * max(1, case[name])), name
    assert sum(terms.values()).item() == pytest.approx(case["total"], abs=2e-6 * case["total"])


def test_the_contrast_by_hand():
    """Partners alike, the others at right angles: -log(e^2 / (e^2 + 2 e^0)) at temperature 0.5, at any length."""
    first = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert contrastive_loss(torch.cat([first, 7 * first])).item() == pytest.approx(expected, abs=1e-6)
    swapped = -math.log(1 / (math.exp(2) + 2))
    assert contrastive_loss(torch.cat([first, first.flip(0)])).item() == pytest.approx(swapped, abs=1e-6)


def test_terms_by_hand_and_their_factors():
    logits = torch.zeros(4, 4)
    embeddings = torch.eye(4)
    images = torch.zeros(4, 1, 2, 2, 2)
    output = (logits, embeddings, images + 0.5)
    turns = torch.tensor([0, 1, 2, 3])
    terms = PretrainingLoss()(output, turns, images)
    by_hand = {"rotation": math.log(4), "contrastive": math.log(3), "reconstruction": 0.5}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(by_hand)
    weighted = PretrainingLoss(rotation=2, contrastive=0, reconstruction=10)(output, turns, images)
    assert {name: value.item() for name, value in weighted.items()} == pytest.approx(
        {"rotation": 2 * math.log(4), "contrastive": 0, "reconstruction": 5}
    )


def test_float32_under_autocast_and_from_half_precision():
    generator = torch.Generator().manual_seed(0)
    output = tuple(torch.randn(shape, generator=generator) for shape in ((4, 4), (4, 16), (4, 1, 4, 4)))
    images, turns = torch.randn(4, 1, 4, 4, generator=generator), torch.tensor([0, 3, 1, 1])
    half = tuple(one.bfloat16() for one in output)
    expected = PretrainingLoss()(tuple(one.float() for one in half), turns, images)
    with torch.autocast("cpu", torch.bfloat16):
        got = PretrainingLoss()(half, turns, images)
    for name, value in got.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])


@pytest.mark.parametrize("views", [2, 5])
def test_a_contrast_without_others_is_refused(views):
    with pytest.raises(ValueError, match=f"at least two sub-volumes, got {views} embeddings"):
        contrastive_loss(torch.randn(views, 8))


def test_reconstructions_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"must be \(4, 1, 4, 4\) as the images, got \(4, 1, 2, 2\)"):
        PretrainingLoss()(
            (torch.zeros(4, 4), torch.eye(4), torch.zeros(4, 1, 2, 2)), torch.zeros(4), torch.zeros(4, 1, 4, 4)
        )
