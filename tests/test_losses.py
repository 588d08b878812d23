"""Losses against values worked out by hand, and stored ones."""

from __future__ import annotations

import math

import monai.losses
import numpy as np
import pytest
import torch

from medseg3d.losses import MarginalLoss, PartialDiceCELoss, WeightedCrossEntropyLoss


def case(batch=2, classes=4, shape=(3, 4, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *shape, generator=generator)
    labels = torch.randint(0, classes, (batch, 1, *shape), generator=generator)
    return logits, labels


def plain_dice_and_cross_entropy(logits, labels, smooth=1.0):
    """The ordinary loss, voxel by voxel in float64."""
    classes = logits.shape[1]
    z = np.moveaxis(logits.double().numpy(), 1, -1).reshape(-1, classes)
    y = labels.numpy().reshape(-1)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    cross_entropy = -np.log(p[np.arange(len(y)), y]).mean()
    dice = [(2 * p[y == c, c].sum() + smooth) / (p[:, c].sum() + (y == c).sum() + smooth) for c in range(1, classes)]
    return 1 - np.mean(dice), cross_entropy


def test_the_smallest_case_by_hand():
    """Two classes, four voxels, every probability a half: cross-entropy ln 2, Dice 2 * 0.5 / (2 + 1)."""
    loss = PartialDiceCELoss()(torch.zeros(1, 2, 4), torch.tensor([[[1, 0, 0, 0]]]))
    assert loss.item() == pytest.approx(math.log(2) + 1 - 1 / 3, abs=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 2), (5, 6)])
@pytest.mark.parametrize(("weight", "smooth"), [(1.0, 1.0), (0.3, 1e-5)])
def test_with_every_organ_contoured_it_is_dice_plus_cross_entropy(shape, weight, smooth):
    logits, labels = case(shape=shape)
    dice, cross_entropy = plain_dice_and_cross_entropy(logits, labels, smooth)
    loss = PartialDiceCELoss(weight, smooth)
    for annotated in (None, torch.ones(2, 4, dtype=torch.bool)):
        assert loss(logits, labels, annotated).item() == pytest.approx(cross_entropy + weight * dice, rel=1e-5)


def test_a_perfect_prediction_costs_nothing():
    _, labels = case()
    logits = torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1) * 100.0
    assert PartialDiceCELoss()(logits, labels).item() == pytest.approx(0, abs=1e-6)


def test_predicting_a_missing_organ_on_background_costs_nothing():
    labels = torch.zeros(1, 1, 8, dtype=torch.long)
    labels[..., 0] = 1
    right = torch.zeros(1, 3, 8)
    right[:, 1, 0] = 50
    right[:, 0, 1:] = 50
    organ_2_there = right.clone()
    organ_2_there[:, 0, 4:], organ_2_there[:, 2, 4:] = 0, 50
    loss = PartialDiceCELoss()
    missing, contoured = torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.bool)
    assert loss(organ_2_there, labels, missing).item() == pytest.approx(0, abs=1e-6)
    assert loss(organ_2_there, labels, missing) == loss(right, labels, missing)
    assert loss(organ_2_there, labels, contoured) > 10


def test_a_missing_organ_is_still_wrong_where_another_one_was_contoured():
    labels = torch.ones(1, 1, 4, dtype=torch.long)
    logits = torch.zeros(1, 3, 4)
    logits[:, 2] = 50
    assert PartialDiceCELoss()(logits, labels, torch.tensor([[True, True, False]])) > 10


