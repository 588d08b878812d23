"""The box of the body: what it holds, and that a strategy cropped to it is that strategy on the box."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg3d.geometry import Geometry
from medseg3d.inference import BodyBox, SubVolumes
from medseg3d.inference.body import background, body_on_grid, checked_box, share_outside, told
from medseg3d.inference.ensemble import Ensemble

AIR, TISSUE = -1000.0, 40.0


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scan(size, *boxes):
    """(1, 1, *size): air with boxes of tissue."""
    image = torch.full((1, 1, *size), AIR)
    for box in boxes:
        image[(..., *box)] = TISSUE
    return image


def box_of(*bounds):
    return tuple(slice(*bound) for bound in bounds)


def network(window):
    """Four classes that depend on the neighbourhood."""
    axes = range(2, window.dim())
    return torch.cat([window * n + sum(window.roll(n, axis) for axis in axes) for n in range(4)], dim=1)


# The box


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_voxel_counts_without_margin_where_nothing_is_thin(axes):
    image = scan((30,) * axes, *[((slice(7, 12),) * axes)])
    assert BodyBox(-500, margin=0, thin=1)(image[0]) == (slice(7, 12),) * axes
    assert BodyBox(-500, margin=[3] * axes, thin=1)(image[0]) == (slice(4, 15),) * axes
    assert BodyBox(-500, margin=100)(image[0]) == (slice(0, 30),) * axes, "not beyond the image"


def test_boxes_of_all_pieces_are_found_in_one_pass(monkeypatch):
    find, passes = ndimage.find_objects, []
    monkeypatch.setattr(ndimage, "find_objects", lambda pieces: passes.append(pieces.shape) or find(pieces))
    three = [box_of((start, start + 5), (4, 9)) for start in (2, 12, 22)]
    assert BodyBox(-500, 0, 1)(scan((30, 30), *three)[0]) == box_of((2, 27), (4, 9))
    assert len(passes) == 1


@settings(max_examples=100, deadline=None)
@given(
    body=st.lists(st.tuples(st.integers(0, 20), st.integers(5, 12)), min_size=2, max_size=3),
    thin=st.integers(1, 3),
    margin=st.integers(0, 3),
)
def test_no_voxel_of_a_solid_body_is_left_out(body, thin, margin):
    """Wherever it lies on the blocks that are looked at; ``thin`` is less than half of its width."""
    size = [34] * len(body)
    box = tuple(slice(start, start + width) for start, width in body)
    found = BodyBox(-500, margin, thin)(scan(size, box)[0])
    for own, part, length in zip(box, found, size, strict=True):
        assert part.start <= max(own.start - margin, 0) and part.stop >= min(own.stop + margin, length)
        assert part.start >= own.start - margin - 2 * thin and part.stop <= own.stop + margin + 2 * thin


def test_a_table_is_left_out_and_a_second_leg_is_not():
    legs = box_of((10, 22), (20, 34), (0, 40)), box_of((40, 50), (22, 34), (0, 40))
    table = box_of((0, 60), (40, 42), (0, 40))  # 2 voxels thick, as wide as the image
    tube = box_of((25, 28), (2, 5), (0, 40))
    image = scan((60, 50, 40), *legs, table, tube)[0]
    assert BodyBox(-500, margin=0, thin=1)(image) == box_of((0, 60), (2, 42), (0, 40))
    found = BodyBox(-500, margin=0, thin=3)(image)
    assert found[0].start in range(4, 11) and found[0].stop in range(50, 57)
    assert found[1].start in range(14, 21) and found[1].stop in range(34, 41)
    assert (found[2].start, found[2].stop) == (0, 40)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("width", [3, 4, 5])
def test_a_limb_that_is_not_thin_is_kept_wherever_it_lies(row, column, width):
    """Joined to a body a hundred times as large; the narrowest that counts, at any place of the grid."""
    body = box_of((10, 50), (10, 50), (20, 60))
    limb = box_of((30 + row, 30 + row + width), (30 + column, 30 + column + width), (0, 20))
    found = BodyBox(-500, margin=0, thin=3)(scan((60, 60, 60), body, limb)[0])
    assert found[2].start == 0


@pytest.mark.parametrize("image", [scan((9, 8, 7)), scan((9, 8, 7), box_of((3, 4), (3, 4), (3, 4))), scan((40, 3))])
def test_where_no_body_is_found_nothing_is_left_out(image):
    assert BodyBox(-500)(image[0]) == tuple(slice(0, size) for size in image.shape[2:])


def test_any_channel_counts():
    image = torch.cat([scan((20, 20), box_of((2, 6), (2, 6))), scan((20, 20), box_of((12, 18), (2, 6)))], 1)
    assert BodyBox(-500, margin=0, thin=1)(image[0]) == box_of((2, 18), (2, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"margin": -1}, "margin is 0 or more"), ({"thin": 0}, "thin 1 or more"), ({"thin": (1, 0, 1)}, "thin 1 or more")],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        BodyBox(0, **arguments)


def test_arguments_for_other_axes():
    with pytest.raises(ValueError, match=re.escape("one for each of 2 spatial axes, got (1, 2, 3)")):
        BodyBox(0, margin=(1, 2, 3))(torch.ones(1, 9, 9))


@settings(max_examples=60, deadline=None)
@given(
    box=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10)), min_size=1, max_size=3),
    roi=st.integers(1, 30),
)
def test_a_box_is_grown_to_a_window_inside_the_image(box, roi):
    size, given_box = [20] * len(box), tuple(slice(start, start + width) for start, width in box)
    for own, part in zip(given_box, checked_box(given_box, size, [roi] * len(size)), strict=True):
        assert 0 <= part.start <= own.start and own.stop <= part.stop <= 20
        assert part.stop - part.start == max(own.stop - own.start, min(roi, 20))


@pytest.mark.parametrize(
    "box", [box_of((0, 3)), box_of((0, 3), (5, 5)), box_of((0, 3), (0, 4, 2)), box_of((9, 12), (0, 1))]
)
def test_what_is_no_box_is_refused(box):
    with pytest.raises(ValueError, match="crop must give"):
        SubVolumes(4, crop=lambda image: box)(torch.zeros(1, 1, 8, 8), network)


# Cropped strategies


@settings(max_examples=50, deadline=None)
@given(
    size=st.lists(st.integers(3, 16), min_size=2, max_size=3),
    corners=st.tuples(*[st.tuples(st.integers(0, 15), st.integers(1, 16))] * 3),
    roi=st.integers(2, 6),
    batch_size=st.integers(1, 3),
)
def test_the_strategy_on_the_box_with_background_around(size, corners, roi, batch_size):
    """To the last bit, logits and labels, however the box lies; in slabs each slice comes once and in order."""
    box = []
    for length, (start, width) in zip(size, corners, strict=False):
        start = min(start, length - 1)
        box.append(slice(start, min(start + width, length)))
    box = checked_box(box, size, [roi] * len(size))
    x = noise(1, 1, *size)
    plain = SubVolumes(roi, 0.5, batch_size=batch_size)
    cropped = plain.changed(crop=lambda image: box)
    logits, expected = cropped(x, network), plain(x[(..., *box)], network)
    assert torch.equal(logits[(..., *box)], expected)
    outside = torch.ones(size, dtype=torch.bool)
    outside[box] = False
    assert torch.equal(logits[0][:, outside], background(4)[:, None].expand(4, int(outside.sum())))
    labels = cropped.label_map(x, network)
    assert torch.equal(labels.long(), logits.argmax(1, keepdim=True)) and not labels[0, 0][outside].any()
    following = 0
    for slab in cropped.slabs(x, network):
        assert slab.start == following and torch.equal(slab.values, logits[0][(slice(None), *slab.place)])
        following = slab.stop
    assert following == size[slab.axis]


@pytest.mark.parametrize("size", [(17, 12, 9), (19, 11)])
@pytest.mark.parametrize("image", ["body everywhere", "air"])
def test_nothing_left_out_is_nothing_changed(size, image):
    x = noise(2, 1, *size) + (100 if image == "body everywhere" else -2000)
    plain = SubVolumes(6, 0.5)
    cropped = plain.changed(crop=BodyBox(-500))
    assert torch.equal(cropped(x, network), plain(x, network))
    assert torch.equal(cropped.label_map(x, network), plain.label_map(x, network))
    assert all(slab.head is None for slab in cropped.slabs(x[:1], network))


def test_each_image_of_a_batch_has_its_own_box():
    boxes = box_of((2, 9), (0, 8)), box_of((8, 20), (3, 10))
    images = [scan((24, 12), box) + noise(1, 1, 24, 12) for box in boxes]
    strategy = SubVolumes(5, crop=BodyBox(-500, margin=1, thin=1))
    assert strategy.box(images[0]) == box_of((1, 10), (0, 9)) and strategy.box(images[1]) == box_of((7, 21), (2, 11))
    both = torch.cat(images)
    before = both.clone()
    for call in (strategy, strategy.label_map):
        assert torch.equal(call(both, network), torch.cat([call(image, network) for image in images]))
    assert torch.equal(both, before)


def test_a_meta_tensor_keeps_its_place_and_its_history():
    from monai.data import MetaTensor
    from monai.transforms import Flip

    affine = torch.diag(torch.tensor([2.0, 1.5, 3.0, 1.0], dtype=torch.float64))
    x = Flip(0)(MetaTensor(scan((20, 18, 16), box_of((3, 9), (5, 15), (5, 15)))[0], affine=affine))[None]
    kinds = set()

    def seen(window):
        kinds.add(type(window))
        return network(window)

    for result in (
        SubVolumes(6, crop=BodyBox(-500, 0))(x, seen),
        SubVolumes(6, crop=BodyBox(-500, 0)).label_map(x, seen),
    ):
        assert isinstance(result, MetaTensor) and result.shape[2:] == x.shape[2:]
        torch.testing.assert_close(result.affine, x.affine)
        assert [record["class"] for record in result.applied_operations] == ["Flip"]
    assert kinds == {torch.Tensor}


class Headed(torch.nn.Module):
    def __init__(self, bias=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Conv3d(1, 3, 3, padding=1)
        self.head = torch.nn.Conv3d(3, 9, 1, bias=bias)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("kind", ["bias", "no bias", "mean of probabilities"])
def test_slabs_with_a_head_make_the_background_too(kind, monkeypatch):
    """And so do slabs of several slices, whatever fits into memory at a time."""
    monkeypatch.setattr("medseg3d.inference.body._TOGETHER", 300)
    one = Headed(kind != "no bias").eval()
    networks = Ensemble([one, Headed(seed=1).eval()]) if kind.startswith("mean") else one
    strategy = SubVolumes((5, 4, 6), crop=lambda image: box_of((2, 9), (1, 9), (10, 30)))
    x = noise(1, 1, 12, 11, 40)
    with torch.no_grad():
        logits = strategy(x, networks)
        slabs = [(slab.head is None, slab.place, slab.logits(), slab.labels()) for slab in strategy.slabs(x, networks)]
    assert len(slabs) > 5 and not any(headless for headless, *_ in slabs)
    for _, place, own, labels in slabs:
        torch.testing.assert_close(own, logits[0][(slice(None), *place)], rtol=1e-4, atol=1e-4)
        assert torch.equal(labels.long(), own.argmax(0))
    assert (slabs[0][3] == 0).all() and (slabs[-1][3] == 0).all()


def test_outputs_of_several_tensors_are_cropped_alike():
    strategy = SubVolumes(4, crop=lambda image: box_of((2, 7), (0, 6)))
    x = noise(1, 1, 9, 9)
    found = strategy(x, lambda window: {"a": window, "b": network(window)})
    assert torch.equal(found["b"], strategy(x, network))
    assert found["a"].shape == x.shape and found["a"][0, 0, 8, 8] == -20
    first, second = strategy(x, lambda window: (network(window), window))
    assert torch.equal(first, found["b"]) and torch.equal(second, found["a"])


def test_what_cannot_be_cropped():
    with pytest.raises(ValueError, match=r"of \(5, 6\) voxels the network makes \(2, 3\): leave crop out"):
        SubVolumes((5, 6), crop=lambda i: box_of((2, 7), (0, 6)))(
            noise(1, 1, 9, 9), lambda w: w[..., ::2, ::2][..., :2, :]
        )
    with pytest.raises(ValueError, match="leave crop out"):
        SubVolumes(4, with_coordinates=True, crop=BodyBox(0))


def test_what_is_left_out_is_told(caplog):
    box, size = box_of((0, 5), (2, 7)), (10, 10)
    assert told(box, size) == "windows lie over [0:5, 2:7] of 10x10 voxels; 75.0% of them are left out"
    assert share_outside(box, size) == 0.75
    with caplog.at_level(logging.INFO, "medseg3d"):
        SubVolumes(4, crop=lambda image: box).label_map(noise(2, 1, 10, 10), network)
    assert [record.message for record in caplog.records] == [told(box, size)] * 2


def test_fewer_windows_are_asked_of_the_network():
    seen = []

    def network(window):
        seen.append(window.min())
        return torch.cat([window, -window], 1)

    image = scan((60, 12, 12), box_of((6, 18), (0, 12), (0, 12)))
    SubVolumes(6, 0.0, crop=BodyBox(-500, 0, 1)).label_map(image, network)
    assert seen == [TISSUE] * 8


# From the scan's grid to the network's


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRP"])
@pytest.mark.parametrize("spacing", [1.0, 2.0, 3.1])
def test_the_box_on_another_grid_holds_the_same_space(codes, spacing):
    affine = np.diag([-2.0, -2.0, 4.0, 1.0])
    affine[:3, 3] = 30, -20, 7
    array = np.full((60, 50, 40), -1000, np.int16)
    array[20:40, 15:35, 10:30] = 40
    own = Geometry(array.shape, affine)
    reoriented = own.reorient(codes).target
    grid = reoriented.resample(spacing=[spacing] * 3).target
    box = body_on_grid(array, own, grid)
    corners = np.array([[[part.start, part.stop][bit] - 0.5 for part, bit in zip(box, bits, strict=True)]
                        for bits in np.ndindex(2, 2, 2)])  # fmt: skip
    world = corners @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    body = own.world(np.array([[19.5, 14.5, 9.5], [39.5, 34.5, 29.5]]))
    low, high = body.min(0) - 20, body.max(0) + 20
    assert (world.min(0) <= low + 1e-6).all() and (world.max(0) >= high - 1e-6).all(), "20 mm around the body"
    assert (world.min(0) >= low - 40).all() and (world.max(0) <= high + 40).all()
    assert body_on_grid(np.full_like(array, -1000), own, grid) == tuple(slice(0, n) for n in grid.shape)


def test_a_bundle_can_name_it():
    from monai.bundle import ConfigParser

    config = {
        "_target_": "medseg3d.inference.SubVolumes",
        "roi_size": [8, 8],
        "crop": {"_target_": "medseg3d.inference.BodyBox", "above": -500, "margin": 2},
    }
    strategy = ConfigParser({"inferer": config}).get_parsed_content("inferer")
    assert strategy.box(scan((40, 40), box_of((10, 20), (10, 20)))) != box_of((0, 40), (0, 40))
