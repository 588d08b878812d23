"""A made-up data set that a bundle can train on in seconds, and a piece of a real CT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg3d.data.manifest import load_manifest
from medseg3d.data.sample import sample_ct, sample_labels
from medseg3d.io import write_image, write_label_image
from tests import tiny_pictures

SPACING = (4.0, 4.0, 2.5)


@dataclass(frozen=True)
class DataSet:
    folder: Path
    manifest: Path

    @property
    def overrides(self) -> dict[str, str]:
        return {"dataset_dir": str(self.folder), "manifest": str(self.manifest)}


def write_nifti(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def headneck_manifest(path, cases):
    """The headneck manifest with other cases: (patient, split, image, label, contoured), files beside the manifest."""
    return write_cases(path, "openkbp_headneck", cases)


def write_cases(path, name, cases):
    keys = ("patient", "split", "image", "label", "contoured")
    manifest = load_manifest(name) | {"cases": [dict(zip(keys, case, strict=True)) for case in cases]}
    path.write_text(json.dumps(manifest))
    return DataSet(path.parent, path)


def phantom(seed):
    """A body of water in air with seven blocks of growing density: CT and label map, (44, 44, 40) voxels."""
    random = np.random.default_rng(seed)
    d, h = np.ogrid[-1:1:44j, -1:1:44j]
    body = np.repeat((d**2 + h**2 < 0.8)[..., None], 40, axis=2)
    ct = np.where(body, random.normal(0, 20, body.shape), -1000.0)
    labels = np.zeros(body.shape, np.uint8)
    for label in range(1, 8):
        start = 8 + random.integers(0, 4) + 3 * label
        labels[start : start + 3, 16:28, 10:30] = label
    ct[labels > 0] += 60.0 * labels[labels > 0]
    return ct.astype(np.int16), labels


@pytest.fixture(scope="session")
def write_manifest():
    return headneck_manifest


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Two patients a split; the second of each split lacks contours of oesophagus and larynx."""
    folder = tmp_path_factory.mktemp("phantoms")
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1])
    cases = []
    for seed, split in enumerate(2 * ("train", "validation", "test")):
        ct, labels = phantom(seed)
        contoured = [1, 2, 3, 4, 7] if seed >= 3 else [1, 2, 3, 4, 5, 6, 7]
        labels[~np.isin(labels, contoured)] = 0
        image = write_nifti(folder / f"p{seed}_ct.nii.gz", ct, affine).name
        label = write_nifti(folder / f"p{seed}_oar.nii.gz", labels, affine).name
        cases.append((f"p{seed}", split, image, label, contoured))
    return headneck_manifest(folder / "manifest.json", cases)


@pytest.fixture(scope="session")
def picture_phantoms(tmp_path_factory):
    """Two made-up pictures of discs a split, and their numbered objects."""
    folder = tmp_path_factory.mktemp("picture phantoms")
    cases = []
    for n, split in enumerate(2 * ("train", "validation", "test")):
        image = write_image(folder / f"p{n}_image.png", np.roll(tiny_pictures.picture(), n, axis=1)).name
        label = write_label_image(folder / f"p{n}_labels.png", np.roll(tiny_pictures.numbered(), n, axis=1)).name
        cases.append((f"p{n}", split, image, label, [1]))
    return write_cases(folder / "manifest.json", "dsb2018_nuclei", cases)


@pytest.fixture
def neck(tmp_path, shared):
    """The slices with the jaw, of the sample CT or of a real one: a folder with ct/neck.nii.gz and neck_seg.nii.gz."""
    files = (sample_ct(), sample_labels())
    if not files[0].is_file():
        files = (shared("data", "openkbp-hn", f"test_pt265_{kind}.nii.gz") for kind in ("ct", "oar"))
    ct, labels = (nib.load(file) for file in files)
    slices = np.flatnonzero(np.isin(labels.dataobj, (3, 4, 7)).any(axis=(0, 1)))
    margin = int(40 / ct.header.get_zooms()[2])
    part = (slice(None), slice(None), slice(max(slices[0] - margin, 0), slices[-1] + margin))
    (tmp_path / "neck" / "ct").mkdir(parents=True)
    nib.save(ct.slicer[part], tmp_path / "neck" / "ct" / "neck.nii.gz")
    nib.save(labels.slicer[part], tmp_path / "neck" / "neck_seg.nii.gz")
    return tmp_path / "neck"
