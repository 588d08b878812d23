import gzip
import itertools
import struct

import nibabel as nib
import numpy as np
import pytest

from medseg3d.geometry import Geometry
from medseg3d.io import LabelTable, as_volume, read_volume, write_label_map, write_volume
from medseg3d.volume import Volume

TABLE = LabelTable({1: "left", 3: "right"})
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 0, 3.0, -126], [0, -1.5, 0, 72], [0, 0, 0, 1]])
ORIENTATIONS = [
    np.eye(3)[list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def voxels(dtype=np.int16, shape=(5, 6, 7)):
    return (np.random.default_rng(0).random(shape) * 100).astype(dtype)


def shifted(millimetres):
    affine = AFFINE.copy()
    affine[0, 3] += millimetres
    return affine


def saved(path, array=None, affine=AFFINE, edit=None, kind=nib.Nifti1Image):
    image = kind(voxels() if array is None else array, affine)
    if edit:
        edit(image)
    nib.save(image, path)
    return path


def patched(path, offset, form, *values):
    """Header fields that nibabel would not write, put into a .nii file."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


# Reading


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "a.img", "a b é.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_kind_of_file_gives_what_nibabel_gives(tmp_path, name, kind):
    pair = {nib.Nifti1Image: nib.Nifti1Pair, nib.Nifti2Image: nib.Nifti2Pair}[kind]
    path = saved(tmp_path / name, kind=pair if name in ("a.hdr", "a.img") else kind)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, voxels())
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.dtype == np.int16 and volume.array.flags.f_contiguous
    assert volume.header["format"] == "nifti" and volume.header["notes"] == ()


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", ">i2", ">f4"])
def test_types_are_kept_in_native_order(tmp_path, dtype):
    array = voxels(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(array.dtype)
    nib.save(nib.Nifti1Image(array, AFFINE, header), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(volume.array, array)


def test_float64_becomes_float32(tmp_path):
    volume = read_volume(saved(tmp_path / "a.nii.gz", voxels(np.float64)))
    assert volume.dtype == np.float32
    np.testing.assert_allclose(volume.array, voxels(np.float64), rtol=1e-7)


@pytest.mark.parametrize(
    ("stored", "slope", "inter", "dtype"),
    [
        (np.int16, 1, 0, np.int16),
        (np.int16, 0, 7, np.int16),  # slope 0 means no scaling
        (np.int16, np.nan, 0, np.int16),
        (np.uint8, 1, -1024, np.int16),
        (np.uint8, 2, 1, np.uint8),
        (np.uint16, 1, -1024, np.int16),
        (np.int16, 1000, 0, np.int32),
        (np.int16, 0.5, 0, np.float32),
        (np.int16, 1, -0.5, np.float32),
        (np.float32, 2, 1, np.float32),
        (np.int32, 1e9, 0, np.float32),
    ],
)
def test_scaling_keeps_integers_where_they_fit(tmp_path, stored, slope, inter, dtype):
    path = patched(saved(tmp_path / "a.nii", voxels(stored)), 112, "<2f", slope, inter)
    volume = read_volume(path)
    assert volume.dtype == dtype
    expected = nib.load(path).get_fdata()
    np.testing.assert_allclose(volume.array, expected, rtol=1e-6)
    np.testing.assert_array_equal(as_volume(nib.load(path)).array, volume.array)


def test_several_gzip_members_are_all_read(tmp_path):
    raw = saved(tmp_path / "a.nii").read_bytes()
    cuts = [0, 100, 400, 700, len(raw)]
    members = b"".join(gzip.compress(raw[a:b]) for a, b in itertools.pairwise(cuts))
    (tmp_path / "b.nii.gz").write_bytes(members)
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").array, voxels())


@pytest.mark.parametrize(
    ("stored", "named", "note"), [("nii", "nii.gz", "not compressed"), ("nii.gz", "nii", "is compressed")]
)
def test_a_misleading_suffix_is_read_with_a_note(tmp_path, stored, named, note):
    path = saved(tmp_path / f"a.{stored}").rename(tmp_path / f"b.{named}")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, voxels())
    assert len(volume.header["notes"]) == 1 and note in volume.header["notes"][0]


def test_trailing_axes_of_one_are_dropped(tmp_path):
    volume = read_volume(saved(tmp_path / "a.nii.gz", voxels()[..., None, None]))
    np.testing.assert_array_equal(volume.array, voxels())


def test_one_slice_is_read(tmp_path):
    assert read_volume(saved(tmp_path / "a.nii.gz", voxels(shape=(5, 6, 1)))).shape == (5, 6, 1)


def bad_files(folder):
    """name -> (file, what the message must say)."""
    whole = saved(folder / "whole.nii.gz").read_bytes()
    rgb = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    made = {
        "empty": (b"", "is empty"),
        "cut gzip": (whole[: len(whole) // 2], "is cut off"),
        "cut to its header": (whole[:5], "is cut off"),
        "damaged gzip": (whole[:60] + bytes(20) + whole[80:], "is damaged"),
        "wrong checksum": (whole[:-8] + bytes(4) + whole[-4:], "is damaged"),
        "text": (b"hello world, this is no image\n" * 40, "is not a NIfTI file"),
        "gzipped text": (gzip.compress(b"hello world\n" * 40), "is not a NIfTI file"),
        "short": (gzip.compress(gzip.decompress(whole)[:600]), "is cut off: shape"),
    }
    for name, (content, message) in made.items():
        (folder / f"{name}.nii.gz").write_bytes(content)
        yield name, folder / f"{name}.nii.gz", message
    yield "4D", saved(folder / "4D.nii.gz", voxels(shape=(4, 4, 4, 5))), r"has 5 volumes \(shape \(4, 4, 4, 5\)\)"
    yield "5D", saved(folder / "5D.nii.gz", voxels(shape=(4, 4, 4, 1, 3))), "has 3 volumes"
    yield "2D", saved(folder / "2D.nii.gz", voxels(shape=(4, 4))), "is 2D"
    yield "complex", saved(folder / "complex.nii.gz", voxels(np.complex64)), "has complex64 voxels"
    yield "colour", saved(folder / "colour.nii.gz", rgb), "has colour voxels"
    cases = ("spacing", "dims", "type", "magic", "singular", "infinite", "nowhere", "before", "large")
    plain = (saved(folder / f"{name}.nii") for name in cases)
    yield "zero spacing", patched(next(plain), 80, "<3f", 1, 0, 1), r"has a spacing of \[1.0, 0.0, 1.0\]"
    yield "dimensions", patched(next(plain), 42, "<h", -5), "damaged header: dimensions"
    yield "data type", patched(next(plain), 70, "<h", 9999), "unknown data type 9999"
    yield "analyze", patched(next(plain), 344, "<4s", b""), "Analyze 7.5"
    yield "singular", patched(next(plain), 280, "<8f", 1, 0, 0, 0, 1, 0, 0, 0), "singular|spacing"
    yield "infinite", patched(next(plain), 280, "<f", np.inf), "NaN or infinite"
    yield "offset", patched(next(plain), 108, "<f", np.nan), "voxels begin at byte nan"
    yield "negative offset", patched(next(plain), 108, "<f", -8), "voxels begin at byte -8"
    yield "too large", patched(next(plain), 42, "<3h", 32767, 32767, 32767), "is cut off: shape"
    saved(folder / "half.hdr", kind=nib.Nifti1Pair)
    (folder / "half.img").unlink()
    yield "half a pair", folder / "half.hdr", "half.img is not beside it"


def test_bad_files_give_one_line_that_says_what(tmp_path):
    for name, path, message in bad_files(tmp_path):
        with pytest.raises(ValueError, match=message) as caught:
            read_volume(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value), name


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.nii\.gz"):
        read_volume(tmp_path / "absent.nii.gz")


# Geometry


def test_codes_of_zero_are_noted_and_survive(tmp_path):
    path = patched(saved(tmp_path / "a.nii"), 252, "<2h", 0, 0)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    assert "left and right cannot be trusted" in volume.header["notes"][0]
    write_label_map(volume.with_array(np.zeros(volume.shape, int)), tmp_path / "seg.nii.gz", TABLE)
    written = nib.load(tmp_path / "seg.nii.gz")
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 0)
    np.testing.assert_array_equal(written.affine, volume.affine)


def test_the_qform_is_used_where_only_it_is_set(tmp_path):
    def only_qform(image):
        image.set_qform(AFFINE, 1)
        image.header["sform_code"] = 0

    volume = read_volume(saved(tmp_path / "a.nii.gz", edit=only_qform))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.header["qform_code"] == 1 and volume.header["notes"] == ()


def test_forms_that_disagree_are_noted(tmp_path):
    volume = read_volume(saved(tmp_path / "a.nii.gz", edit=lambda image: image.set_qform(shifted(20), 1)))
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert "up to 20.0 mm apart; the sform is used" in volume.header["notes"][0]


@pytest.mark.parametrize(("units", "factor"), [("meter", 1000), ("micron", 0.001)])
def test_other_units_become_mm_and_are_written_as_they_were(tmp_path, units, factor):
    path = saved(tmp_path / "a.nii.gz", edit=lambda image: image.header.set_xyzt_units(units, "sec"))
    volume = read_volume(path)
    np.testing.assert_allclose(volume.affine[:3], AFFINE[:3] * factor)
    assert volume.header["notes"] == (f"lengths converted from {units} to mm",)
    write_label_map(volume.with_array(np.zeros(volume.shape, int)), tmp_path / "seg.nii.gz", TABLE)
    written = nib.load(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(written.affine, AFFINE)
    assert written.header.get_xyzt_units() == (units, "sec")


def test_unknown_units_are_mm(tmp_path):
    volume = read_volume(saved(tmp_path / "a.nii.gz", edit=lambda image: image.header.set_xyzt_units(0, 0)))
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.header["units"] == "unknown" and volume.header["notes"] == ()


@pytest.mark.parametrize("axes", ORIENTATIONS, ids=lambda axes: "".join(nib.aff2axcodes(nib.affines.from_matvec(axes))))
def test_48_orientations_are_written_and_read_again(tmp_path, axes):
    tilt = np.array([[1, 0.02, -0.1], [-0.03, 1, 0.05], [0.1, -0.06, 1]])  # oblique, and not quite orthogonal
    affine = nib.affines.from_matvec(tilt @ axes * [0.8, 1.25, 3.0], [-100.5, 20.25, 300.75]).astype(np.float32)
    image = saved(tmp_path / "ct.nii.gz", affine=affine)
    labels = (voxels() > 50).astype(int)
    for source in (read_volume(image), Volume(voxels(), affine)):
        path = write_label_map(source.with_array(labels), tmp_path / "seg.nii.gz", {1: "left"})
        for reader in (lambda path: nib.load(path).affine, lambda path: read_volume(path).affine):
            np.testing.assert_array_equal(reader(path), affine)
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), labels)


# Writing


def test_the_header_of_the_source_is_kept(tmp_path):
    def decorate(image):
        header = image.header
        image.set_qform(AFFINE, 1)
        image.set_sform(AFFINE, 4)
        header.set_xyzt_units("mm", "msec")
        header["toffset"], header["slice_code"], header["intent_name"] = 2.5, 3, b"CT"
        header["cal_min"], header["cal_max"], header["descrip"], header["aux_file"] = -100, 300, b"Doe, Jane", b"jane"

    source = saved(tmp_path / "ct.nii.gz", edit=decorate)
    volume = read_volume(source)
    write_label_map(volume.with_array(np.ones(volume.shape, np.int64)), tmp_path / "seg.nii.gz", TABLE)
    before, after = nib.load(source).header, nib.load(tmp_path / "seg.nii.gz").header
    for field in before:
        if field not in ("datatype", "bitpix", "cal_min", "cal_max", "descrip", "aux_file"):
            np.testing.assert_array_equal(after[field], before[field], err_msg=field)
    assert after.get_data_dtype() == np.uint8
    assert (float(after["cal_min"]), float(after["cal_max"])) == (0, 0)
    assert after["descrip"].item() == b"medseg3d label map" and after["aux_file"].item() == b""


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_headers_of_pairs_nifti2_and_big_endian_are_cloned(tmp_path, kind, order):
    name = "ct.hdr" if kind is nib.Nifti1Pair else "ct.nii"
    header = kind.header_class(endianness=order)
    header.set_xyzt_units("mm", "sec")
    nib.save(kind(voxels(), AFFINE, header), tmp_path / name)
    volume = read_volume(tmp_path / name)
    write_label_map(volume.with_array(np.ones(volume.shape, int)), tmp_path / "seg.nii", TABLE)
    written = nib.load(tmp_path / "seg.nii")
    assert isinstance(written, nib.Nifti1Image if kind is nib.Nifti1Pair else nib.Nifti2Image)
    np.testing.assert_array_equal(written.affine, AFFINE)
    np.testing.assert_array_equal(written.dataobj, 1)


def test_a_moved_volume_gets_its_own_geometry_and_keeps_the_codes(tmp_path):
    source = read_volume(saved(tmp_path / "ct.nii.gz", edit=lambda image: image.set_sform(AFFINE, 3)))
    moved = source.reoriented("RAS")
    write_volume(moved, tmp_path / "ras.nii.gz")
    written = nib.load(tmp_path / "ras.nii.gz")
    np.testing.assert_allclose(written.affine, moved.affine)
    np.testing.assert_array_equal(written.dataobj, moved.array)
    assert int(written.header["sform_code"]) == 3


def test_a_stale_header_does_not_win_over_the_volume(tmp_path):
    source = read_volume(saved(tmp_path / "ct.nii.gz"))
    elsewhere = Volume(source.array, shifted(5), source.header)
    write_volume(elsewhere, tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii.gz").affine, elsewhere.affine)


def test_what_other_readers_forgive_in_a_qform(tmp_path):
    """pixdim[0] = 0 counts as 1; a quaternion that is no rotation does not matter beside an sform."""
    raw = bytearray(saved(tmp_path / "a.nii", edit=lambda image: image.set_qform(AFFINE, 1)).read_bytes())
    expected = read_volume(tmp_path / "a.nii")
    raw[76:80] = bytes(4)
    raw[254:256] = bytes(2)  # no sform
    (tmp_path / "qfac.nii").write_bytes(raw)
    positive = np.linalg.det(AFFINE[:3, :3]) > 0
    read = read_volume(tmp_path / "qfac.nii")
    np.testing.assert_allclose(read.affine, nib.load(tmp_path / "qfac.nii").affine, atol=1e-4)
    assert np.allclose(read.affine, AFFINE, atol=1e-4) == positive
    raw[256:268] = np.array([0.8, 0.8, 0.3], "<f4").tobytes()
    (tmp_path / "damaged.nii").write_bytes(raw)
    with pytest.raises(ValueError, match=r"damaged\.nii: its qform is damaged .* there is no sform: export it again"):
        read_volume(tmp_path / "damaged.nii")
    raw[254:256] = (1).to_bytes(2, "little")
    (tmp_path / "beside.nii").write_bytes(raw)
    beside = read_volume(tmp_path / "beside.nii")
    np.testing.assert_array_equal(beside.affine, expected.affine)
    assert beside.header["notes"] == ("the qform is damaged; the sform is used",) and beside.header["qform_code"] == 0
    write_volume(beside, tmp_path / "again.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "again.nii.gz").affine, expected.affine)


def test_only_a_grid_without_shear_gets_a_qform(tmp_path):
    straight, sheared = AFFINE, AFFINE @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for affine, code in ((straight, 1), (sheared, 0)):
        write_volume(Volume(voxels(), affine), tmp_path / "a.nii.gz")
        written = nib.load(tmp_path / "a.nii.gz")
        assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, code)
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)
        assert Geometry(voxels().shape, written.affine).same_as(Geometry(voxels().shape, affine))


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8, np.int64, np.float64, bool])
def test_images_are_written_as_they_are(tmp_path, dtype):
    path = write_volume(Volume(voxels(dtype), AFFINE), tmp_path / "a.nii.gz")
    expected = {np.float64: np.float32, bool: np.uint8}.get(dtype, dtype)
    assert nib.load(path).get_data_dtype() == expected
    np.testing.assert_array_equal(nib.load(path).dataobj, voxels(dtype).astype(expected))


def test_nan_in_an_image_is_written_and_checked(tmp_path):
    array = voxels(np.float32)
    array[0, 0, 0] = np.nan
    np.testing.assert_array_equal(read_volume(write_volume(Volume(array, AFFINE), tmp_path / "a.nii.gz")).array, array)


def test_output_is_the_same_in_every_run(tmp_path):
    volume = Volume(voxels() // 60, AFFINE)
    first = write_label_map(volume, tmp_path / "a.nii.gz", {1: "left"}).read_bytes()
    assert write_label_map(volume, tmp_path / "b.nii.gz", {1: "left"}).read_bytes() == first