def test_dice_of_an_organ_counts_the_cases_that_have_it():
    """Organ 2 is missing in the second case: its Dice is the first case's alone, organ 1's that of both."""
    logits, labels = case(classes=3)
    labels[1][labels[1] == 2] = 0
    annotated = torch.tensor([[True, True, True], [True, True, False]])
    p = logits.softmax(dim=1).flatten(2).double()
    one_hot = torch.nn.functional.one_hot(labels.flatten(1), 3).movedim(-1, 1).double()

    def soft_dice(organ, cases):
        overlap = (p[cases, organ] * one_hot[cases, organ]).sum()
        return (2 * overlap + 1) / (p[cases, organ].sum() + one_hot[cases, organ].sum() + 1)

    both = PartialDiceCELoss(smooth=1.0)(logits, labels, annotated)
    cross_entropy = PartialDiceCELoss(dice_weight=0.0)(logits, labels, annotated)
    expected = 1 - (soft_dice(1, [0, 1]) + soft_dice(2, [0])) / 2
    assert (both - cross_entropy).item() == pytest.approx(expected.item(), abs=1e-5)

    background = torch.where(labels.flatten(1) == 0, p[:, 0] + torch.tensor([[0.0], [1.0]]) * p[:, 2], 1.0)
    organ = torch.where(labels.flatten(1) > 0, p.gather(1, labels.flatten(2)).flatten(1), 1.0)
    assert cross_entropy.item() == pytest.approx(-(background * organ).log().mean().item(), abs=1e-5)


def test_an_organ_that_no_window_shows_is_not_silenced():
    """Its Dice term could only push its probability down: it has none, and the others' are what they were."""
    logits, labels = case()
    labels[labels == 3] = 0
    dice = PartialDiceCELoss()(logits, labels) - PartialDiceCELoss(dice_weight=0.0)(logits, labels)
    annotated = torch.tensor([[True, True, True, False]] * 2)
    without = PartialDiceCELoss()(logits, labels, annotated)
    without = without - PartialDiceCELoss(dice_weight=0.0)(logits, labels, annotated)
    assert dice.item() == pytest.approx(without.item(), abs=1e-6)
    nothing = torch.zeros_like(labels)
    assert PartialDiceCELoss()(logits, nothing) == PartialDiceCELoss(dice_weight=0.0)(logits, nothing)


def test_annotated_may_be_zeros_and_ones():
    logits, labels = case()
    labels[labels == 3] = 0
    booleans = torch.tensor([[True, True, True, False], [True, True, True, True]])
    loss = PartialDiceCELoss()
    for dtype in (torch.int64, torch.uint8, torch.float32):
        assert loss(logits, labels, booleans.to(dtype)) == loss(logits, labels, booleans)


def partial_dice_ce(logits, labels, annotated, weight, smooth, organ_share):
    """The loss as its docstring tells it, one step after another, for autograd."""
    classes = logits.shape[1]
    p, y = logits.softmax(dim=1).flatten(2), torch.nn.functional.one_hot(labels.flatten(1), classes).movedim(-1, 1)
    missing = ~annotated[..., None]
    p = torch.cat([p[:, :1] + (p * missing).sum(1, keepdim=True), (p * ~missing)[:, 1:]], dim=1)
    overlap, total, size = ((p * y).sum((0, 2)), (p + y).sum((0, 2)), y.sum((0, 2)))
    each = [1.0] + [min(max(organ_share * labels.numel() / max(int(k), 1), 1.0), 50.0) for k in size[1:]]
    cross_entropy = -(torch.tensor(each)[labels.flatten(1)] * (p * y).sum(1).log()).mean()
    dice = (2 * overlap + smooth) / (total + smooth)
    present = [k for k in range(1, classes) if size[k] > 0]
    return cross_entropy + weight * (1 - dice[present]).mean() if present else cross_entropy


@pytest.mark.parametrize("absent", [(), (2,), (1, 2, 3)])
@pytest.mark.parametrize("unknown", [(), (1,), (1, 3)])
@pytest.mark.parametrize("settings", [(1.0, 1e-5, 0.0), (0.4, 2.0, 0.4), (0.4, 2.0, 1.0)])
def test_value_and_gradient_are_those_of_the_formula(absent, unknown, settings):
    logits, labels = case(batch=3)
    annotated = torch.ones(3, 4, dtype=torch.bool)
    for organ in absent:
        labels[labels == organ] = 0
    for organ in unknown:
        annotated[1:, organ] = False
        labels[1:][labels[1:] == organ] = 0
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = 3 * PartialDiceCELoss(*settings)(ours, labels, annotated)
    expected = 3 * partial_dice_ce(theirs, labels, annotated, *settings)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    got.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_small_organs_weigh_as_much_as_large_ones_up_to_a_limit():
    """The gradient at each organ's own voxels, summed, for a network that answers background."""
    labels = torch.zeros(1, 1, 100, 100, dtype=torch.long)
    labels[..., :40], labels[..., 50, 50:90], labels[..., 60, 60] = 1, 2, 3  # 4000, 40 and 1 voxels
    logits = torch.zeros(1, 4, 100, 100)
    logits[:, 0] = 20
    logits.requires_grad_()
    PartialDiceCELoss(dice_weight=0.0, organ_share=0.02)(logits, labels).backward()
    pull = [-logits.grad[0, organ][labels[0, 0] == organ].sum().item() for organ in (1, 2, 3)]
    assert pull == pytest.approx([0.4, 0.02, 50 / 10_000], rel=1e-4)


