"""Windows, masks, relative positions, Swin blocks and convolutional blocks against MONAI 1.6.1 (golden/3d/blocks)."""

from __future__ import annotations

import hashlib
import json
from math import prod

import numpy as np
import pytest
import torch

from medseg3d.layers.residual import EncoderBlock, ProjectionUpBlock, UpBlock
from medseg3d.layers.windows import cut_into_windows, fitting_window, relative_position_index
from medseg3d.networks.backbones.swin import SwinBlock, SwinStage, WindowAttention
from tests.parity.golden_blocks import GoldenBlock

CPU = torch.device("cpu")


@pytest.fixture
def golden(request, shared):
    return GoldenBlock(shared("golden", "3d", "blocks"), request.param)


def cases(*names):
    return pytest.mark.parametrize("golden", names, indirect=True)


@cases("window_partition_0", "window_partition_1", "window_partition_2")
def test_windows_hold_the_tokens_of_the_reference(golden):
    batch, *grid = golden.case["dims_b_spatial"]
    window = tuple(golden.case["window"])
    x = torch.arange(batch * prod(grid), dtype=torch.float32).view(batch, *grid, 1)
    windows = cut_into_windows(batch, tuple(grid), window, (0,) * len(grid), CPU)
    assert torch.equal(windows.partition(x), golden.arrays["windows"].float())
    assert torch.equal(windows.reverse(windows.partition(x), like=x), x)


@cases("mask_0", "mask_1", "mask_2", "mask_3", "mask_4")
def test_masks_block_the_pairs_of_the_reference(golden):
    grid, window, shift = (tuple(golden.case[name]) for name in ("dims", "window", "shift"))
    window, shift = fitting_window(grid, window, shift)
    windows = cut_into_windows(1, grid, window, shift, CPU)
    # Ours are sorted by kind: which window of the raster each one is follows from the first token in it.
    first = windows.index.view(-1, windows.tokens)[:, 0]
    axes = torch.stack(torch.unravel_index(first, grid))
    position = [(p - s) % n // w for p, n, w, s in zip(axes, grid, window, shift, strict=True)]
    counts = [n // w for n, w in zip(grid, window, strict=True)]
    raster = np.ravel_multi_index([p.numpy() for p in position], counts)
    none = torch.zeros(windows.tokens, windows.tokens)
    masks = torch.cat([(none if mask is None else mask).expand(count, -1, -1) for count, mask in windows.kinds])
    assert sorted(raster) == list(range(len(masks)))
    expected = golden.arrays["blocked"][torch.from_numpy(raster)]
    assert torch.equal(masks, -100.0 * expected.float())


def test_the_window_shrinks_with_the_grid(shared):
    stored = json.loads(shared("golden", "3d", "blocks", "get_window_size.json").read_text())
    for grid, window, shift, (size, moved) in stored:
        assert fitting_window(tuple(grid), tuple(window), tuple(shift)) == (tuple(size), tuple(moved))


@cases("rel_index_2x3x4", "rel_index_3x5", "rel_index_4x4x4")
def test_relative_positions(golden):
    assert torch.equal(relative_position_index(tuple(golden.case["window"])), golden.arrays["index"].long())


def test_relative_positions_of_large_windows(shared):
    stored = json.loads(shared("golden", "3d", "blocks", "rel_index_digests.json").read_text())
    for name, case in stored.items():
        index = relative_position_index(tuple(map(int, name.split("x"))))
        assert hashlib.sha256(index.numpy().astype("<i8").tobytes()).hexdigest() == case["sha256_int64_le"], name


@pytest.mark.parametrize("gradients", [False, True])
@cases("window_attention_0", "window_attention_1", "window_attention_2", "window_attention_3")
def test_attention_in_windows(golden, gradients):
    case = golden.case
    attention = WindowAttention(case["dim"], case["num_heads"], tuple(case["window_size"]), case["qkv_bias"])
    golden.prepare(attention)
    x = golden.arrays["x"]
    if case["mask"]:
        masks = -100.0 * golden.arrays["blocked"].float()
        kinds = [(1, masks[i % len(masks)]) for i in range(len(x))]
    else:
        kinds = [(len(x), None)]
    with torch.set_grad_enabled(gradients):
        golden.check(attention(x, kinds))


@cases("swin_block_0", "swin_block_1", "swin_block_2")
def test_swin_blocks(golden):
    case = golden.case
    block = SwinBlock(case["dim"], case["num_heads"], case["window_size"], case["shift_size"])
    with torch.no_grad():
        golden.check(golden.prepare(block)(golden.arrays["x"]))


@cases("basic_layer_0", "basic_layer_1")
def test_swin_stages(golden):
    case = golden.case
    stage = SwinStage(case["dim"], case["num_heads"], case["window_size"], [0.0] * case["depth"], case["ds"])
    with torch.no_grad():
        tokens = golden.prepare(stage)(golden.arrays["x"].movedim(1, -1))
    golden.check(tokens.movedim(-1, 1))


@pytest.mark.parametrize(
    ("golden", "block"),
    [
        ("conv_basic_res", EncoderBlock(3, 4, 6, "instance")),
        ("conv_basic_res_same", EncoderBlock(3, 4, 4, "instance")),
        ("conv_basic_plain", EncoderBlock(3, 4, 6, "batch", residual=False)),
        ("conv_basic_2d", EncoderBlock(2, 3, 5, "instance")),
        ("conv_up_res", UpBlock(3, 8, 4, "instance")),
        ("conv_prup", ProjectionUpBlock(3, 8, 4, 1, "instance")),
    ],
    indirect=["golden"],
)
def test_convolutional_blocks(golden, block):
    inputs = [golden.arrays[name] for name in sorted(golden.arrays) if name.startswith("x")]
    golden.prepare(block)
    golden.check(block(*inputs))
    with torch.no_grad():
        golden.check(block(*inputs))
