"""Scores of proposals, pasted into the image and combined."""

from __future__ import annotations

import pytest
import torch

from medseg3d.inference.proposals import ensemble_scores, segment_proposals
from medseg3d.networks.deconvnet import DeconvNet


def colours(batch):
    """A network whose scores are the image itself and its negative."""
    assert batch.shape[2:] == (8, 8)
    return torch.cat([batch, -batch], dim=1)


def segment(image, boxes, **arguments):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return segment_proposals(colours, image, boxes, size=(8, 8), **{"smallest_side": 2, **arguments})


def test_one_proposal_of_the_whole_image_is_the_network_s_answer():
    image = torch.randn(1, 8, 8)
    torch.testing.assert_close(segment(image, [[0, 0, 8, 8]]), torch.cat([image, -image]))


def test_maximum_with_zero_outside():
    image = torch.ones(1, 16, 16)
    image[:, :, 8:] = 3
    y = segment(image, [[0, 0, 8, 8], [8, 0, 16, 8], [0, 0, 8, 4]])
    assert torch.equal(y[0], torch.where(torch.arange(16)[:, None] < 8, image[0], torch.zeros(())))
    assert not y[1].any()  # below zero where a proposal says so, zero from those beside
    inside_all = segment(image, [[0, 0, 8, 8], [0, 0, 16, 16]])
    assert torch.equal(inside_all[1, :8, :4], -torch.ones(8, 4)) and not inside_all[1, 8:].any()


def test_sum():
    y = segment(torch.ones(1, 16, 16), [[0, 0, 8, 8], [4, 0, 12, 8]], combine="sum")
    assert y[0, 0].tolist() == [1.0] * 4 + [2.0] * 4 + [1.0] * 4 + [0.0] * 4
    assert torch.equal(y[1], -y[0])


def test_small_clipped_and_surplus_proposals_do_not_count():
    image = torch.ones(1, 16, 16)
    boxes = [[0, 0, 3, 16], [-5, -5, 3.2, 20], [30, 30, 60, 60], [9, 9, 5, 5], [8, 8, 16, 16], [0, 8, 8, 16]]
    y = segment(image, boxes, smallest_side=4, most=2)
    covered = torch.zeros(16, 16)
    covered[:, :4] = 1  # 3.2 is rounded outwards
    covered[8:, 8:] = 1
    assert torch.equal(y[0], covered)
    assert segment(image, boxes, smallest_side=4, most=None)[0, 8:, :8].all()


def test_batches_change_nothing_and_neither_is_the_image():
    image = torch.rand(1, 20, 30)
    before = image.clone()
    boxes = [[0, 0, 9, 9], [3.5, 2, 20, 14], [10, 5, 30, 20], [0, 10, 8, 20]]
    torch.testing.assert_close(segment(image, boxes, batch_size=3), segment(image, boxes))
    assert torch.equal(image, before)


def test_deconvnet_runs_on_proposals():
    torch.manual_seed(0)
    network = DeconvNet(1, 3, width=1 / 32).eval()
    y = segment_proposals(network, torch.randn(1, 200, 150), torch.tensor([[0, 0, 150, 200], [20, 30, 140, 190]]))
    assert y.shape == (3, 200, 150) and torch.isfinite(y).all() and not y.requires_grad


@pytest.mark.parametrize(
    ("image", "boxes", "arguments", "message"),
    [
        ((1, 8, 8), [], {}, "none of the 0 proposals has sides of 2 pixels"),
        ((1, 8, 8), [[0, 0, 8, 1]], {}, "none of the 1 proposals has .* within the image of 8x8"),
        ((1, 8, 8), [[3, 3, 3, 3]], {"smallest_side": 0}, "none of the 1 proposals"),
        ((1, 0, 8), [[0, 0, 8, 8]], {}, "not empty"),
        ((1, 1, 8, 8), [[0, 0, 8, 8]], {}, r"must be \(channels, height, width\)"),
        ((1, 8, 8), [[0, 0, float("nan"), 8]], {}, "boxes must be finite"),
        ((1, 8, 8), [[0, 0, 8, 8]], {"combine": "mean"}, "combine must be one of 'max', 'sum', got 'mean'"),
    ],
)
def test_bad_input(image, boxes, arguments, message):
    with pytest.raises(ValueError, match=message):
        segment(torch.zeros(image), boxes, **arguments)


def test_boxes_of_another_shape():
    with pytest.raises(ValueError, match=r"boxes must be \(N, 4\)"):
        segment_proposals(colours, torch.zeros(1, 8, 8), torch.zeros(4))


def test_ensembles():
    a, b = torch.tensor([[[-1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
    assert ensemble_scores(a, b).flatten().tolist() == [1, 3]
    assert ensemble_scores(a, b, "product").flatten().tolist() == [0, 8]
    with pytest.raises(ValueError, match="one shape"):
        ensemble_scores(a, b[..., :1])
    with pytest.raises(ValueError, match="'mean' or 'product'"):
        ensemble_scores(a, b, "max")
