from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from PIL import Image

from medseg3d.io import LabelTable, read_volume
from medseg3d.report.drawing import BACKGROUND, draw_plane, outlines, shortened, smooth_labels, write
from medseg3d.report.planes import AXIAL, CORONAL, SAGITTAL, Profile, Scene, best_cells, cut, spread_cells
from medseg3d.report.preview import SIZE, preview, write_preview
from medseg3d.volume import Volume

ORIENTATIONS = [
    "".join(pair[i] for pair, i in zip(pairs, ends, strict=True))
    for pairs in permutations(["RL", "AP", "SI"])
    for ends in product([0, 1], repeat=3)
]
RED, BLUE = (255, 0, 0), (0, 0, 255)


def page_of(patient, **options):
    return preview(patient.segmentation, patient.image, patient.labels, patient.colors, **options)


def where(picture, color):
    """Rows and columns of the pixels of (nearly) this colour: the outline of its organ."""
    distance = np.abs(np.asarray(picture).astype(int) - color).max(axis=-1)
    rows, columns = np.nonzero(distance < 40)
    assert len(rows), f"no pixel of the colour {color}"
    return rows, columns


def axial_panel(page):
    """The first panel: from the page's edge to the next column of background."""
    row = np.asarray(page)[200]
    gap = next(x for x in range(60, SIZE[0]) if tuple(row[x]) == BACKGROUND)
    return page.crop((32, 92, gap, 480))


def plane(patient, view, mm_per_pixel=0.5):
    """One plane through the middle of the organs over the whole volume, at a known scale."""
    scene = Scene(patient.segmentation, patient.image, patient.labels)
    (x0, y0), (x1, y1) = scene.grid.box[:, [view.across, view.down]]
    size = (round((x1 - x0) / mm_per_pixel), round((y1 - y0) / mm_per_pixel))
    piece = cut(scene, view, scene.cells[view.normal], (x0, x1), (y0, y1))
    return draw_plane(piece, size, patient.colors, (40.0, 400.0))


def test_the_right_organ_is_on_the_left_of_the_axial_panel(patient):
    panel = axial_panel(page_of(patient))
    assert where(panel, RED)[1].max() < panel.width / 2 < where(panel, BLUE)[1].min()


@pytest.mark.parametrize("view", [AXIAL, CORONAL])
def test_sides_and_true_proportions_of_a_plane(patient, view):
    """The right organ spans x 22 to 38, y -2.5 to 22.5 and z -15 to 15 mm, from voxel edge to voxel edge."""
    picture = plane(patient, view)
    rows, columns = where(picture, RED)
    middle = picture.width / 2
    assert columns.min() == pytest.approx(middle - 38 / 0.5, abs=2)
    assert columns.max() == pytest.approx(middle - 22 / 0.5, abs=2)
    height_mm = 25.0 if view is AXIAL else 30.0
    assert np.ptp(rows) == pytest.approx(height_mm / 0.5, abs=3)


def test_front_is_on_top_of_axial_and_left_of_sagittal_planes(patient):
    """The organs lie in front of the middle, at y = 10; the sagittal plane goes through one of them."""
    axial = plane(patient, AXIAL)
    assert where(axial, RED)[0].mean() == pytest.approx(axial.height / 2 - 10 / 0.5, abs=2)
    scene = Scene(patient.segmentation, patient.image, patient.labels)
    right = scene.grid.position(SAGITTAL.normal, scene.cells[SAGITTAL.normal]) > 0
    sagittal = plane(patient, SAGITTAL)
    assert where(sagittal, RED if right else BLUE)[1].mean() == pytest.approx(sagittal.width / 2 - 10 / 0.5, abs=2)