@pytest.mark.parametrize("share", [-0.01, 1.1])
def test_a_share_is_between_nothing_and_all(share):
    with pytest.raises(ValueError, match=f"0 to 1, got {share}"):
        PartialDiceCELoss(organ_share=share)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("missing", [(), (2,), (1, 2, 3)])
def test_loss_and_gradient_are_finite(scale, missing):
    logits, labels = case()
    logits = (logits * scale).requires_grad_()
    annotated = torch.ones(2, 4, dtype=torch.bool)
    for organ in missing:
        annotated[:, organ] = False
        labels[labels == organ] = 0
    loss = PartialDiceCELoss()(logits, labels, annotated)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    if len(missing) < 3:
        assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, labels = case(shape=(16, 16, 16))
    rounded = logits.to(dtype).requires_grad_()
    loss = PartialDiceCELoss()(rounded, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(PartialDiceCELoss()(rounded.detach().float(), labels).item(), rel=1e-6)
    assert rounded.grad.dtype == dtype and torch.isfinite(rounded.grad).all()


def test_inputs_are_not_changed():
    logits, labels = case()
    labels[0][labels[0] == 3] = 0
    annotated = torch.tensor([[True, True, True, False], [False, True, True, True]])
    copies = logits.clone(), labels.clone(), annotated.clone()
    PartialDiceCELoss()(logits, labels, annotated)
    assert all(torch.equal(a, b) for a, b in zip(copies, (logits, labels, annotated), strict=True))


def test_shapes_that_do_not_fit():
    logits, labels = case()
    with pytest.raises(ValueError, match=r"labels must be \(2, 1, 3, 4, 2\) for these logits, got \(2, 3, 4, 2\)"):
        PartialDiceCELoss()(logits, labels[:, 0])
    with pytest.raises(ValueError, match=r"annotated must be \(2, 4\), got \(2, 3\)"):
        PartialDiceCELoss()(logits, labels, torch.ones(2, 3, dtype=torch.bool))


def test_weighted_cross_entropy_has_the_stored_values(shared):
    stored = np.load(shared("golden", "2d", "equations") / "unet.npz")
    logits = torch.from_numpy(stored["logits"])[None]
    labels = torch.from_numpy(stored["cells_labels"] > 0)[None, None]
    weights = torch.from_numpy(stored["cells_class_weights"] + stored["cells_border"])[None, None]
    for reduction in ("sum", "mean", "weighted_mean"):
        loss = WeightedCrossEntropyLoss(reduction)(logits, labels, weights)
        assert loss.item() == pytest.approx(float(stored[f"loss_{reduction}"]), rel=1e-5)


def test_voxels_without_weight_teach_nothing():
    logits, labels = case()
    logits.requires_grad_()
    weights = torch.zeros(labels.shape)
    weights[:, :, 0] = 2.0
    WeightedCrossEntropyLoss()(logits, labels, weights).backward()
    assert logits.grad[:, :, 0].abs().min() > 0
    assert not logits.grad[:, :, 1:].any()


@pytest.mark.parametrize("reduction", ["sum", "mean", "weighted_mean"])
def test_a_batch_without_any_weight_costs_nothing(reduction):
    logits, labels = case()
    logits.requires_grad_()
    loss = WeightedCrossEntropyLoss(reduction)(logits, labels, torch.zeros(labels.shape))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_weighted_cross_entropy_is_computed_in_float32():
    logits, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = WeightedCrossEntropyLoss("sum")(logits.bfloat16(), labels, torch.ones(labels.shape))
    expected = torch.nn.functional.cross_entropy(logits.bfloat16().float(), labels[:, 0], reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item())


def test_what_weighted_cross_entropy_refuses():
    logits, labels = case()
    with pytest.raises(ValueError, match="need labels and weights of"):
        WeightedCrossEntropyLoss()(logits, labels, torch.ones(labels.shape)[:, 0])
    with pytest.raises(ValueError, match="must be 'sum', 'mean' or 'weighted_mean', got 'none'"):
        WeightedCrossEntropyLoss("none")


MONAI_LOSSES = [
    lambda: monai.losses.DiceLoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0),
    lambda: monai.losses.GeneralizedDiceLoss(to_onehot_y=True, softmax=True),
    lambda: monai.losses.DiceCELoss(to_onehot_y=True, softmax=True),
    lambda: monai.losses.TverskyLoss(to_onehot_y=True, softmax=True, alpha=0.3, beta=0.7),
    lambda: monai.losses.FocalLoss(to_onehot_y=True, use_softmax=True),
]


