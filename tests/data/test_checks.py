import numpy as np
import pytest

from medseg3d.data.checks import check_ct, check_voxels
from medseg3d.io import read_volume
from medseg3d.volume import Volume

LPS = np.diag([-5.0, -5, 5, 1])


def volume(low=-1000.0, high=1500.0, shape=(8, 9, 10), dtype=np.int16, affine=LPS, **header):
    array = np.random.default_rng(0).uniform(low, high, shape)
    array.flat[:2] = low, high
    return Volume(array.astype(dtype), affine, header)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_a_ct_passes_in_silence(dtype):
    assert check_ct(volume(dtype=dtype)) == ()
    assert check_ct(volume(dtype=dtype, modality="CT")) == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_number_are_counted(value):
    array = volume(dtype=np.float32).array.copy()
    array[1, 2, 3] = array[4, 5, 6] = value
    with pytest.raises(ValueError, match="2 of 720 voxels are NaN or infinite") as caught:
        check_ct(Volume(array, LPS))
    fixed = np.nan_to_num(array, nan=-1024, posinf=3071, neginf=-1024)
    assert "numpy.nan_to_num" in str(caught.value)
    check_ct(Volume(fixed, LPS))


@pytest.mark.parametrize("value", [0, -1024, 7])
def test_a_constant_volume_is_refused(value):
    with pytest.raises(ValueError, match=f"every voxel is {value}: there is nothing to segment"):
        check_ct(Volume(np.full((8, 8, 8), value, np.int16), LPS), allow_non_hu=True)


@pytest.mark.parametrize(("shape", "what"), [((9, 9, 1), "a single slice"), ((3, 9, 9), r"of shape \(3, 9, 9\)")])
def test_too_few_slices_are_refused(shape, what):
    with pytest.raises(ValueError, match=f"the volume is {what}; each axis needs at least 4 voxels"):
        check_ct(volume(shape=shape))
    assert check_ct(volume(shape=(4, 9, 9))) == ()


@pytest.mark.parametrize(
    ("low", "high", "why"),
    [
        (0, 255, "grey levels for display"),
        (0, 3000, "an offset such as -1024 may be missing"),
        (0, 1, "normalised"),
        (-3, 8, "normalised"),
        (0, 65535, "offset"),
    ],
)
def test_what_is_not_hounsfield_is_refused_unless_allowed(low, high, why):
    odd = volume(low, high, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"not Hounsfield units: .*{why}.*--allow-non-hu \(allow_non_hu=True\)"):
        check_ct(odd)
    told = check_ct(odd, allow_non_hu=True)
    assert why in told[0] and "the result will be wrong" in told[0]


def test_one_file_of_a_dicom_series_is_sent_to_its_folder(tmp_path):
    file = tmp_path / "series" / "1.dcm"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(ValueError, match=f"a single slice.*give the folder of its series, {file.parent}"):
        check_voxels(volume(shape=(9, 9, 1), format="dicom", path=str(file)))


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (volume(modality="MR"), "the modality is MR"),
        (volume(low=-150), "no voxel is below -150 HU"),
        (volume(low=-3024), "% of the voxels are below -1500 HU (least -3024)"),
        (volume(high=40000, dtype=np.int32), "the highest intensity is 40000"),
        (volume(affine=np.diag([-0.001, 0.001, 0.001, 1])), "a spacing of 0.001 x 0.001 x 0.001 mm is unusual"),
        (volume(affine=np.diag([800.0, 800, 1000, 1])), "a spacing of 800 x 800 x 1000 mm is unusual"),
        (volume(affine=np.diag([-0.1, -0.1, 0.25, 1])), "too small for a patient: check the units in the header"),
        (Volume(np.clip(volume().array, -160, 240), LPS), "are at the maximum of 240"),
    ],
)
def test_doubts_are_told_but_not_refused(odd, told):
    assert any(told in message for message in check_ct(odd))


@pytest.mark.parametrize(
    "parts",
    [
        ("openkbp-hn", "test_pt265_ct.nii.gz"),
        ("enhance-pet-1446-neck", "enhance_pet_1446_neck_ct.nii.gz"),
        ("totalsegmentator-thorax-crops", "aorta_ct.nii.gz"),
        ("totalsegmentator-example", "ts_example_ct.nii.gz"),
        ("nsclc-radiogenomics-r01-001", "r01_001_ct.nii.gz"),
        ("crlm-ct-1004-dicom",),
        ("ge-head-tilt-dicom",),
    ],
)
def test_real_cts_pass_in_silence(shared, parts):
    assert check_ct(read_volume(shared("data", *parts))) == ()


def test_real_display_values_are_refused(shared):
    pitch = read_volume(shared("data", "ct-oblique-pitch", "ct_pitch.nii.gz"))
    with pytest.raises(ValueError, match="intensities of 0 to 255 are not Hounsfield units"):
        check_ct(pitch)
    assert len(check_ct(pitch, allow_non_hu=True)) == 1
