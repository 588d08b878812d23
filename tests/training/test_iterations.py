"""One training step: what the loss gets, and what stops a run that diverges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medseg3d.training import DetectionIteration, Diverged, SegmentationIteration


def engine_of(network, loss):
    return SimpleNamespace(
        state=SimpleNamespace(device="cpu", iteration=3),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        inferer=lambda image, network: network(image),
        loss_function=loss,
    )


def batch_of(**beside):
    return {"image": torch.randn(2, 1, 4, 4), "label": torch.ones(2, 1, 4, 4), **beside}


def test_the_loss_gets_what_stands_beside_and_the_weights_change():
    seen = []

    def loss(logits, label, *beside):
        seen.append(beside)
        return logits.float().square().mean()

    network = nn.Conv2d(1, 2, 1)
    before = network.weight.detach().clone()
    batch = batch_of(weights=torch.rand(2, 1, 4, 4), annotated=torch.ones(2, 2))
    result = SegmentationIteration("weights", "annotated")(engine_of(network, loss), batch)
    assert [tuple(x.shape) for x in seen[0]] == [(2, 1, 4, 4), (2, 2)]
    torch.testing.assert_close(seen[0][0], batch["weights"])
    assert result["pred"].dtype == torch.bfloat16 and not result["loss"].requires_grad
    assert not torch.equal(network.weight, before)
    SegmentationIteration(dtype=torch.float32)(engine_of(network, loss), batch)
    assert seen[1] == ()


def test_the_gradient_is_clipped():
    network = nn.Conv2d(1, 1, 1, bias=False)
    before = network.weight.detach().clone()
    step = SegmentationIteration(dtype=torch.float32, clip_norm=0.5)
    step(engine_of(network, lambda logits, label: logits.sum() * 1e6), batch_of())
    assert (network.weight - before).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_batch_add_up_to_the_whole(parts):
    """Of five cases; more parts than cases are as many as there are cases."""
    torch.manual_seed(0)
    batch = {"image": torch.randn(5, 1, 4, 4), "label": torch.randn(5, 1, 4, 4), "weights": torch.rand(5, 1, 4, 4)}
    results, sizes = [], []

    def loss(logits, label, weights):
        sizes.append(len(logits))
        return ((logits - label).square() * weights).mean()

    for micro_batches in (1, parts):
        network = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.constant_(network.weight, 0.1)
        nn.init.zeros_(network.bias)
        step = SegmentationIteration("weights", dtype=torch.float32, micro_batches=micro_batches)
        output = step(engine_of(network, loss), batch)
        results.append((output["loss"], output["pred"], network.weight.detach()))
    assert sizes == [5] + {2: [3, 2], 3: [2, 2, 1], 7: [1] * 5}[parts]
    for whole, added in zip(*results, strict=True):
        torch.testing.assert_close(added, whole)


def test_a_failure_names_its_cases():
    step = SegmentationIteration(dtype=torch.float32)
    with pytest.raises(Diverged, match=r"iteration 3 \(patient1, patient2\); lower") as caught:
        step(engine_of(nn.Conv2d(1, 1, 1), lambda y, label: y.sum() / 0), batch_of(case=["patient1", "patient2"]))
    assert caught.value.event.endswith("iteration 3 (patient1, patient2)")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, label: logits.sum() * float("nan"), "the loss became nan at iteration 3"),
        (lambda logits, label: (logits * 0).sqrt().sum(), "the gradient's norm became nan at iteration 3"),
    ],
)
def test_a_diverged_run_stops_before_its_weights_change(loss, message):
    network = nn.Conv2d(1, 1, 1)
    before = network.weight.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        SegmentationIteration(dtype=torch.float32)(engine_of(network, loss), batch_of())
    assert torch.equal(network.weight, before)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, images, targets):
        self.seen = targets
        y = torch.stack([self.conv(image[None]).mean() for image in images])
        return {"loss_a": y.float().square().sum(), "loss_b": y.float().abs().sum()}


def test_a_detector_learns_from_the_sum_of_its_losses():
    network = Detector()
    before = network.conv.weight.detach().clone()
    batch = [{"image": torch.randn(1, 4, 4 + n), "boxes": torch.ones(n, 4), "name": "a"} for n in range(2)]
    result = DetectionIteration(["boxes"])(engine_of(network, None), batch)
    assert [list(target) for target in network.seen] == [["boxes"]] * 2
    torch.testing.assert_close(result["loss"], result["loss_a"] + result["loss_b"])
    assert not torch.equal(network.conv.weight, before)


def test_a_diverged_detector_stops_too():
    network = Detector()
    with pytest.raises(Diverged, match=r"the loss became nan at iteration 3 \(nuclei7\)"):
        item = {"image": torch.full((1, 2, 2), float("nan")), "case": "nuclei7"}
        DetectionIteration([])(engine_of(network, None), [item])
