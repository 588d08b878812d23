import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

pydicom = pytest.importorskip("pydicom")

from medseg3d.io import as_volume, find_inputs, list_series, read_dicom, read_volume  # noqa: E402

TILTED = (1, 0, 0, 0, np.cos(np.radians(15)), -np.sin(np.radians(15)))


@pytest.fixture
def series(tmp_path, dicom_slice):
    """make(count, ...) -> a folder of `count` slices 2 mm apart, written in shuffled order."""

    def make(count=6, folder="scan", step=(0, 0, 2.0), skip=(), **arguments):
        for number in np.random.default_rng(1).permutation(count):
            if number not in skip:
                dicom_slice(
                    tmp_path / folder, int(number), np.array([-10, -20, 30.0]) + number * np.array(step), **arguments
                )
        return tmp_path / folder

    return make


def expected(count):
    return np.stack([(np.arange(12).reshape(3, 4) + 100 * n - 1024).T for n in range(count)], axis=-1)


def by_simpleitk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return as_volume(reader.Execute())


def test_slices_are_sorted_rescaled_and_placed(series):
    volume = read_volume(series())
    np.testing.assert_array_equal(volume.array, expected(6))
    assert volume.dtype == np.int16 and volume.array.flags.f_contiguous
    np.testing.assert_allclose(volume.affine, [[-0.5, 0, 0, 10], [0, -0.75, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1]])
    assert volume.orientation == "LPS"
    assert volume.header["modality"] == "CT" and volume.header["format"] == "dicom" and volume.header["notes"] == ()


@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (-1, 0, 0, 0, -1, 0)]
)
def test_planes_of_any_orientation_lie_where_simpleitk_puts_them(series, orientation):
    normal = np.cross(orientation[:3], orientation[3:])
    folder = series(orientation=orientation, step=2 * normal)
    ours, theirs = read_dicom(folder), by_simpleitk(folder)
    assert ours.geometry.same_as(theirs.geometry)
    np.testing.assert_array_equal(ours.array, theirs.array)


