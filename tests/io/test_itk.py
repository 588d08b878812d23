import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medseg3d.io import (
    LabelTable,
    as_volume,
    read_geometry,
    read_label_table,
    read_volume,
    write_label_map,
    write_volume,
)
from medseg3d.volume import Volume

TABLE = LabelTable({1: "left lung", 3: "right"}, {3: (1, 128, 255)})
LPS_TO_RAS = np.diag([-1, -1, 1, 1])


def image(array=None, **geometry):
    made = sitk.GetImageFromArray(np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5) if array is None else array)
    made.SetSpacing(geometry.get("spacing", (0.5, 0.75, 2)))
    made.SetOrigin(geometry.get("origin", (-10, 20, 30)))
    made.SetDirection(geometry.get("direction", (0, 0, 1, 1, 0, 0, 0, 1, 0)))
    return made


def world(made, index):
    """Where SimpleITK itself puts a voxel, in RAS+."""
    return LPS_TO_RAS[:3, :3] @ made.TransformContinuousIndexToPhysicalPoint([float(n) for n in index])


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mhd", "nhdr", "nii.gz"])
def test_voxels_lie_where_simpleitk_puts_them(tmp_path, suffix):
    made = image()
    sitk.WriteImage(made, str(tmp_path / f"a.{suffix}"), useCompression=True)
    for volume in (read_volume(tmp_path / f"a.{suffix}"), as_volume(made)):
        assert volume.shape == (5, 4, 3) and volume.dtype == np.int16
        for index in ((0, 0, 0), (4, 0, 0), (1, 2, 1), (4, 3, 2)):
            assert volume.array[index] == made[index]
            np.testing.assert_allclose(volume.geometry.world(index), world(made, index), atol=1e-5)


@pytest.mark.parametrize("suffix", ["MHA", "NRRD", "Mhd"])
def test_capitals_in_a_suffix_do_not_matter(tmp_path, suffix):
    made = image()
    sitk.WriteImage(made, str(tmp_path / f"a.{suffix.lower()}"))
    (tmp_path / f"a.{suffix.lower()}").rename(tmp_path / f"b.{suffix}")
    np.testing.assert_array_equal(read_volume(tmp_path / f"b.{suffix}").array, as_volume(made).array)
    assert read_geometry(tmp_path / f"b.{suffix}").same_as(as_volume(made).geometry)


@pytest.mark.parametrize("suffix", ["nrrd", "seg.nrrd", "mha"])
def test_label_maps_are_read_by_simpleitk_and_by_us(tmp_path, segmentation, suffix):
    path = write_label_map(segmentation, tmp_path / f"seg.{suffix}", {1: "a", 3: "b"})
    made = sitk.ReadImage(str(path))
    assert made.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(made).T, segmentation.array)
    for index in ((0, 0, 0), (6, 5, 4)):
        np.testing.assert_allclose(world(made, index), segmentation.geometry.world(index), atol=1e-6)
    again = read_volume(path)
    np.testing.assert_allclose(again.affine, segmentation.affine, atol=1e-9)
    np.testing.assert_array_equal(again.array, segmentation.array)
    assert again.header["format"] == suffix.removeprefix("seg.")


def test_a_sheared_grid_is_read_by_simpleitk_from_these_formats_but_not_from_nifti(tmp_path):
    affine = np.array([[1, 0, 0, 5], [0, 0.9, 0, 6], [0, -0.3, 4, 7], [0, 0, 0, 1]])
    sheared = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine)
    for suffix in ("nrrd", "mha"):
        path = write_volume(sheared, tmp_path / f"a.{suffix}")
        np.testing.assert_allclose(read_volume(path).affine, affine, atol=1e-9)
        np.testing.assert_allclose(world(sitk.ReadImage(str(path)), (2, 3, 4)), sheared.geometry.world((2, 3, 4)))
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(write_volume(sheared, tmp_path / "a.nii.gz")))


def test_nrrd_carries_names_and_colours_as_slicer_does(tmp_path, segmentation):
    path = write_label_map(segmentation, tmp_path / "seg.nrrd", TABLE)
    (tmp_path / "seg.labels.json").unlink()
    assert read_label_table(path) == TABLE
    made = sitk.ReadImage(str(path))
    assert made.GetMetaData("Segment0_Name") == "left lung" and made.GetMetaData("Segment1_LabelValue") == "3"


def test_mha_has_its_names_in_the_sidecar(tmp_path, segmentation):
    path = write_label_map(segmentation, tmp_path / "seg.mha", TABLE)
    assert read_label_table(path) == TABLE
    (tmp_path / "seg.labels.json").unlink()
    assert read_label_table(path) is None


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32])
def test_images_round_trip_in_their_type(tmp_path, ct, suffix, dtype):
    volume = ct.with_array(np.abs(ct.array).astype(dtype))
    again = read_volume(write_volume(volume, tmp_path / f"ct.{suffix}"))
    assert again.dtype == dtype
    np.testing.assert_array_equal(again.array, volume.array)


def test_one_trailing_axis_of_one_is_dropped():
    assert as_volume(sitk.JoinSeries([image()])).shape == (5, 4, 3)


def test_what_is_not_one_3d_volume_is_refused(tmp_path):
    sitk.WriteImage(sitk.JoinSeries([image(), image()]), str(tmp_path / "a.nrrd"))
    with pytest.raises(ValueError, match=r"a\.nrrd has 2 volumes"):
        read_volume(tmp_path / "a.nrrd")
    with pytest.raises(ValueError, match="is 2D"):
        as_volume(sitk.Image([4, 4], sitk.sitkInt16))
    with pytest.raises(ValueError, match="has 3 numbers a voxel"):
        as_volume(sitk.Image([4, 4, 4], sitk.sitkVectorUInt8, 3))
    with pytest.raises(ValueError, match="complex64 voxels"):
        as_volume(sitk.Image([4, 4, 4], sitk.sitkComplexFloat32))


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_bad_files_give_one_line(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(image(), str(path), useCompression=True)
    whole = path.read_bytes()
    for content, message in ((b"", "is empty"), (whole[:-20], "cut off"), (b"some text\n" * 9, "another format")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_volume(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
def test_a_changed_bit_in_compressed_voxels_is_noticed(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
    sitk.WriteImage(image(noise), str(tmp_path / f"a.{suffix}"), useCompression=True)
    data = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    whole = data.read_bytes()
    for at in range(len(whole) - 1000, len(whole), 83):
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="copy or export it again"):
            read_volume(tmp_path / f"a.{suffix}")
    data.write_bytes(whole)
    np.testing.assert_array_equal(read_volume(tmp_path / f"a.{suffix}").array.T, noise)


def test_names_of_a_damaged_file_are_refused_as_it_is(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"some text\n" * 9)
    with pytest.raises(ValueError, match="another format"):
        read_label_table(tmp_path / "a.nrrd")


def test_nrrd_without_a_space_is_noted(tmp_path):
    head = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 3 2\nspacings: 1 1 2\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + bytes(range(24)))
    volume = read_volume(tmp_path / "a.nrrd")
    assert volume.shape == (4, 3, 2)
    assert "does not say how the patient lies" in volume.header["notes"][0]


def test_formats_convert_into_each_other(tmp_path, ct):
    nrrd = read_volume(write_volume(ct, tmp_path / "a.nrrd"))
    nifti = nib.load(write_volume(nrrd, tmp_path / "a.nii.gz"))
    np.testing.assert_allclose(nifti.affine, ct.affine, atol=1e-5)
    np.testing.assert_array_equal(nifti.dataobj, ct.array)
