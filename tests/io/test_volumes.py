import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest

from medseg3d.io import (
    LabelTable,
    as_volume,
    nifti,
    read_label_table,
    read_volume,
    write_label_map,
    write_volume,
)
from medseg3d.volume import Volume

TABLE = LabelTable({1: "left", 3: "right"}, {3: (1, 128, 255)})
SUFFIXES = ["nii.gz", "nii", "nrrd", "mha"]


# Label maps


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_label_map_is_small_and_named(tmp_path, segmentation, suffix):
    source = Volume(segmentation.array, segmentation.affine, {"path": "/clinic/jane/ct.nii.gz"})
    path = write_label_map(source, tmp_path / "out" / f"seg.{suffix}", TABLE)
    again = read_volume(path)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again.array, segmentation.array)
    assert again.geometry.same_as(segmentation.geometry)
    assert read_label_table(path) == TABLE
    assert sorted(file.name for file in path.parent.iterdir()) == ["seg.labels.json", f"seg.{suffix}"]
    assert json.loads((path.parent / "seg.labels.json").read_text())["source"] == "ct.nii.gz"


def test_names_travel_in_the_nifti_header_alone(tmp_path, segmentation):
    path = write_label_map(segmentation, tmp_path / "seg.nii.gz", TABLE)
    (tmp_path / "seg.labels.json").unlink()
    assert read_label_table(path) == TABLE
    extension = nib.load(path).header.extensions[0]
    assert extension.get_code() == 0
    assert LabelTable.from_xml(extension.get_content()) == TABLE
    assert ElementTree.fromstring(extension.get_content()).tag == "CaretExtension"  # to the last byte well formed


def test_simpleitk_reads_a_label_map_with_an_extension(tmp_path):
    import SimpleITK as sitk

    labels = np.zeros((4, 5, 6), int)
    labels[1, 2, 3] = 3
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    image = sitk.ReadImage(str(write_label_map(Volume(labels, affine), tmp_path / "seg.nii.gz", TABLE)))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, labels)
    assert image.GetSpacing() == (1, 1, 2)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_uint16_above_255_labels(tmp_path, segmentation, suffix):
    labels = segmentation.array * 100
    path = write_label_map(segmentation.with_array(labels), tmp_path / f"seg.{suffix}", {100: "a", 300: "b"})
    assert read_volume(path).dtype == np.uint16
    np.testing.assert_array_equal(read_volume(path).array, labels)


def test_the_sidecar_names_the_labels_of_files_without_a_table(tmp_path, segmentation):
    write_volume(segmentation, tmp_path / "a.nii.gz")
    assert read_label_table(tmp_path / "a.nii.gz") is None
    (tmp_path / "a.labels.json").write_text('{"1": "spleen"}')
    assert read_label_table(tmp_path / "a.nii.gz") == read_label_table(tmp_path / "a.labels.json")
    assert read_label_table(tmp_path / "a.nii.gz").names == {1: "spleen"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.float32([0.5]), "whole numbers, got float32"),
        ([-1], "0 to 65535, got -1"),
        ([70000], "0 to 65535"),
        ([2], r"labels \[2\] are in the segmentation but not in the table"),
    ],
)
def test_label_maps_that_break_the_rules_are_refused(tmp_path, labels, message):
    volume = Volume(np.broadcast_to(np.asarray(labels), (2, 2, 2)), np.eye(4))
    with pytest.raises(ValueError, match=message):
        write_label_map(volume, tmp_path / "seg.nii.gz", TABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["seg", "seg.png", "seg.dcm", "seg.mhd"])
def test_unknown_suffixes_are_refused(tmp_path, segmentation, name):
    with pytest.raises(ValueError, match=r"must be one of \.nii\.gz"):
        write_label_map(segmentation, tmp_path / name, TABLE)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_layout_in_memory_does_not_matter(tmp_path, order):
    labels = np.random.default_rng(0).integers(0, 2, (40, 37, 35)).transpose(order)
    path = write_label_map(Volume(labels, np.eye(4)), tmp_path / "seg.nii.gz", {1: "a"})
    np.testing.assert_array_equal(nib.load(path).dataobj, labels)


# What may go wrong while writing


def sabotaged(monkeypatch, harm):
    write = nifti.write_nifti

    def harmed(path, **arguments):
        written = write(path, **arguments)
        harm(path)
        return written

    monkeypatch.setattr(nifti, "write_nifti", harmed)


