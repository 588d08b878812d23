"""Swin for images against torchvision 0.28 and the authors' class: the same weights, the same maps and gradients."""

from __future__ import annotations

import pytest
import torch

from medseg3d.checkpoints import load_checkpoint
from medseg3d.layers.windows import cut_into_windows
from medseg3d.networks.backbones.swin_classifier import SwinClassifier, swin_t
from tests.parity.golden2d import Golden2d


def check_maps(golden, network, prefix, case):
    """Every stored map of the case, and the logits."""
    x = golden.tensor(f"{case}_input")
    with torch.no_grad():
        golden.check(f"{prefix}{case}_logits", network(x))
        maps = {}
        for i, layer in enumerate(network.features):
            x = layer(x)
            maps[f"features{i}"] = x
        maps["norm"] = network.norm(x)
    stored = [name for name in golden.arrays.files if name.startswith(f"{prefix}{case}_")]
    stored = [name for name in stored if not name.endswith(("_logits", "_input"))]
    assert stored
    for name in stored:
        x = maps[name.removeprefix(f"{prefix}{case}_")]
        stride = x.shape[-1] // golden.arrays[name].shape[-1]  # some keep every fourth channel
        golden.check(name, x[..., ::stride])


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_swin_t(shared, case):
    golden = Golden2d(shared("golden", "2d", "swin"), "swin_t")
    check_maps(golden, golden.fill(swin_t(num_classes=10)), "", case)


@pytest.mark.parametrize("number", [0, 1])
def test_small_ones_of_torchvision(shared, number):
    golden = Golden2d(shared("golden", "2d", "swin"), "swin_tv_small", spec=f"swin_tv_small{number}")
    network = golden.fill(SwinClassifier(**golden.spec["arguments"]))
    for case in ("case0", "case1"):
        check_maps(golden, network, f"m{number}_", case)


def test_gradients_of_torchvision(shared):
    golden = Golden2d(shared("golden", "2d", "swin"), "swin_tv_small", spec="swin_tv_small0")
    network = golden.fill(SwinClassifier(**golden.spec["arguments"]))
    network(golden.tensor("case0_input")).square().sum().backward()
    golden.check("m0_grad_patch", network.features[0][0].weight.grad, 1e-3)
    table = network.features[1][1].attn.relative_position_bias_table
    golden.check("m0_grad_bias_table", table.grad, 1e-3)


@pytest.mark.parametrize("number", [0, 1])
def test_small_ones_of_the_authors(shared, tmp_path, number):
    """Their weights come in by name; at the size that it was built for the network does what theirs does."""
    golden = Golden2d(shared("golden", "2d", "swin"), "swin_official_small", spec=f"swin_official_small{number}")
    network = official(golden.spec["arguments"]).eval()
    torch.save({"model": golden.state()}, tmp_path / "swin.pth")
    report = load_checkpoint(network, tmp_path / "swin.pth")
    assert report.complete and report.used == 1
    x = golden.tensor(f"m{number}_input")
    with torch.no_grad():
        golden.check(f"m{number}_logits", network(x))
        maps = dict(enumerate(network.stages(x)))
        for i, layer in enumerate(network.features[2::2]):  # theirs are behind patch merging
            maps[i] = layer(maps[i].movedim(1, -1)).movedim(-1, 1)
    for i, x in maps.items():
        golden.check(f"m{number}_layer{i}", x.flatten(2).transpose(1, 2))


def official(arguments):
    """The arguments of the authors' class, as the spec of a stored case has them."""
    given = dict(arguments)
    renamed = {"embed_dim": given.pop("dim"), "num_heads": given.pop("heads"), "absolute_positions": given.pop("ape")}
    return SwinClassifier(**given, **renamed)


@pytest.mark.parametrize("number", [0, 1])
def test_masks_are_those_of_the_authors(shared, number):
    golden = Golden2d(shared("golden", "2d", "swin"), "swin_official_small", spec=f"swin_official_small{number}")
    block = official(golden.spec["arguments"]).features[1][1]
    height, width = (n // 4 for n in golden.tensor(f"m{number}_input").shape[-2:])
    windows = cut_into_windows(1, (height, width), block.window_size, block.shift_size, torch.device("cpu"))
    ours = [mask for count, mask in windows.kinds for _ in range(count)]
    tokens = windows.index.view(-1, windows.tokens)[:, 0]  # of each window, the first in the rolled grid
    rows, columns = tokens // width, tokens % width
    order = sorted(range(len(ours)), key=lambda i: (int(rows[i]), int(columns[i])))
    masks = torch.stack([torch.zeros(windows.tokens, windows.tokens) if ours[i] is None else ours[i] for i in order])
    golden.check(f"m{number}_mask", masks)