def test_real_right_parotid_is_on_the_left(shared):
    case = shared("data", "openkbp-hn", "test_pt265_ct.nii.gz")
    image, segmentation = read_volume(case), read_volume(case.with_name("test_pt265_oar.nii.gz"))
    panel = axial_panel(preview(segmentation, image, {3: "parotid_right", 4: "parotid_left"}, {3: RED, 4: BLUE}))
    assert where(panel, RED)[1].max() < panel.width / 2 < where(panel, BLUE)[1].min()


def test_head_is_on_top():
    image = np.full((20, 20, 20), -1000, np.int16)
    image[:, :, 10:] = 40
    organs = np.zeros(image.shape, np.uint8)
    organs[5:15, 5:15, 14:18] = 1
    for view in (CORONAL, SAGITTAL):
        scene = Scene(Volume(organs, np.eye(4)), Volume(image, np.eye(4)), [1])
        piece = cut(scene, view, 10, (-0.5, 19.5), (-0.5, 19.5))
        picture = np.asarray(draw_plane(piece, (100, 100), {1: RED}, (40.0, 400.0)))
        assert picture[90, 50].max() < 10, "air at the feet is black"
        assert where(picture, RED)[0].max() < 50


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_scene_is_the_same_however_the_volume_is_stored(patient, codes):
    expected = np.asarray(plane(patient, AXIAL, 1.0)).astype(int)
    stored = patient.reoriented(codes)
    assert np.abs(np.asarray(plane(stored, AXIAL, 1.0)) - expected).max() <= 1
    scene, other = (Scene(p.segmentation, p.image, p.labels) for p in (patient, stored))
    np.testing.assert_allclose(other.box, scene.box, atol=1e-6)
    assert other.cells == scene.cells


def test_oblique_volume_is_shown_upright(patient):
    """Turned on the scanner's table by 20 degrees about z and resampled there: the organs stay where they are."""
    angle = np.radians(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ patient.image.affine
    points = np.stack(np.meshgrid(*map(np.arange, patient.image.shape), indexing="ij"), axis=-1)
    world = points @ affine[:3, :3].T + affine[:3, 3]
    index = np.rint(patient.image.geometry.index(world)).astype(int)
    index = np.moveaxis(index, -1, 0).clip(0, np.array(patient.image.shape)[:, None, None, None] - 1)
    turned = [Volume(v.array[tuple(index)], affine) for v in (patient.segmentation, patient.image)]
    panel = axial_panel(preview(*turned, patient.labels, patient.colors))
    rows_right, columns_right = where(panel, RED)
    rows_left, columns_left = where(panel, BLUE)
    assert columns_right.max() < columns_left.min()
    assert rows_right.mean() == pytest.approx(rows_left.mean(), abs=12), "both are at the same height y"


def test_page_has_its_size_and_shows_absent_labels_in_the_legend(patient):
    page = np.asarray(page_of(patient, title="case", subtitle="model"))
    assert page.shape == (SIZE[1], SIZE[0], 3)
    legend = page[92:300, 1250:]
    assert (np.abs(legend.astype(int) - RED).max(axis=-1) < 5).any()
    assert not (np.abs(legend.astype(int) - (0, 255, 0)).max(axis=-1) < 60).any(), "the larynx was not found"


def test_crowded_legend_fits_the_page(patient):
    table = LabelTable({n: f"structure_number_{n}_of_the_left_side" for n in range(1, 118)})
    crowd = 1 + np.arange(patient.image.array.size).reshape(patient.image.shape) % 90
    page = preview(patient.segmentation.with_array(crowd), patient.image, table.names, table.colors)
    assert (np.asarray(page)[856:, 1200:] == BACKGROUND).all()


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((1, 1, 1), (1, 1, 1)), ((3, 4, 2), (0.1, 0.2, 5)), ((64, 64, 1), (1, 1, 3)), ((1, 30, 400), (4, 1, 1))],
)
@pytest.mark.parametrize("filled", [False, True])
def test_every_shape_with_and_without_labels(shape, spacing, filled):
    image = np.random.default_rng(0).integers(-1000, 400, shape).astype(np.float32)
    image.flat[0] = np.nan
    segmentation = np.full(shape, 1 if filled else 0, np.uint8)
    affine = np.diag([*spacing, 1.0])
    page = preview(
        Volume(segmentation, affine), Volume(image, affine), {1: "organ"}, {1: RED}, title="a\nb \u00fc \u5149"
    )
    assert page.size == SIZE