def test_ctrl_c_leaves_nothing(tmp_path, segmentation, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    sabotaged(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_label_map(segmentation, tmp_path / "seg.nii.gz", TABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["truncate", "voxel", "affine", "label table"])
def test_a_file_that_reads_back_differently_is_an_error_and_removed(tmp_path, segmentation, monkeypatch, harm):
    def damage(path):
        content = bytearray(path.read_bytes())
        if harm == "truncate":
            del content[-10:]
        elif harm == "voxel":
            content[-1] ^= 1
        elif harm == "affine":
            content[282] ^= 0x40
        else:
            at = content.index(b"left")
            content[at : at + 4] = b"LEFT"
        path.write_bytes(content)

    sabotaged(monkeypatch, damage)
    with pytest.raises(OSError, match=r"seg\.nii was written but (reads back as|cannot be read)"):
        write_label_map(segmentation, tmp_path / "seg.nii", TABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["cut", 0, 0.5, -9, -1])
def test_a_compressed_file_that_is_not_what_was_written_is_removed(tmp_path, segmentation, monkeypatch, at):
    def damage(path):
        content = bytearray(path.read_bytes())
        if at == "cut":
            del content[-1:]
        else:
            content[int(at * len(content)) if at == 0.5 else at] ^= 1
        path.write_bytes(content)

    sabotaged(monkeypatch, damage)
    with pytest.raises(OSError, match=r"seg\.nii\.gz was written but (reads back as|cannot be read)"):
        write_label_map(segmentation, tmp_path / "seg.nii.gz", TABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize(
    ("offset", "value", "what"),
    [
        (42, struct.pack("<h", 6), r"\(6, 6, 5\)"),
        (70, struct.pack("<h", 256), "other voxels"),  # int8
        (292, struct.pack("<f", 500), "500"),
        (400, None, "other label names"),
    ],
)
def test_a_header_that_was_composed_wrongly_is_noticed(
    tmp_path, segmentation, monkeypatch, suffix, offset, value, what
):
    """What is wrong from the beginning has the right checksum; the file's own header tells."""
    compose = nifti._head_bytes

    def harmed(header, extension):
        head = compose(header, extension)
        return head[:offset] + value + head[offset + len(value) :] if value else head.replace(b"left", b"LEFT")

    monkeypatch.setattr(nifti, "_head_bytes", harmed)
    with pytest.raises(OSError, match=f"reads back as .*{what}"):
        write_label_map(segmentation, tmp_path / f"seg.{suffix}", TABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk(tmp_path, suffix):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        noise = np.random.default_rng(0).integers(0, 200, (64, 64, 60))
        table = {label: f"label {label}" for label in range(1, 200)}
        with pytest.raises(OSError, match="no space left on device; free some space") as caught:
            write_label_map(Volume(noise, np.eye(4)), disk / f"seg.{suffix}", table)
        assert caught.value.errno == errno.ENOSPC
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_no_permission(tmp_path, segmentation):
    tmp_path.chmod(0o500)
    root = os.geteuid() == 0
    try:
        if root:  # who may write anywhere
            os.seteuid(65534)
        with pytest.raises(PermissionError, match="choose a folder that you may write to"):
            write_label_map(segmentation, tmp_path / "seg.nii.gz", TABLE)
    finally:
        if root:
            os.seteuid(0)
    assert not list(tmp_path.iterdir())


# Reading by content, and images in memory


def test_unknown_files_are_refused_with_the_formats(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"notes\.txt is of no format that medseg3d reads; it reads \.nii"):
        read_volume(tmp_path / "notes.txt")


def test_every_input_type_gives_the_same_volume(tmp_path, ct):
    path = write_volume(ct, tmp_path / "ct.nii.gz")
    image = nib.load(path)
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    inputs = (path, str(path), image, nib.Nifti1Image(ct.array, ct.affine, header), (ct.array, ct.affine), ct)
    for one in inputs:
        volume = as_volume(one)
        np.testing.assert_array_equal(volume.array, ct.array)
        np.testing.assert_allclose(volume.affine, ct.affine, atol=1e-6)
        assert volume.dtype == np.int16
    assert as_volume(ct) is ct
    assert as_volume(image).header["format"] == "nifti"


def test_tensors_of_bfloat16_which_numpy_does_not_know(ct):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(ct.array.astype(np.float32)).bfloat16()
    meta = pytest.importorskip("monai.data").MetaTensor(tensor, affine=torch.from_numpy(ct.affine.copy()))
    for image in ((tensor, ct.affine), meta):
        volume = as_volume(image)
        assert volume.dtype == np.float32 and volume.geometry.same_as(ct.geometry)
        np.testing.assert_array_equal(volume.array, tensor.float().numpy())


def test_a_metatensor_loses_its_channel_and_keeps_its_space(ct):
    torch = pytest.importorskip("torch")
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    tensor = MetaTensor(torch.from_numpy(ct.array.copy()), affine=torch.from_numpy(ct.affine.copy()))
    for one in (tensor, tensor[None]):
        np.testing.assert_array_equal(as_volume(one).array, ct.array)
        np.testing.assert_allclose(as_volume(one).affine, ct.affine)
    tensor.meta["space"] = "LPS"
    np.testing.assert_allclose(as_volume(tensor).affine, np.diag([-1, -1, 1, 1]) @ ct.affine)
    with pytest.raises(ValueError, match="the MetaTensor has 2 channels"):
        as_volume(torch.stack([tensor, tensor]))


def test_a_grid_far_from_the_origin_is_written(tmp_path):
    """NIfTI's header has float32, which is two micrometres off there."""
    affine = np.diag([0.7, 0.7, 3, 1.0])
    affine[:3, 3] = 40000.0019, -40000.0018, 40000.0017
    path = write_volume(Volume(np.zeros((4, 5, 6), np.int16), affine), tmp_path / "far.nii.gz")
    np.testing.assert_allclose(read_volume(path).affine, affine, atol=3e-3)


def test_what_is_no_image_is_refused(ct):
    with pytest.raises(TypeError, match="cannot make a volume of ndarray; give a path"):
        as_volume(ct.array)
    with pytest.raises(ValueError, match="is 2D"):
        as_volume((np.zeros((3, 3)), np.eye(4)))
    with pytest.raises(ValueError, match="spacing"):
        as_volume((ct.array, np.diag([1, 0, 1, 1])))


def test_importing_io_is_light():
    code = "import sys, medseg3d.io, medseg3d.io.inputs; print(sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert out.returncode == 0, out.stderr
    for heavy in ("torch", "monai", "nibabel", "SimpleITK", "pydicom"):
        assert f"'{heavy}'" not in out.stdout
