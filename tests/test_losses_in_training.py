"""Losses where a training puts them: several processes, autocast, transforms, labels that do not fit."""

from __future__ import annotations

import monai.losses
import pytest
import torch
import torch.distributed as dist

from medseg3d.losses import MarginalLoss, PartialDiceCELoss, WeightedCrossEntropyLoss


def case(batch=2, classes=4, shape=(3, 4, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *shape, generator=generator)
    labels = torch.randint(0, classes, (batch, 1, *shape), generator=generator)
    return logits, labels


@pytest.fixture
def twins(monkeypatch):
    """Two processes with the same batch; the sums that they exchanged."""
    exchanged = []

    def all_reduce(sums):
        exchanged.append(sums.clone())
        sums.mul_(2)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return exchanged


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_a_gradient_a_process_may_compute_the_loss_alone(twins, mode):
    """Another process would never answer."""
    logits, labels = case()
    with mode():
        PartialDiceCELoss()(logits, labels)
        assert not twins


def test_in_training_the_batch_is_that_of_all_processes(twins, monkeypatch):
    logits, labels = case()
    loss_function = PartialDiceCELoss(smooth=1.0)
    ours = logits.clone().requires_grad_()
    loss = loss_function(ours, labels)
    loss.backward()
    assert len(twins) == 1
    monkeypatch.undo()
    both = torch.cat([logits, logits]).requires_grad_()
    expected = loss_function(both, torch.cat([labels, labels]))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(ours.grad / 2, both.grad[:2], rtol=1e-5, atol=1e-8)  # gradients are averaged


def test_within_autocast_value_and_gradient_are_those_without():
    logits, labels = case(shape=(16, 16, 16))
    labels[labels == 3] = 0
    annotated = torch.tensor([[True, True, True, False], [True] * 4])
    plain, cast = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = PartialDiceCELoss()(plain, labels, annotated)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = PartialDiceCELoss()(cast, labels, annotated)
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(cast.grad, plain.grad, rtol=1e-6, atol=0)


def weighted(logits, labels):
    return WeightedCrossEntropyLoss()(logits, labels, torch.ones(labels.shape))


LOSSES = [PartialDiceCELoss(), MarginalLoss(monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)), weighted]


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize(("channels", "wrong", "got"), [(4, -1, "-1 to 3"), (4, 255, "0 to 255"), (1, 1, "0 to 1")])
def test_labels_that_are_no_classes_are_refused(loss_function, dtype, channels, wrong, got):
    logits, labels = case(classes=channels)
    labels[0, 0, 0, 0, 0], labels[0, 0, 0, 0, 1] = wrong, 0
    with pytest.raises(ValueError, match=f"0 to {channels - 1} for logits of {channels} channels, got {got}: the net"):
        loss_function(logits, labels.to(dtype))


def test_voxels_without_weight_may_have_any_label():
    logits, labels = case()
    weights = torch.ones(labels.shape)
    weights[:, :, 0] = 0
    expected = WeightedCrossEntropyLoss("sum")(logits, labels, weights)
    for number in (-1, 255):
        labels[:, :, 0] = number
        assert WeightedCrossEntropyLoss("sum")(logits, labels, weights) == expected
    assert labels[:, :, 0].eq(255).all(), "the labels are not changed"


def test_labels_of_an_organ_that_was_not_contoured_are_refused():
    """Both losses could otherwise learn from what the list of cases calls unknown."""
    logits, labels = case()
    labels[0][labels[0] == 2] = 0
    annotated = torch.tensor([[True, True, False, True], [True] * 4])
    for loss_function in LOSSES[:2]:
        loss_function(logits, labels, annotated)
        with pytest.raises(ValueError, match="annotated calls not contoured"):
            loss_function(logits, labels, annotated.flip(0))


def test_gradients_by_torch_func_are_those_of_autograd():
    logits, labels = case()
    labels[0][labels[0] == 2] = 0
    annotated = torch.tensor([[True, True, False, True], [True] * 4])
    loss_function = PartialDiceCELoss(0.4, 2.0, 0.4)
    ours = logits.clone().requires_grad_()
    expected = loss_function(ours, labels, annotated)
    expected.backward()
    gradient, loss = torch.func.grad_and_value(loss_function)(logits, labels, annotated)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, ours.grad, rtol=1e-5, atol=1e-8)


def test_gradients_of_each_case_by_vmap():
    logits, labels = case()
    labels[0][labels[0] == 2] = 0
    annotated = torch.tensor([[True, True, False, True], [True] * 4])
    alone = logits[:, None], labels[:, None], annotated[:, None]
    gradients = torch.vmap(torch.func.grad(PartialDiceCELoss()))(*alone)
    for gradient, *one in zip(gradients, *alone, strict=True):
        expected = torch.func.grad(PartialDiceCELoss())(*one)
        torch.testing.assert_close(gradient, expected)


def test_torch_compile_sees_one_graph():
    """No check of values breaks it."""
    logits, labels = case()
    annotated = torch.ones(2, 4, dtype=torch.bool)
    compiled = torch.compile(PartialDiceCELoss(), fullgraph=True, backend="eager")
    expected = PartialDiceCELoss()(logits, labels, annotated)
    torch.testing.assert_close(compiled(logits.requires_grad_(), labels, annotated), expected)


def ignoring(number):
    return [PartialDiceCELoss(0.4, 2.0, 0.4, number), MarginalLoss(LOSSES[1].loss, number)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("number", [255, -1, 3])
@pytest.mark.parametrize("unknown", [(), (2,)])
def test_ignored_voxels_count_for_nothing(which, number, unknown):
    """Value and gradient are those of the other voxels alone, whatever the network says of the ignored ones."""
    logits, labels = case(shape=(6, 4, 2))
    logits[:, :, :3] *= 1e4
    labels[labels == 3] = 1
    annotated = torch.ones(2, 4, dtype=torch.bool)
    for organ in unknown:
        annotated[0, organ] = False
        labels[0][labels[0] == organ] = 0
    rest, known = logits[:, :, 3:].clone().requires_grad_(), labels[:, :, 3:].clone()
    labels[:, :, :3] = number
    logits.requires_grad_()
    loss_function = ignoring(number)[which]
    loss, expected = loss_function(logits, labels, annotated), ignoring(None)[which](rest, known, annotated)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(logits.grad[:, :, 3:], rest.grad, rtol=1e-5, atol=1e-8)
    assert not logits.grad[:, :, :3].any()
    if which == 0:
        gradient = torch.func.grad(loss_function)(logits.detach(), labels, annotated)
        torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-8)


def test_cases_count_by_the_voxels_that_are_not_ignored():
    logits, labels = case(shape=(6, 8))
    labels[0, :, :5], labels[1, :, :1] = 255, 255
    counted = labels[:, 0] < 255
    together = logits.movedim(1, -1)[counted].T[None], labels[:, 0][counted][None, None]
    torch.testing.assert_close(ignoring(255)[0](logits, labels), ignoring(None)[0](*together))


@pytest.mark.parametrize("loss_function", ignoring(255))
def test_a_batch_of_ignored_voxels_teaches_nothing(loss_function):
    logits, labels = case()
    logits.requires_grad_()
    loss = loss_function(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("loss_function", ignoring(255))
def test_only_the_number_that_is_ignored_may_be_no_class(loss_function):
    logits, labels = case()
    labels[0, 0, 0, 0, 0], labels[0, 0, 0, 0, 1] = 255, -1
    with pytest.raises(ValueError, match="got -1 to 3"):
        loss_function(logits, labels)
