"""What goes into a segmentation and what comes out: a scan that was read, and the label map that a model made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg3d.io import LabelTable, write_label_map, write_volume
from medseg3d.report.preview import preview, write_preview
from medseg3d.report.statistics import statistics
from medseg3d.volume import Volume


@dataclass(frozen=True)
class Segmentation:
    """What a model made of one scan.

    Attributes:
        segmentation: label map on the scan's own grid, uint8 or uint16.
        image: the scan as it was read.
        table: names and colours of the labels.
        model_name: name and version of the model.
        warnings: what the user should know, one sentence each.
        seconds: time of each stage.
        uncertainty: float32 in [0, 1] on the same grid, where it was asked for: how sure the network itself was, before
            post-processing.
        crop: where windows were laid over a box only: that box on the network's grid, and the share left out.
    """

    segmentation: Volume
    image: Volume
    table: LabelTable
    model_name: str
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    uncertainty: Volume | None = None
    crop: Mapping[str, Any] | None = None

    @property
    def labels(self) -> dict[int, str]:
        """Label number -> name."""
        return dict(self.table.names)

    def save(self, path: str | Path) -> Path:
        """Write the label map; the suffix chooses the format (.nii.gz, .nii, .nrrd, .mha). Names travel with it."""
        return write_label_map(self.segmentation, path, self.table)

    def save_mask(self, label: int | str, path: str | Path) -> Path:
        """Write where one label, by its number or name, is 1 and all else 0, uint8, as :meth:`save` writes them all.

        Raises:
            ValueError: there is no such label.
        """
        numbers = [number for number, name in self.table.names.items() if label in (number, name)]
        if not numbers:
            raise ValueError(f"there is no label {label!r}; there are {', '.join(self.table.names.values())}")
        mask = np.isin(self.segmentation.array, numbers)
        return write_volume(self.segmentation.with_array(mask.astype(np.uint8)), path)

    def save_uncertainty(self, path: str | Path) -> Path:
        """Write the map of uncertainty, float32, as :meth:`save` writes labels.

        Raises:
            ValueError: there is none, since the model was not loaded to make one.
        """
        if self.uncertainty is None:
            raise ValueError("no uncertainty was made: load the model with uncertainty='entropy' or 'margin'")
        return write_volume(self.uncertainty, path)

    def statistics(self) -> dict[str, Any]:
        """Volume, intensities and place of every organ, see :func:`medseg3d.report.statistics.statistics`."""
        return statistics(self.segmentation, self.image, self.labels)

    def preview(self, path: str | Path, title: str | None = None) -> Path:
        """Write a PNG of three planes through the segmentation with a legend."""
        name = title or Path(str(self.image.header.get("path", "scan"))).name
        picture = preview(self.segmentation, self.image, self.labels, self.table.colors, name, self.model_name)
        return write_preview(path, picture)


@dataclass(frozen=True)
class Scan:
    """A scan that was read and found fit for a model.

    Attributes:
        volume: its voxels and grid.
        warnings: what the user should know, one sentence each.
        seconds: time of each stage so far.
    """

    volume: Volume
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
