"""Grids and frames: hand-worked cases, and properties over all 48 orientations of plain, oblique and sheared grids."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg3d.geometry import Chain, Crop, Frame, Geometry, Pad, Reorient

SHAPE = (7, 6, 5)
CODES = ["".join(code) for axes in permutations(("LR", "PA", "IS")) for code in product(*axes)]


def rotation(degrees: float, axis: int) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix, others = np.eye(3), [n for n in range(3) if n != axis]
    matrix[np.ix_(others, others)] = [[c, -s], [s, c]]
    return matrix


TILT = np.eye(3)
TILT[1, 2] = np.tan(np.radians(18.5))  # a tilted gantry: slices slide along y
WORLDS = {  # spacing along the voxel axes, and what is done to the axis-aligned grid
    "aligned": ((1, 1, 1), np.eye(3)),
    "anisotropic": ((0.75, 0.5, 3), np.eye(3)),
    "oblique": ((0.75, 0.5, 3), rotation(20, 0) @ rotation(-15, 2)),
    "sheared": ((0.75, 0.5, 3), TILT),
}


def grid(codes: str, world: str = "aligned", shape: tuple[int, int, int] = SHAPE) -> Geometry:
    spacing, change = WORLDS[world]
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        letter = "LRPAIS".index(code)
        affine[:3, axis] = change[:, letter // 2] * (1 if letter % 2 else -1) * spacing[axis]
    affine[:3, 3] = (-31.5, 12.25, 700)
    return Geometry(shape, affine)


def frames(source: Geometry) -> dict[str, Frame]:
    """One frame of each kind, and all of them one after another."""
    reorient = source.reorient("SAR")
    crop = reorient.target.crop((1, 0, 2), np.array(reorient.target.shape) - (0, 2, 0))
    pad = crop.target.pad((0, 3, 1), (2, 1, 0))
    return {
        "reorient": reorient,
        "crop": source.crop((1, 2, 0), (6, 6, 4)),
        "pad": source.pad((2, 0, 1), (0, 3, 1)),
        "finer": source.resample(np.divide(source.spacing, 2)),
        "coarser": source.resample(shape=(3, 2, 1)),
        "chain": Chain([reorient, crop, pad, pad.target.resample(1.25)]),
    }


@pytest.fixture(params=product(CODES, WORLDS), ids="-".join)
def source(request) -> Geometry:
    return grid(*request.param)


# Every orientation


def test_orientation_is_that_of_nibabel(source, request):
    assert source.orientation == "".join(nib.aff2axcodes(source.affine)) == request.node.callspec.params["source"][0]


def test_reorient_gives_the_grid_and_array_of_nibabel(source):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    frame = source.reorient("RAS")
    expected = nib.as_closest_canonical(nib.Nifti1Image(array, source.affine))
    np.testing.assert_array_equal(frame.image(array), np.asarray(expected.dataobj))
    np.testing.assert_allclose(frame.target.affine, expected.affine, atol=1e-9)
    assert frame.target.orientation == "RAS"


def test_every_frame_keeps_places_in_the_world(source):
    points = np.array([[0, 0, 0], [6, 5, 4], [2.25, -3, 9.5]])
    for name, frame in frames(source).items():
        world = frame.target.world(frame.points(points))
        np.testing.assert_allclose(world, source.world(points), atol=1e-9, err_msg=name)


def test_inverse_restores_grids_points_and_boxes(source):
    points = np.array([[0, 0, 0], [2.25, -3, 9.5]])
    boxes = np.array([[0, 0, 0, 7, 6, 5], [1, 2, 3, 2, 4, 4]])
    for name, frame in frames(source).items():
        inverse = frame.inverse()
        assert (inverse.source, inverse.target) == (frame.target, frame.source), name
        assert inverse.inverse() == frame, name
        np.testing.assert_allclose(inverse.points(frame.points(points)), points, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(inverse.boxes(frame.boxes(boxes)), boxes, atol=1e-12, err_msg=name)


def test_a_marked_voxel_stays_at_its_point_and_in_its_box(source):
    for name in ("reorient", "crop", "pad"):
        frame, voxel = frames(source)[name], np.array([3, 2, 1])
        mark = np.zeros(SHAPE, np.uint8)
        mark[tuple(voxel)] = 9
        found = np.argwhere(frame.label_map(mark) == 9)
        np.testing.assert_array_equal(found, frame.points([voxel]))
        np.testing.assert_array_equal(frame.boxes([[*voxel, *voxel + 1]]), np.hstack([found, found + 1]))
        np.testing.assert_array_equal(frame.inverse().label_map(frame.label_map(mark)), mark)


def test_an_image_that_is_linear_in_the_world_stays_so(source):
    def ramp(geometry: Geometry) -> np.ndarray:
        return geometry.world(np.moveaxis(np.indices(geometry.shape), 0, -1)) @ (1.0, -2.0, 0.5)

    reorient = source.reorient("PIR")
    finer = reorient.target.resample(np.divide(reorient.target.spacing, (2, 3, 1)))
    frame = Chain([reorient, finer])
    inside = np.s_[1:-1, 1:-1, :]  # the outermost half voxels repeat the edge
    np.testing.assert_allclose(frame.image(ramp(source))[inside], ramp(frame.target)[inside], atol=2e-4)


def test_resample_spans_the_same_box(source):
    for name in ("finer", "coarser"):
        target = frames(source)[name].target
        for corner in (np.zeros(3), np.ones(3)):
            theirs = target.world(corner * target.shape - 0.5)
            np.testing.assert_allclose(theirs, source.world(corner * source.shape - 0.5), atol=1e-9)
        np.testing.assert_allclose(target.direction, source.direction, atol=1e-12)


# Any frame, any array


@pytest.mark.parametrize("name", frames(grid("LPS")))
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_arrays_with_leading_axes_are_moved_one_by_one(name, lead):
    frame = frames(grid("LPS"))[name]
    image = np.random.default_rng(0).normal(size=(*lead, *SHAPE)).astype(np.float32)
    labels = (image * 3).astype(np.int16)
    moved, moved_labels = frame.image(image, fill=-5), frame.label_map(labels, fill=7)
    assert moved.shape == moved_labels.shape == (*lead, *frame.target.shape)
    for index in np.ndindex(lead):
        np.testing.assert_array_equal(moved[index], frame.image(image[index], fill=-5))
        np.testing.assert_array_equal(moved_labels[index], frame.label_map(labels[index], fill=7))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, ">i2", np.float32, np.float64])
@pytest.mark.parametrize("name", frames(grid("LPS")))
def test_dtypes_labels_and_constants(name, dtype):
    frame = frames(grid("LPS"))[name]
    labels = np.random.default_rng(1).choice([0, 1, 77], SHAPE).astype(dtype)
    for moved in (frame.label_map(labels, fill=1), frame.inverse().label_map(frame.label_map(labels))):
        assert moved.dtype == labels.dtype
        assert set(np.unique(moved)) <= {0, 1, 77}
    constant = np.full(SHAPE, 77).astype(dtype)
    expected = np.float32 if name in ("finer", "coarser", "chain") else constant.dtype
    for order in (0, 1, 3):
        image = frame.image(constant, fill=constant[0, 0, 0], order=order)
        assert image.dtype == expected
        np.testing.assert_allclose(image, constant[0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", [*frames(grid("LPS")), "nothing"])
def test_the_callers_array_is_out_of_reach(name, inverse):
    frame = {**frames(grid("LPS")), "nothing": grid("LPS").resample(shape=SHAPE)}[name]
    frame = frame.inverse() if inverse else frame
    array = np.random.default_rng(2).normal(size=frame.source.shape).astype(np.float32)
    before = array.copy()
    for result in (frame.image(array), frame.image(array, order=0), frame.label_map(array)):
        assert not (result.flags.writeable and np.shares_memory(result, array))
    np.testing.assert_array_equal(array, before)
    assert array.flags.writeable


def test_resampling_to_the_same_grid_is_exact():
    frame = grid("LPS").resample(shape=SHAPE)
    array = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    for order in (0, 1, 3):
        np.testing.assert_array_equal(frame.image(array, order=order), array)
    assert frame.target == frame.source


def test_a_smooth_image_survives_a_round_trip():
    geometry = grid("LPS", "oblique", (32, 30, 28))
    i, j, k = np.indices(geometry.shape)
    smooth = 100 * np.sin(i / 6) * np.cos(j / 5) + 10 * k
    for scale, order, tolerance in ((0.6, 1, 4), (0.6, 3, 0.2), (1.5, 3, 5)):
        frame = geometry.resample(np.multiply(geometry.spacing, scale))
        back = frame.inverse().image(frame.image(smooth, order=order), order=order)
        inside = np.s_[4:-4, 4:-4, 4:-4]
        assert np.abs(back - smooth)[inside].max() < tolerance, (scale, order)


@st.composite
def geometries(draw) -> Geometry:
    """Well-conditioned affines of any kind."""
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    u, _, vt = np.linalg.svd(draw(hnp.arrays(float, (3, 3), elements=st.floats(-1, 1))))
    spread = np.diag(draw(hnp.arrays(float, 3, elements=st.floats(0.2, 5))))
    affine = np.eye(4)
    affine[:3] = np.c_[u @ spread @ vt, draw(hnp.arrays(float, 3, elements=st.floats(-500, 500)))]
    return Geometry(shape, affine)


@st.composite
def rearrangements(draw) -> Chain:
    """Reorient, pad and crop in any number and order."""
    geometry = draw(geometries())
    chain: list[Frame] = []
    for kind in draw(st.lists(st.sampled_from(["reorient", "pad", "crop"]), min_size=1, max_size=5)):
        if kind == "reorient":
            chain.append(geometry.reorient(draw(st.sampled_from(CODES))))
        elif kind == "pad":
            chain.append(geometry.pad(*draw(st.tuples(*[st.tuples(*[st.integers(0, 3)] * 3)] * 2))))
        else:
            ends = [draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)) for n in geometry.shape]
            chain.append(geometry.crop([min(pair) for pair in ends], [max(pair) for pair in ends]))
        geometry = chain[-1].target
    return Chain(chain)


@settings(max_examples=150, deadline=None)
@given(geometries())
def test_orientation_of_any_grid_is_that_of_nibabel(geometry):
    assert geometry.orientation == "".join(nib.aff2axcodes(geometry.affine))
    np.testing.assert_allclose(geometry.index(geometry.world([[1, 2, 3]])), [[1, 2, 3]], atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(rearrangements())
def test_a_box_moves_with_the_voxels_in_it(frame):
    geometry = frame.source
    low, high = np.array(geometry.shape) // 3, np.array(geometry.shape)
    mask = np.zeros(geometry.shape, bool)
    mask[tuple(map(slice, low, high))] = True
    box = frame.boxes([[*low, *high]])[0]
    assert box.dtype == np.int64
    expected = np.zeros(frame.target.shape, bool)
    expected[tuple(map(slice, *np.clip(box.reshape(2, 3), 0, frame.target.shape)))] = True
    not_cut = frame.label_map(np.ones(geometry.shape, bool))
    np.testing.assert_array_equal(frame.label_map(mask), expected & not_cut)
    np.testing.assert_allclose(frame.target.world(frame.points([low])), geometry.world([low]), atol=1e-7)


@settings(max_examples=150, deadline=None)
@given(rearrangements())
def test_there_and_back_keeps_what_no_crop_cut_away(frame):
    image = np.arange(1.0, 1 + np.prod(frame.source.shape)).reshape(frame.source.shape)
    back = frame.inverse().image(frame.image(image, fill=-1), fill=-1)
    np.testing.assert_array_equal(back, np.where(back == -1, -1, image))
    np.testing.assert_array_equal(np.sort(back[back != -1]), np.intersect1d(frame.image(image, fill=-1), image))


# Worked by hand


def test_geometry_by_hand():
    geometry = Geometry((4, 5, 6), [[-0.8, 0, 0, 100], [0, -0.8, 0, 50], [0, 0, 2.5, -20], [0, 0, 0, 1]])
    assert geometry.orientation == "LPS"
    assert geometry.spacing == (0.8, 0.8, 2.5)
    assert geometry.voxel_volume == pytest.approx(1.6)
    assert geometry.shear_degrees == geometry.obliquity_degrees == 0
    np.testing.assert_allclose(geometry.world([1, 2, 3]), [99.2, 48.4, -12.5])
    np.testing.assert_allclose(geometry.index([[99.2, 48.4, -12.5]]), [[1, 2, 3]])
    assert repr(geometry) == "Geometry((4, 5, 6) voxels of (0.8, 0.8, 2.5) mm, LPS from (100, 50, -20) mm)"


def test_angles_by_hand():
    assert grid("LPS", "sheared").shear_degrees == pytest.approx(18.5)
    assert grid("LPS", "sheared").obliquity_degrees == pytest.approx(18.5)
    turned = Geometry(SHAPE, np.block([[rotation(30, 2) * (1, 1, 4), np.zeros((3, 1))], [np.zeros(3), 1]]))
    assert turned.shear_degrees == pytest.approx(0, abs=1e-9)
    assert turned.obliquity_degrees == pytest.approx(30)
    assert turned.orientation == "RAS"


def test_reorient_by_hand():
    frame = grid("LPS", shape=(2, 3, 4)).reorient("SRA")
    assert isinstance(frame, Reorient)
    assert (frame.axes, frame.flips, frame.target.shape) == ((2, 0, 1), (False, True, True), (4, 2, 3))
    np.testing.assert_array_equal(frame.points([[0, 0, 0], [1, 2, 3]]), [[0, 1, 2], [3, 0, 0]])
    np.testing.assert_array_equal(frame.boxes([[0, 1, 2, 1, 3, 4]]), [[2, 1, 0, 4, 2, 2]])
    array = np.arange(24).reshape(2, 3, 4)
    assert frame.image(array)[3, 0, 0] == array[1, 2, 3]


def test_crop_and_pad_by_hand():
    source = grid("RAS", "anisotropic")
    crop = source.crop((1, 2, 0), (3, 6, 5))
    assert isinstance(crop.inverse(), Pad)
    assert isinstance(crop.inverse().inverse(), Crop)
    assert crop.target.shape == (2, 4, 5)
    np.testing.assert_array_equal(crop.target.affine[:3, 3], [-31.5 + 0.75, 12.25 + 1.0, 700])
    np.testing.assert_array_equal(crop.boxes([[0, 2, 1, 3, 4, 5]]), [[-1, 0, 1, 2, 2, 5]])
    array = np.ones(SHAPE, np.int16)
    back = crop.inverse().image(crop.image(array), fill=-1024)
    assert (back == 1).sum() == 2 * 4 * 5
    assert (back[[0, 3]] == -1024).all()
    np.testing.assert_array_equal(crop.inverse().boxes([[-1, 0, 1, 2, 2, 5]]), [[0, 2, 1, 3, 4, 5]])


def test_resample_by_hand():
    source = Geometry((4, 5, 1), np.diag([1.0, 1, 3, 1]))
    frame = source.resample(spacing=(2, 2, 1.5))
    assert frame.target.shape == (2, 2, 2)  # 5 / 2 = 2.5 is rounded to even
    np.testing.assert_allclose(frame.target.spacing, (2, 2.5, 1.5))
    np.testing.assert_allclose(frame.target.affine[:3, 3], (0.5, 0.75, -0.75))
    np.testing.assert_allclose(frame.points([[0, 0, 0]]), [[-0.25, -0.3, 0.5]])
    np.testing.assert_allclose(frame.boxes([[0, 0, 0, 4, 5, 1]]), [[0, 0, 0, 2, 2, 2]])
    np.testing.assert_allclose(frame.boxes([[1, 0, 0, 2, 5, 1]]), [[0.5, 0, 0, 1, 2, 2]])
    labels = np.broadcast_to(np.array([1, 2, 3, 4], np.uint8)[:, None, None], source.shape)
    np.testing.assert_array_equal(frame.label_map(labels)[:, 0, 0], [2, 4])
    # The weights are (4, 3, 1, 0) / 8 and (0, 1, 3, 4) / 8.
    np.testing.assert_allclose(frame.image(labels)[:, 1, 1], [1.625, 3.375])
    assert source.resample(1.5).target.shape == (3, 3, 2)
    assert source.resample(100).target.shape == (1, 1, 1)


def test_geometry_is_a_value():
    affine = np.diag([1.0, 1, -2, 1])
    geometry = Geometry(np.array(SHAPE), affine)
    affine[0, 0] = 5
    assert geometry.spacing == (1, 1, 2)
    assert geometry.shape == SHAPE
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 0] = 3
    same = Geometry(SHAPE, np.copysign(geometry.affine, [1, 1, -1, 1]))  # with -0.0 in a column
    assert same == geometry
    assert hash(same) == hash(geometry)
    assert geometry != grid("RAS")


def test_same_as_measures_at_the_far_corner():
    geometry = Geometry((101, 101, 101), np.eye(4))
    wider = Geometry((101, 101, 101), np.diag([1 + 2e-5, 1, 1, 1]))  # by 2e-3 mm at index 100
    assert not geometry.same_as(wider)
    assert geometry.same_as(wider, tolerance_mm=3e-3)
    assert not geometry.same_as(Geometry((101, 101, 100), np.eye(4)))


# Refusals


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((4, 4), np.eye(4), "three whole numbers"),
        ((4, 4, 4, 1), np.eye(4), "three whole numbers"),
        ((4, 0, 4), np.eye(4), "at least 1"),
        ((4, 4.5, 4), np.eye(4), "three whole numbers"),
        (SHAPE, np.eye(3), r"\(4, 4\)"),
        (SHAPE, np.diag([1, np.nan, 1, 1]), "NaN or infinite"),
        (SHAPE, np.diag([1, np.inf, 1, 1]), "NaN or infinite"),
        (SHAPE, np.diag([1, 1, 0, 1]), "spacing"),
        (SHAPE, np.eye(4)[:, [0, 0, 2, 3]], "singular"),
        (SHAPE, np.eye(4) + np.eye(4)[::-1], "last row"),
    ],
)
def test_bad_grids_are_refused(shape, affine, message):
    with pytest.raises(ValueError, match=message):
        Geometry(shape, affine)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.reorient("RAX"), "orientation codes"),
        (lambda g: g.reorient("RAL"), "orientation codes"),
        (lambda g: g.reorient("RA"), "orientation codes"),
        (lambda g: g.crop((0, 0, 0), (7, 6, 6)), "start < stop <= shape"),
        (lambda g: g.crop((0, 3, 0), (7, 3, 5)), "start < stop <= shape"),
        (lambda g: g.crop((-1, 0, 0), (7, 6, 5)), "at least 0"),
        (lambda g: g.pad((0, 0, -1), (0, 0, 0)), "at least 0"),
        (lambda g: g.pad((0, 0), (0, 0)), "three whole numbers"),
        (lambda g: g.resample(), "either a spacing or a shape"),
        (lambda g: g.resample(1, (2, 2, 2)), "either a spacing or a shape"),
        (lambda g: g.resample((1, 0, 1)), "above 0 mm"),
        (lambda g: g.resample((1, 2)), "above 0 mm"),
        (lambda g: g.resample(np.nan), "above 0 mm"),
        (lambda g: g.resample(shape=(2, 2, 0)), "at least 1"),
        (lambda g: g.resample(2).image(np.zeros(SHAPE), order=2), "order of interpolation"),
        (lambda g: g.reorient("RAS").image(np.zeros((5, 6, 7))), "last three axes"),
        (lambda g: g.reorient("RAS").points([[1, 2]]), "3 numbers"),
        (lambda g: g.reorient("RAS").boxes([1, 2, 3]), "6 numbers"),
        (lambda g: g.pad((1, 1, 1), (0, 0, 0)).image(np.zeros(SHAPE, np.uint8), fill=-1024), "uint8 can hold"),
        (lambda g: g.pad((1, 1, 1), (0, 0, 0)).image(np.zeros(SHAPE, np.int16), fill=np.nan), "int16 can hold"),
        (lambda g: Chain([]), "at least one frame"),
        (lambda g: Chain([g.resample(2), g.resample(2)]), "where the last ended"),
    ],
)
def test_bad_changes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(grid("LPS"))
