"""Small volumes and DICOM series that the reader and writer tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medseg3d.volume import Volume

OBLIQUE = np.array([[1.5, 0.1, -0.2, -30.25], [-0.1, 1.6, 0.15, 12.5], [0.25, -0.15, 2.5, 400.125], [0, 0, 0, 1]])


@pytest.fixture
def ct():
    """A volume with a different value in every voxel, on an oblique, slightly sheared, anisotropic grid."""
    array = np.arange(7 * 6 * 5, dtype=np.int16).reshape(7, 6, 5, order="F") - 100
    return Volume(array, OBLIQUE)


@pytest.fixture
def segmentation(ct):
    labels = np.zeros(ct.shape, dtype=np.int64)
    labels[1:3, 2:4, 1:4] = 1
    labels[4:6, 1:5, 2] = 3
    return ct.with_array(labels)


@pytest.fixture
def dicom_slice():
    """make(folder, number, position, ...) -> the path of one CT slice, written with pydicom."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    def make(folder: Path, number: int, position, pixels=None, orientation=(1, 0, 0, 0, 1, 0), series="1.2.3", **tags):
        folder.mkdir(parents=True, exist_ok=True)
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID, dataset.Modality, dataset.SeriesDescription = series, "CT", f"series {series}"
        dataset.ImageType, dataset.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], number
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(position), list(orientation)
        dataset.PixelSpacing, dataset.SliceThickness = [0.75, 0.5], 2.0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        for tag, value in tags.items():
            dataset.add(value) if isinstance(value, pydicom.DataElement) else setattr(dataset, tag, value)
        if pixels is None:
            pixels = np.arange(12).reshape(3, 4) + 100 * number
        if "Rows" not in dataset:
            dataset.Rows, dataset.Columns = pixels.shape
        dataset.PixelData = np.asarray(pixels, dtype="<i2" if dataset.PixelRepresentation else "<u2").tobytes()
        path = folder / f"{len(list(folder.iterdir())):04d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path

    return make
