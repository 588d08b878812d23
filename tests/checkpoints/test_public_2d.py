"""Key lists of the public files of 2D networks: every key has its place, and values come where they belong."""

from __future__ import annotations

import json

import pytest
import torch

from medseg3d.checkpoints import load_checkpoint
from medseg3d.checkpoints.comparison import align, compare
from medseg3d.checkpoints.report import CheckpointReport
from medseg3d.layers.positions import interpolate_positions
from medseg3d.networks.backbones.alexnet import alexnet
from medseg3d.networks.backbones.googlenet import googlenet
from medseg3d.networks.backbones.resnet import resnet50, resnet101
from medseg3d.networks.backbones.swin_classifier import SwinClassifier, swin_b, swin_s, swin_t
from medseg3d.networks.backbones.vgg import vgg16, vgg16_bn
from tests.checkpoints.conftest import assert_same, filled

PUBLIC = {
    "official_swin_tiny_patch4_window7_224": swin_t,
    "timm_swin_base_patch4_window7_224": swin_b,
    "timm_swin_tiny_patch4_window7_224": swin_t,
    "torchvision_alexnet": alexnet,
    "torchvision_googlenet": googlenet,
    "torchvision_resnet50": resnet50,
    "torchvision_resnet101": resnet101,
    "torchvision_swin_b": swin_b,
    "torchvision_swin_s": swin_s,
    "torchvision_swin_t": swin_t,
    "torchvision_vgg16": vgg16,
    "torchvision_vgg16_bn": vgg16_bn,
}
SMALL = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 3, "num_classes": 5}


def layout(shared, name):
    return json.loads(shared("golden", "2d", "layouts", f"{name}.json").read_text())


def tensors_of(layout, device):
    """Tensors of the list's shapes without values."""
    whole = ("relative_position_index", "num_batches_tracked")
    return {
        key: torch.empty(shape, dtype=torch.int64 if key.endswith(whole) else torch.float32, device=device)
        for key, shape in layout["tensors"]
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_every_key_has_its_place(shared, name):
    listed = layout(shared, name)
    with torch.device("meta"):
        network = PUBLIC[name]()
    assert sum(parameter.numel() for parameter in network.parameters()) == listed["n_parameters"]
    report = CheckpointReport(name, type(network).__name__)
    compare(align(tensors_of(listed, "meta"), network.state_dict()), report, None, ())
    assert report.complete and report.used == 1 and not report.problems()
    assert {key.rpartition(".")[2] for key in report.left_over} <= {"attn_mask"}
    assert {key.rpartition(".")[2] for key in report.missing} <= {"relative_position_index"}
    assert bool(report.renamed) == (not name.startswith("torchvision"))


def test_a_file_with_the_keys_of_the_public_one(shared, write):
    listed = layout(shared, "official_swin_tiny_patch4_window7_224")
    network = swin_t()
    index = network.features[1][0].attn.relative_position_index.view(49, 49)
    values = {key: torch.zeros_like(x) for key, x in tensors_of(listed, "cpu").items()}
    values.update({key: index for key in values if key.endswith("relative_position_index")})
    report = load_checkpoint(network, write({"model": values}, "swin_tiny_patch4_window7_224.pth"))
    assert report.complete and not report.missing
    assert not any(parameter.any() for parameter in network.parameters())


def in_the_layout_of(who, state):
    """Names of the authors' class or of timm for a state_dict of ours."""
    names = {}
    for key, x in state.items():
        part, _, rest = key.partition(".")
        if part == "features":
            number, _, rest = rest.partition(".")
            i = int(number)
            if i == 0:
                key = "patch_embed." + {"0": "proj", "2": "norm"}[rest[0]] + rest[1:]
            elif i % 2:
                rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
                key = f"layers.{i // 2}.blocks.{rest}"
            else:
                key = f"layers.{i // 2 - (who == 'authors')}.downsample.{rest}"
        if who == "timm":
            key = key.replace("head.", "head.fc.")
            if key.endswith("index"):
                continue
        names[key] = x.view(9, 9) if key.endswith("index") else x
    return names


@pytest.mark.parametrize("who", ["authors", "timm"])
def test_values_of_the_authors_and_of_timm_come_where_they_belong(write, who):
    source, network = filled(SwinClassifier(**SMALL)), SwinClassifier(**SMALL)
    report = load_checkpoint(network, write({"model": in_the_layout_of(who, source.state_dict())}))
    assert report.complete and report.used == 1
    assert_same(network.state_dict(), source.state_dict())


def test_another_network_s_file_is_refused(write):
    state = in_the_layout_of("timm", SwinClassifier(**SMALL).state_dict())
    with pytest.raises(ValueError, match="was not loaded"):
        load_checkpoint(SwinClassifier(**{**SMALL, "depths": (2, 4, 2)}), write(state))


def test_another_number_of_classes_is_refused_and_can_be_skipped(write):
    source = filled(SwinClassifier(**SMALL))
    network = SwinClassifier(**{**SMALL, "num_classes": 2})
    path = write(source.state_dict())
    with pytest.raises(ValueError, match=r"head\.weight is \(5, 32\) in the file and \(2, 32\) in the network"):
        load_checkpoint(network, path)
    report = load_checkpoint(network, path, skip=["head."])
    assert report.scope_share == 1 and report.skipped == ["head.weight", "head.bias"]


def test_tables_of_another_window_are_resized_on_request(write):
    source = filled(SwinClassifier(**SMALL))
    network = SwinClassifier(**{**SMALL, "window_size": (4, 5)})
    path = write(source.state_dict())
    with pytest.raises(ValueError, match="build it with the file's window_size"):
        load_checkpoint(network, path)
    report = load_checkpoint(network, path, interpolate_positions=True)
    assert report.complete and len(report.notes) == 6
    theirs, ours = (net.features[1][1].attn.relative_position_bias_table.detach() for net in (source, network))
    assert ours.shape == (7 * 9, 1)
    # The offset of nothing lies in the middle of either; a bicubic spline goes through its knots there.
    torch.testing.assert_close(ours.view(7, 9)[3, 4], theirs.view(5, 5)[2, 2])
    torch.testing.assert_close(network.head.weight, source.head.weight)


@pytest.mark.parametrize(("size", "grid", "new_grid"), [(32, None, (12, 16)), ((48, 32), (12, 8), (12, 16))])
def test_absolute_positions_are_resized_on_request(write, size, grid, new_grid):
    arguments = {**SMALL, "window_size": 2, "absolute_positions": True}
    source = filled(SwinClassifier(**arguments, img_size=size))
    network = SwinClassifier(**arguments, img_size=[4 * n for n in new_grid])
    path, old_grid = write(source.state_dict()), grid or (8, 8)
    tokens = [old_grid[0] * old_grid[1], new_grid[0] * new_grid[1]]
    advice = f"position table is for {tokens[0]} patches, the network's for {tokens[1]}: .* interpolate_positions=True"
    with pytest.raises(ValueError, match=advice):
        load_checkpoint(network, path)
    report = load_checkpoint(network, path, interpolate_positions=True, position_grid=grid)
    assert report.complete
    assert report.notes == [f"absolute_pos_embed was interpolated from {tokens[0]} to {tokens[1]} positions"]
    stored = source.absolute_pos_embed.detach()
    torch.testing.assert_close(network.absolute_pos_embed.detach(), interpolate_positions(stored, old_grid, new_grid))
