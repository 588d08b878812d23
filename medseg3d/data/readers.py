"""Scans for MONAI's ``LoadImaged``, read as everywhere in medseg3d."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from medseg3d.io import read_volume
from medseg3d.volume import Volume


class VolumeReader(ImageReader):
    """MONAI's interface to :func:`medseg3d.io.read_volume`: every format that it knows, on the same grid as it has.

    MONAI's own readers need further packages for NRRD and MetaImage, and lay some DICOM series, such as those of a
    tilted gantry, on another grid than ``medseg3d predict`` does.
    """

    def verify_suffix(self, filename: Sequence[PathLike[str] | str] | PathLike[str] | str) -> bool:
        return True

    def read(self, data: Sequence[PathLike[str] | str] | PathLike[str] | str, **kwargs: Any) -> list[Volume]:
        """A volume for each file of a case, one a channel."""
        return [read_volume(path) for path in ensure_tuple(data)]

    def get_data(self, img: Sequence[Volume]) -> tuple[np.ndarray, dict[str, Any]]:
        """(D, H, W) of one file, (C, D, H, W) of several, and MONAI's fields; ValueError if their grids differ."""
        first = img[0]
        for other in img[1:]:
            if not first.geometry.coincides(other.geometry):
                raise ValueError(
                    f"the channels of a case must lie on one grid, got {first.geometry} and {other.geometry}: resample "
                    "one onto the other"
                )
        array = first.array if len(img) == 1 else np.stack([one.array for one in img])
        meta: dict[str, Any] = {
            MetaKeys.AFFINE: first.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: first.affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.array(first.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if len(img) == 1 else 0,
        }
        return array, meta