def test_a_zip_reads_like_its_folder_whatever_its_member_names(series, tmp_path):
    folder = series()
    with zipfile.ZipFile(tmp_path / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, file in enumerate(sorted(folder.iterdir())):
            archive.write(file, f"../../../{number}/evil{number}.dcm")
        archive.writestr("readme.txt", "hello")
    before = sorted(tmp_path.rglob("*"))
    volume = read_volume(tmp_path / "scan.zip")
    np.testing.assert_array_equal(volume.array, expected(6))
    assert sorted(tmp_path.rglob("*")) == before


def test_tilt_is_exact_as_a_sheared_grid(series):
    volume = read_dicom(series(orientation=TILTED, step=(0, 0, 2)))
    assert volume.geometry.shear_degrees == pytest.approx(15, abs=1e-4)
    (note,) = volume.header["notes"]
    assert note.startswith("gantry tilt of 15.0 degrees: kept as a sheared grid")
    np.testing.assert_array_equal(volume.array, expected(6))
    np.testing.assert_allclose(volume.geometry.world((0, 0, 5)), (10, 20, 40), atol=1e-9)


def test_a_missing_slice_is_filled_with_a_note(series):
    volume = read_dicom(series(skip=(2,)))
    np.testing.assert_array_equal(volume.array, expected(6))  # linear along the axis, so the filled slice is known
    assert volume.header["notes"] == ("1 missing slice filled by linear interpolation (gap of 4.0 mm)",)


def test_a_wide_gap_is_refused_with_the_series_and_the_reason(series):
    with pytest.raises(
        ValueError, match=r"scan, series 'series 1.2.3' \(CT, 6 images\): slices are .* gap of 14\.0 mm"
    ):
        read_dicom(series(count=12, skip=range(3, 9)))


def test_identical_copies_are_dropped(series, dicom_slice):
    folder = series()
    dicom_slice(folder, 2, (-10, -20, 34.0))
    volume = read_dicom(folder)
    np.testing.assert_array_equal(volume.array, expected(6))
    assert volume.header["notes"] == ("1 duplicate slice dropped",)


def test_one_position_with_two_images_is_refused(series, dicom_slice):
    folder = series()
    dicom_slice(folder, 2, (-10, -20, 34.0), pixels=np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"000\d\.dcm and 000\d\.dcm differ but lie at one place"):
        read_dicom(folder)


def test_a_series_above_others_is_read_alone(series, tmp_path):
    series(count=3, folder="study")
    series(count=6, folder="study/later", series="9.9")
    assert read_volume(tmp_path / "study").shape == (4, 3, 3)
    cases = find_inputs(tmp_path / "study").cases
    assert [(case.name, read_volume(case.path).shape[2]) for case in cases] == [("study", 3), ("later", 6)]


def test_a_series_in_several_folders_is_one_case(series, tmp_path):
    series(count=6, folder="study/a", skip=(3, 4, 5))
    series(count=6, folder="study/b", skip=(0, 1, 2))
    (case,) = find_inputs(tmp_path / "study").cases
    np.testing.assert_array_equal(read_volume(case.path).array, expected(6))
    series(count=6, folder="study/c", series="9.9")  # now the folder above holds more than that series
    found = find_inputs(tmp_path / "study")
    assert [case.name for case in found.cases] == ["c"]
    assert all("a part of a series that goes on in" in reason for _, reason in found.skipped)
    assert [path.name for path, _ in found.skipped] == ["a", "b"]


def test_phases_in_folders_of_their_own_are_cases(series, tmp_path):
    for number in range(2):
        series(count=4, folder=f"study/{number}", AcquisitionNumber=number)
    assert [case.name for case in find_inputs(tmp_path / "study").cases] == ["0", "1"]


def test_phases_in_one_series_are_told_apart(series):
    series(count=6, AcquisitionNumber=1)
    folder = series(count=5, AcquisitionNumber=2, pixels=np.full((3, 4), 9))
    assert [one.images for one in list_series(folder)] == [6, 5]
    volume = read_dicom(folder)
    np.testing.assert_array_equal(volume.array, expected(6))
    assert len(volume.header["notes"]) == 1 and "left out" in volume.header["notes"][0]


def test_a_repeat_that_no_tag_tells_apart_is_refused(series):
    series()
    with pytest.raises(ValueError, match="differ but lie at one place"):
        read_dicom(series(pixels=np.full((3, 4), 9)))


def test_the_largest_ct_series_is_read_and_the_rest_listed(series, dicom_slice, tmp_path):
    series(count=6, series="1.1")
    series(count=4, series="1.2")
    series(count=4, series="1.1", orientation=(0, 1, 0, 0, 0, -1), step=(2, 0, 0))
    series(count=9, series="1.3", Modality="PT")
    folder = series(count=3, series="1.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom_slice(folder, 0, (0, 0, 0), series="1.5", SamplesPerPixel=3, Rows=3, Columns=4, pixels=np.zeros((3, 12)))
    (folder / "readme.txt").write_text("hello")
    volume = read_dicom(folder)
    np.testing.assert_array_equal(volume.array, expected(6))
    notes = "\n".join(volume.header["notes"])
    assert len(volume.header["notes"]) == 5
    assert "series 'series 1.4' (CT, 3 images): a localizer" in notes
    assert "series 'series 1.5' (CT, 1 image): colour images" in notes
    assert "series 'series 1.3' (PT, 9 images): series 'series 1.1' (CT, 6 images) is read" in notes
    listed = list_series(folder)
    assert [(one.modality, one.images) for one in listed if not one.rejected] == [
        ("CT", 6),
        ("CT", 4),
        ("CT", 4),
        ("PT", 9),
    ]
    for name in ("1.2", "series 1.2"):
        assert read_dicom(folder, series=name).shape == (4, 3, 4)
    with pytest.raises(ValueError, match=r"no DICOM series 'nine' that makes a volume: series 'series 1\.1' \(CT, 6"):
        read_dicom(folder, series="nine")


def test_another_modality_is_read_with_a_note(series):
    volume = read_dicom(series(Modality="MR", pixels=np.full((3, 4), 5)))
    assert volume.header["modality"] == "MR" and "the modality is MR, not CT" in volume.header["notes"]


def test_a_folder_without_a_usable_series_says_why_for_each(series, tmp_path):
    folder = series(ImageType=["DERIVED", "SECONDARY", "LOCALIZER"])
    with pytest.raises(
        ValueError, match=r"no DICOM series that makes a volume: series .* \(CT, 6 images\): a localizer"
    ):
        read_dicom(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no DICOM series that makes a volume$"):
        read_volume(tmp_path / "empty")


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("ImagePositionPatient", None),
        ("ImageOrientationPatient", None),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
        ("PixelSpacing", None),
        ("PixelSpacing", [0, 0.5]),
    ],
)
def test_images_without_a_place_are_left_out(series, tag, value):
    folder = series()
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        setattr(dataset, tag, value)
        dataset.save_as(file)
    with pytest.raises(ValueError, match=r"\(CT, 6 images\): no valid position, orientation or pixel spacing"):
        read_dicom(folder)


def test_a_damaged_file_is_left_out_and_its_slice_filled(series):
    folder = series()
    victim = next(file for file in folder.iterdir() if pydicom.dcmread(file).InstanceNumber == 2)
    victim.write_bytes(victim.read_bytes()[:200])
    volume = read_dicom(folder)
    np.testing.assert_array_equal(volume.array, expected(6))
    assert "a damaged file" in volume.header["notes"][0] and "1 missing slice" in volume.header["notes"][1]


def test_a_header_with_wrong_bytes_is_a_damaged_file(series):
    folder = series()
    victim = next(file for file in folder.iterdir() if pydicom.dcmread(file).InstanceNumber == 2)
    victim.write_bytes(victim.read_bytes().replace(b"\x08\x00\x60\x00CS", b"\x08\x00\x60\x00C9", 1))
    assert "a damaged file" in read_dicom(folder).header["notes"][0]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_told_by_its_name(compression, series, tmp_path):
    with zipfile.ZipFile(tmp_path / "scan.zip", "w", compression) as archive:
        for file in series().iterdir():
            archive.write(file, file.name)
    content = bytearray((tmp_path / "scan.zip").read_bytes())
    content[len(content) // 3] ^= 0xFF
    (tmp_path / "scan.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"scan\.zip cannot be unzipped \(.*copy or export it again"):
        read_volume(tmp_path / "scan.zip")


def test_a_tag_that_differs_in_every_slice_tells_nothing_apart(series):
    for time in range(2):
        for number in range(6):
            folder = series(count=number + 1, skip=range(number), AcquisitionTime=f"1200{time}{number}")
    assert [one.images for one in list_series(folder)] == [12]
    np.testing.assert_array_equal(read_dicom(folder).array, expected(6))


PADDED = np.array([[-2000, -500, 0], [100, 1024, 3000]])


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (None, [-1024, -1524, -1024]),  # -3024 HU is padding, whatever the tags say
        (-500, [-1024, -1024, -1024]),
        (pydicom.DataElement("PixelPaddingValue", "US", 65036), [-1024, -1024, -1024]),  # -500 with the wrong sign
        (3000, [-1024, -1524, -1024]),  # above air: not padding, or bone would get holes
    ],
)
def test_padding_becomes_air(series, padding, expected):
    volume = read_dicom(
        series(PixelRepresentation=1, pixels=PADDED, **({"PixelPaddingValue": padding} if padding else {}))
    )
    np.testing.assert_array_equal(volume.array[..., 0].T, [expected, [-924, 0, 1976]])
    share = "16.7%" if -1524 in expected else "33.3%"
    assert f"padding outside the field of view ({share} of the voxels) set to -1024 HU" in volume.header["notes"]


def test_a_padding_range_becomes_air(series):
    volume = read_dicom(
        series(PixelRepresentation=1, pixels=PADDED, PixelPaddingValue=-600, PixelPaddingRangeLimit=-400)
    )
    assert (volume.array[:, 0] == -1024).all()


def test_fractional_slopes_give_float32(series):
    volume = read_dicom(series(RescaleSlope=0.5))
    assert volume.dtype == np.float32
    np.testing.assert_allclose(volume.array[1, 0, 0], 0.5 - 1024)


def test_one_slice_is_read_with_a_note(dicom_slice, tmp_path):
    path = dicom_slice(tmp_path / "one", 1, (0, 0, 0))
    volume = read_volume(path)
    assert volume.shape == (4, 3, 1) and volume.spacing == (0.5, 0.75, 2)
    assert volume.header["notes"] == ("one slice only, taken as 2 mm thick",)


def test_cut_pixel_data_name_the_file(series):
    folder = series()
    victim = sorted(folder.iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"0000\.dcm: its pixel data are missing or cut off") as caught:
        read_dicom(folder)
    assert "\n" not in str(caught.value)


def test_enhanced_multiframe_equals_single_slices(series, dicom_slice, tmp_path):
    path = dicom_slice(tmp_path / "multi", 0, (0, 0, 0), pixels=np.zeros((3, 4)))
    dataset = pydicom.dcmread(path)
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        del dataset[tag]

    def item(**tags):
        made = pydicom.Dataset()
        for tag, value in tags.items():
            setattr(made, tag, value)
        return made

    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[0.75, 0.5])],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1024)],
    )
    order = [3, 0, 5, 1, 4, 2]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[-10, -20, 30 + 2 * n])]) for n in order
    ]
    dataset.NumberOfFrames = 6
    dataset.PixelData = np.stack([np.arange(12).reshape(3, 4) + 100 * n for n in order]).astype("<u2").tobytes()
    dataset.save_as(path)
    multi, single = read_volume(path), read_dicom(series())
    np.testing.assert_array_equal(multi.array, single.array)
    np.testing.assert_allclose(multi.affine, single.affine)