@pytest.mark.parametrize("make", MONAI_LOSSES)
def test_a_class_that_is_not_contoured_is_background(make):
    """The loss of the smaller problem, in which the missing class never was; cases are averaged."""
    loss, (logits, labels) = make(), case()
    labels[1][labels[1] == 2] = 0
    annotated = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    p = logits[1:].softmax(dim=1)
    smaller = torch.stack([p[:, 0] + p[:, 2], p[:, 1], p[:, 3]], dim=1).log()
    renamed = torch.where(labels[1:] == 3, 2, labels[1:])
    expected = (loss(logits[:1], labels[:1]) + loss(smaller, renamed)) / 2
    got = MarginalLoss(loss)(logits, labels, annotated)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert got.item() != pytest.approx(MarginalLoss(loss)(logits, labels).item(), rel=1e-3)


@pytest.mark.parametrize("make", MONAI_LOSSES)
def test_a_case_in_which_nothing_was_looked_for_teaches_nothing(make):
    logits, labels = case(classes=2)
    labels[1] = 0
    logits.requires_grad_()
    loss = MarginalLoss(make())
    got = loss(logits, labels, torch.tensor([[True, True], [True, False]]))
    got.backward()
    assert got.item() == pytest.approx(loss(logits[:1], labels[:1]).item() / 2, rel=1e-5)
    assert logits.grad[0].abs().sum() > 0 and not logits.grad[1].any()
    with pytest.raises(ValueError, match="annotated calls not contoured"):
        loss(logits, torch.ones_like(labels), torch.tensor([[True, False]] * 2))


@pytest.mark.parametrize("make", MONAI_LOSSES)
def test_marginal_losses_are_computed_in_float32(make):
    logits, labels = case(shape=(8, 8, 8))
    labels[0][labels[0] == 1] = 0
    annotated = torch.tensor([[True, False, True, True], [True] * 4])
    rounded = (logits * 30).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = MarginalLoss(make())(rounded, labels, annotated)
    loss.backward()
    expected = MarginalLoss(make())(rounded.detach().float(), labels, annotated)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(rounded.grad).all() and rounded.grad.abs().sum() > 0


def test_squared_dice_of_v_net_by_hand():
    """Two voxels with probabilities a half: D = 2 * 0.5 / (0.25 + 0.25 + 1) for either class."""
    loss = MarginalLoss(monai.losses.DiceLoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0))
    assert loss(torch.zeros(1, 2, 2), torch.tensor([[[0, 1]]])).item() == pytest.approx(1 - 2 / 3, abs=1e-4)


def test_what_marginal_loss_refuses():
    logits, labels = case()
    loss = MarginalLoss(MONAI_LOSSES[0]())
    with pytest.raises(ValueError, match=r"annotated must be \(2, 4\), got \(2, 3\)"):
        loss(logits, labels, torch.ones(2, 3))
    with pytest.raises(ValueError, match="make them background"):
        loss(logits, labels, torch.tensor([[1, 1, 0, 1]] * 2))