def test_air_only_and_labels_that_are_not_asked_for(patient):
    air = patient.image.with_array(np.full(patient.image.shape, -1000, np.int16))
    page = np.asarray(preview(patient.segmentation, air, {2: "parotid_left"}, {2: BLUE})).astype(int)
    assert (np.abs(page - BLUE).max(axis=-1) < 40).any()
    assert not (np.abs(page - RED).max(axis=-1) < 40).any()


def test_written_picture_is_the_picture(patient, tmp_path):
    page = page_of(patient)
    path = write_preview(tmp_path / "new" / "preview.png", page)
    assert [p.name for p in path.parent.iterdir()] == ["preview.png"]
    with Image.open(path) as again:
        assert again.format == "PNG"
        np.testing.assert_array_equal(np.asarray(again), np.asarray(page))


def test_refusals(patient):
    moved = Volume(patient.image.array, patient.image.affine + np.diag([1.0, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"the segmentation on .* the image on "):
        preview(patient.segmentation, moved, patient.labels, patient.colors)
    with pytest.raises(ValueError, match="window"):
        page_of(patient, window=(40, 0))


def test_planes_are_chosen_for_what_they_show():
    def profile(*counts):
        return Profile(sum(counts), (np.array(counts),) * 3, np.zeros((2, 3)), np.zeros((1, 3)))

    found = {1: profile(0, 4, 4, 0, 0, 0), 2: profile(0, 0, 9, 1, 0, 0), 3: profile(0, 0, 0, 0, 0, 5)}
    assert best_cells(found, 0, 1) == [2], "two labels, both at their largest"
    assert best_cells(found, 0, 5) == [2, 5], "nothing more to gain after the third label"
    assert best_cells(found, 0, 5, seen=[2]) == [5]
    assert best_cells({}, 0, 3) == []


def test_spare_planes_keep_their_distance():
    assert spread_cells([0], 3, range(11)) == [0, 10, 5]
    assert spread_cells([1], 9, [1, 2]) == [1, 2]


def test_smooth_labels_keep_size_and_single_voxels():
    label_map = np.zeros((12, 12), np.uint8)
    label_map[2:6, 2:6], label_map[2:6, 6:9], label_map[10, 10] = 1, 2, 3
    big = smooth_labels(label_map, (0, 0, 12, 12), (240, 240))
    areas = np.bincount(big.ravel()) / 400
    assert areas[1] == pytest.approx(16, rel=0.1)
    assert areas[2] == pytest.approx(12, rel=0.1)
    assert areas[3] > 0.3, "a single voxel stays visible"
    assert set(np.unique(big)) == {0, 1, 2, 3}


def test_outlines_lie_within_their_label():
    labels = np.zeros((40, 40), np.uint8)
    labels[10:30, 10:30] = 1
    line = outlines(labels)
    assert line[10, 10:30].all()
    assert not line[labels == 0].any()
    assert not line[20, 20]


def test_long_names_keep_their_end():
    short = shortened("superior_pharyngeal_constrictor_muscle_left", 17, 200)
    assert short.endswith("left")
    assert "…" in short
    assert shortened("larynx", 17, 200) == "larynx"


def test_text_is_written_where_it_should_be():
    picture = Image.new("RGB", (200, 60))
    write(picture, (190, 30), "R", 16, (255, 255, 255), "rm")
    columns = np.nonzero(np.asarray(picture).any(axis=(0, 2)))[0]
    assert 170 < columns.min() <= columns.max() <= 190