def test_simpleitk_decodes_where_no_plugin_can(series, monkeypatch):
    folder = series()
    plain = read_dicom(folder)

    def no_plugin(self):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(no_plugin))
    np.testing.assert_array_equal(read_dicom(folder).array, plain.array)
    monkeypatch.setattr("SimpleITK.ReadImage", lambda path: no_plugin(None))
    with pytest.raises(ValueError, match=r"Explicit VR Little Endian pixel data cannot be decoded \(no plugin\)"):
        read_dicom(folder)


def test_without_pydicom_the_command_that_installs_it_is_named(tmp_path):
    code = "import sys; sys.modules['pydicom'] = None; from medseg3d.io import read_volume; read_volume(sys.argv[1])"
    (tmp_path / "scan").mkdir()
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "scan"], capture_output=True, text=True, cwd=root)
    assert run.stderr.strip().endswith(
        'ModuleNotFoundError: reading DICOM needs pydicom: pip install "medseg3d[dicom]"'
    )


# Real scans


def test_crlm_equals_simpleitk(shared):
    folder = shared("data", "crlm-ct-1004-dicom")
    ours, theirs = read_volume(folder), by_simpleitk(folder)
    assert ours.geometry.same_as(theirs.geometry)
    inside = theirs.array > -2000
    np.testing.assert_array_equal(ours.array[inside], theirs.array[inside])
    assert np.unique(theirs.array[~inside]).tolist() == [-3024] and (ours.array[~inside] == -1024).all()
    assert "padding" in ours.header["notes"][0] and len(ours.header["notes"]) == 1


