"""Example slices: the reference, and each model's outlines with what they miss and what they should not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medseg3d.compare.contenders import numbers_of, renumbered
from medseg3d.compare.result import Comparison
from medseg3d.data.datasets import Case
from medseg3d.io import LabelTable, read_label_table, read_volume
from medseg3d.report.drawing import Color, draw_errors, draw_plane, mark_plane
from medseg3d.report.evaluation import read_label_map
from medseg3d.report.planes import AXIAL, CORONAL, ENDS, Scene, View, cut, profiles
from medseg3d.report.significance import mean_of_known
from medseg3d.volume import Volume

WIDTH = 400  # of a picture, in pixels
_HIGHEST = 1.25  # height over width, at most
_WINDOW = (40.0, 400.0)  # centre and width, HU


@dataclass(frozen=True)
class Row:
    """A plane of a case: its caption, and pictures by who drew them, the reference first."""

    caption: str
    pictures: Mapping[str, Image.Image]


@dataclass(frozen=True)
class Example:
    """A case: why it was chosen, its planes, and the colours of its organs."""

    title: str
    rows: tuple[Row, ...]


def examples(comparison: Comparison) -> Iterator[Example]:
    """The case whose mean Dice is the median and the one with the lowest; none where no case was finished."""
    for case, why in _chosen(comparison).items():
        yield _example(comparison, case, why)


def colors_of(comparison: Comparison) -> dict[int, Color]:
    """Number of an organ in the references -> its colour."""
    return dict(LabelTable(comparison.labels).colors)


def _chosen(comparison: Comparison) -> dict[Case, str]:
    """Cases with why they are shown, the better one first."""
    values_MPO = comparison.values("dice")[..., np.isin(comparison.organs, comparison.shared)]
    of_patients = mean_of_known(mean_of_known(values_MPO).T)
    done = {case for _, case in comparison.predictions}
    first = {case.patient: case for case in reversed(comparison.cases) if case.name in done}
    dice = zip(comparison.patients, of_patients.tolist(), strict=True)
    known = sorted((value, patient) for patient, value in dice if patient in first and np.isfinite(value))
    if not known:
        return {}
    median, lowest = (first[known[n][1]] for n in (len(known) // 2, 0))
    return {lowest: "the only one"} if len(known) == 1 else {median: "a typical case", lowest: "the hardest case"}


def _example(comparison: Comparison, case: Case, why: str) -> Example:
    assert case.label is not None
    image = read_volume(case.images[0])
    reference = read_label_map(case.label).reoriented(image.orientation)
    if case.annotated is not None:
        reference = renumbered(reference, {n: n for n in comparison.labels if n in case.annotated})
    predicted = {
        model: _on_reference(read_volume(path), path, comparison)
        for (model, name), path in comparison.predictions.items()
        if name == case.name
    }
    scene = Scene(reference, image, comparison.labels)
    colors = colors_of(comparison)
    if case.annotated is not None:
        colors = {number: color for number, color in colors.items() if number in case.annotated}
    planes = [(AXIAL, scene.cells[2], "axial, most organs")]
    wrong = _most_errors(scene, predicted, list(colors))
    planes += [] if wrong in (None, scene.cells[2]) else [(AXIAL, wrong, "axial, most errors")]
    planes += [(CORONAL, scene.cells[1], "coronal")]
    return Example(f"{case.name}: {why}", tuple(_row(scene, predicted, colors, *plane) for plane in planes))


def _on_reference(segmentation: Volume, path: object, comparison: Comparison) -> Volume:
    table = read_label_table(str(path))
    assert table is not None, "segmentations are written with their names"
    return renumbered(segmentation, numbers_of(table.names, comparison.labels))


def _most_errors(scene: Scene, predicted: Mapping[str, Volume], numbers: list[int]) -> int | None:
    """The axial cell in which all models together have most voxels wrong."""
    reference = np.where(np.isin(scene.segmentation.array, numbers), scene.segmentation.array, 0)
    counts = np.zeros(scene.grid.cells(2))
    for volume in predicted.values():
        found = np.where(np.isin(volume.array, numbers), volume.array, 0)
        wrong = scene.segmentation.with_array((found != reference).astype(np.uint8))
        for profile in profiles(wrong, scene.grid, [1]).values():
            counts += profile.counts[2] * (profile.voxels / max(1, profile.counts[2].sum()))
    return int(counts.argmax()) if counts.any() else None


def _row(
    scene: Scene, predicted: Mapping[str, Volume], colors: Mapping[int, Color], view: View, cell: int, what: str
) -> Row:
    box = scene.plane_box(view, cell)
    across, down = ((float(box[0, axis]), float(box[1, axis])) for axis in (view.across, view.down))
    scale = (across[1] - across[0]) / WIDTH
    height = round(min((down[1] - down[0]) / scale, _HIGHEST * WIDTH))
    middle = sum(down) / 2
    down = (middle - height * scale / 2, middle + height * scale / 2)
    plane = cut(scene, view, cell, across, down)
    size = (WIDTH, height)
    pictures = {"reference": mark_plane(draw_plane(plane, size, colors, _WINDOW), view, "", scale)}
    for model, volume in predicted.items():
        own = cut(scene.showing(volume), view, cell, across, down)
        pictures[model] = draw_errors(own, plane.label_map, size, colors, _WINDOW)
    position = scene.grid.position(view.normal, cell)
    return Row(f"{what} ({ENDS[view.normal][position < 0]} {abs(position):.0f} mm)", pictures)
