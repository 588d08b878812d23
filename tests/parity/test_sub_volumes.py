"""Sub-volumes against MONAI 1.6.1's sliding window (golden/3d/sliding), with a network that is a formula."""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medseg3d.inference.sub_volumes import SubVolumes
from medseg3d.inference.windows import importance_map, window_starts, windows

CASES = [
    *("const_o0", "const_o025", "const_o05", "const_o0625", "gauss_o0", "gauss_o025", "gauss_o05", "gauss_o0625"),
    *("gauss_sigma_tuple_overlap_tuple", "gauss_overlap_08_roi10", "batch2_sw1", "batch3_sw5", "two_d"),
    *("roi_bigger_two_dims_const", "roi_bigger_replicate", "roi_bigger_reflect", "roi_bigger_circular"),
    *("roi_bigger_all", "roi_negative_and_none", "roi_equal_image", "roi_one_axis_1", "roi_weight_map"),
    *("tuple_multires", "tuple_multires_pad", "dict_multires", "with_coord", "process_fn"),
    *("buffered_steps1", "buffered_steps2_dim0"),  # MONAI saves memory there; the result is the same
]
MAPS = ["8x8x8_gaussian_0.125", "7x9x6_gaussian_0.125", "5x4_gaussian_(0.125,0.25)", "16x8x3_gaussian_0.0625"]
MAPS += ["3x2x4_constant_0.125"]


def plain(window, channels=2):
    axes = window.dim() - 2
    ramp = 0
    for axis, size in enumerate(window.shape[2:]):
        g = torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1)
        ramp = ramp + (axis + 1) * g.reshape([size if other == axis else 1 for other in range(axes)])
    first, last = window[:, 0], window[:, -1]
    out = [(c + 1) * first - 0.5 * c * last + 0.1 * c + 0.25 * (c + 1) * ramp for c in range(channels)]
    return torch.stack(out, dim=1)


def half(x):
    return {4: F.avg_pool2d, 5: F.avg_pool3d}[x.dim()](x, 2)


def two_resolutions(window):
    out = plain(window)
    return out, half(out[:, :1])


def two_named_resolutions(window):
    out = plain(window, channels=1)
    return {"a_full": out, "b_half": 2 * half(out)}


def with_start(window, coordinates):
    out = plain(window)
    for item, where in zip(out, coordinates, strict=True):
        item[0] += 0.01 * where[2].start
    return out


def clip_weight(outputs, window, weight):
    return tuple(2 * out for out in outputs), weight if window.mean() > 0 else weight / 2


PREDICTORS = {"plain": plain, "tuple": two_resolutions, "dict": two_named_resolutions, "coord": with_start}


def ours(case, arrays):
    """The strategy with MONAI's arguments in our words."""
    args = case["args"]
    weight = torch.from_numpy(arrays["roi_weight_map"]) if args.get("weight") == "grid" else None
    return SubVolumes(
        case["roi"],
        overlap=args["overlap"],
        blend=args.get("mode", "constant"),
        sigma_scale=args.get("sigma_scale", 0.125),
        batch_size=case["sw_batch_size"],
        padding_mode=args.get("padding_mode", "constant"),
        padding_value=args.get("cval", 0.0),
        weight_map=weight,
        process=clip_weight if args.get("process") == "clip_weight" else None,
        with_coordinates=args.get("with_coord", False),
    )


@pytest.mark.parametrize("name", CASES)
def test_same_result_as_the_reference(name, shared):
    folder = shared("golden", "3d", "sliding")
    case = json.loads((folder / "manifest.json").read_text())[name]
    arrays = np.load(folder / f"{name}.npz")
    result = ours(case, arrays)(torch.from_numpy(arrays["x"]), PREDICTORS[case["predictor"]])
    if isinstance(result, dict):
        outputs = {f"y_{key}": value for key, value in result.items()}
    elif isinstance(result, tuple):
        outputs = {f"y{n}": value for n, value in enumerate(result)}
    else:
        outputs = {"y": result}
    assert {key: list(value.shape) for key, value in outputs.items()} == case["outputs"]
    for key, value in outputs.items():
        torch.testing.assert_close(value, torch.from_numpy(arrays[key]), rtol=0, atol=2e-5)


def test_no_case_is_left_out(shared):
    folder = shared("golden", "3d", "sliding")
    assert sorted(CASES) == sorted(json.loads((folder / "manifest.json").read_text()))
    assert sorted(MAPS) == sorted(np.load(folder / "importance_maps.npz"))


@pytest.mark.parametrize("name", MAPS)
def test_importance_maps(name, shared):
    size, blend, sigma = name.split("_")
    weight = importance_map([int(n) for n in size.split("x")], blend, ast.literal_eval(sigma))
    stored = np.load(shared("golden", "3d", "sliding", "importance_maps.npz"))[name]
    torch.testing.assert_close(weight, torch.from_numpy(stored), rtol=0, atol=1e-7)


def test_window_grids(shared):
    for grid in json.loads(shared("golden", "3d", "sliding", "window_grids.json").read_text()):
        axes = len(grid["image"])
        arguments = grid["image"], grid["roi"], [grid["overlap"]] * axes
        assert window_starts(*arguments) == grid["starts_per_axis"]
        slices = list(windows(*arguments))
        assert len(slices) == grid["windows"]
        assert slices == sorted(slices, key=lambda window: [part.start for part in window])  # first axis slowest