def test_jpeg2000_equals_simpleitk_and_lies_under_its_label_map(shared):
    ours = read_volume(shared("data", "totalsegmentator-example-dicom", "dicom"))
    theirs = by_simpleitk(shared("data", "totalsegmentator-example-dicom", "dicom"))
    assert ours.geometry.same_as(theirs.geometry) and ours.header["notes"] == ()
    np.testing.assert_array_equal(ours.array, theirs.array)
    labels = nib.load(shared("data", "totalsegmentator-example-dicom", "ts_example_dicom_pred_total.nii.gz"))
    frame = ours.geometry.reorient("".join(nib.aff2axcodes(labels.affine)))
    np.testing.assert_allclose(frame.target.affine, labels.affine, atol=1e-3)
    assert frame.target.shape == labels.shape
    bone = frame.image(ours.array)[np.asarray(labels.dataobj) == 30]  # a lumbar vertebra
    assert bone.size == 0 or bone.mean() > 100


def test_a_real_tilted_head_with_uneven_slices(shared):
    folder = shared("data", "ge-head-tilt-dicom")
    volume = read_volume(folder)
    notes = " ".join(volume.header["notes"])
    assert "gantry tilt of 18.5 degrees: kept as a sheared grid" in notes
    assert "slices 1.1 to 7.0 mm apart put on an even grid of 37 slices, 4.00 mm apart" in notes
    assert volume.geometry.shear_degrees == pytest.approx(18.5, abs=0.01)
    raw = [pydicom.dcmread(file) for file in folder.iterdir()]
    for dataset in raw:  # each slice lies where its own header says, at least to the grid's next slice
        corner = np.array(dataset.ImagePositionPatient, float) * [-1, -1, 1]
        index = volume.geometry.index(corner)
        np.testing.assert_allclose(index[:2], 0, atol=1e-6)
        near = round(index[2])
        if abs(index[2] - near) < 0.02:
            image = np.maximum(dataset.pixel_array.T, -1024)
            np.testing.assert_array_equal(volume.array[..., near][image > -1024], image[image > -1024])
