"""A small patient: an ellipsoid of soft tissue in air with one organ on the right and one on the left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from medseg3d.volume import Volume

LABELS = {1: "parotid_right", 2: "parotid_left", 3: "larynx"}  # there is no larynx
COLORS = {1: (255, 0, 0), 2: (0, 0, 255), 3: (0, 255, 0)}


@dataclass(frozen=True)
class Patient:
    image: Volume
    segmentation: Volume
    labels: dict[int, str]
    colors: dict[int, tuple[int, int, int]]

    def reoriented(self, codes: str) -> Patient:
        return Patient(self.image.reoriented(codes), self.segmentation.reoriented(codes), self.labels, self.colors)


@pytest.fixture(scope="session")
def patient():
    spacing = np.array([2.0, 2.5, 5.0])
    shape = np.array([60, 56, 24])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing  # the world's origin in the middle; RAS
    x, y, z = (affine[n, n] * np.arange(shape[n]) + affine[n, 3] for n in range(3))
    x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
    body = (x / 50) ** 2 + (y / 60) ** 2 + (z / 55) ** 2 < 1
    image = np.where(body, 40, -1000).astype(np.int16)
    organs = np.zeros(shape, np.uint8)
    organs[(np.abs(x - 30) < 9) & (np.abs(y - 10) < 12) & (np.abs(z) < 15)] = 1  # +x is the patient's right
    organs[(np.abs(x + 30) < 7) & (np.abs(y - 10) < 12) & (np.abs(z) < 15)] = 2
    return Patient(Volume(image, affine), Volume(organs, affine), LABELS, COLORS)
