#!/usr/bin/env python3
"""Make the sample CT: an average head and neck, by group-wise registration of OpenKBP's training cases.

    python scripts/make_sample_ct.py --dataset-dir DATA --output-dir medseg3d/data/sample

1. Take the training cases with all seven organs contoured, and of these the ones that show most of the head.
2. Bring the centroids of five organs together by similarities (generalised Procrustes analysis), then fit an affine
   map of each case to the average of all.
3. In rounds on finer and finer grids, register each case to the current average (symmetric-forces demons), take the
   mean deformation out of all, so that the average has the mean shape and not one patient's, and average again.
4. Average the HU values by a trimmed mean on the final grid, sharpen mildly, vote on the labels.

Where a case has no data the average stands in for it, so that nothing pulls there. Coordinates are ITK's: mm, LPS+.
The same inputs and versions give the same files to the bit.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from medseg3d.data.manifest import datalist, load_manifest
from medseg3d.io.labels import LabelTable

MANIFEST = "openkbp_headneck"
DESCRIPTION = b"medseg3d head-and-neck template"
STEM = "headneck_template"

AIR = -1000  # HU, outside the patient
BODY = 8  # our own label: the patient outside the seven organs
BRAINSTEM, LARYNX = 1, 6
LANDMARKS = (1, 3, 4, 6, 7)  # organs that are always contoured whole, unlike spinal cord and oesophagus
BELOW_LARYNX = 100.0  # mm of chest that a case must show
WIDEST = 580.0  # mm: the scanner cuts wider shoulders off
SLIVER = 50.0  # cm2: a slice with less of the patient shows only a piece of it
AROUND = 100.0  # mm of air put around a case, left, right, front and back

TISSUE = (-300.0, 300.0)  # HU that steer the registration
CONTOUR = 150.0  # added inside an organ's contour, so that organs meet even where CT shows no edge
AFFINE_SPACING, AFFINE_STEPS = 8.0, 60  # mm, iterations
ROUNDS = ((10.0, 60), (6.0, 50), (5.0, 40), (4.0, 25))  # mm, iterations of demons
STIFFNESS = 1.5  # voxels: standard deviation of the Gaussian that smooths the demons' displacements

SPACING = (2.0, 2.0, 2.5)  # mm, of the template
COVERED = 0.4  # part of the cases that must reach its top, and its bottom
MARGIN = 30.0  # mm of air around it
TRIMMED = 0.2  # part of the values left out at either end
SHARPEN = (2.5, 0.7)  # unsharp mask: mm, amount
VOTE_BLUR = 1.5  # mm
UNKNOWN = np.iinfo(np.int16).max  # where a case has no data; sorts last


@dataclass
class Case:
    """A patient, and the map from the template to the patient: x -> affine(x + field(x))."""

    name: str
    ct: sitk.Image  # HU, int16: the slices that show the patient, in air
    labels: sitk.Image  # int16, same grid; BODY inside the patient outside the organs
    steering: sitk.Image  # int16, same grid: what registration looks at
    landmarks: np.ndarray  # (5, 3): centroids
    affine: np.ndarray  # (4, 4)
    field: sitk.Image | None = None  # mm


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(args.threads)
    every = [read_case(item) for item in datalist(MANIFEST, args.dataset_dir, "train", complete=True)]
    cases = choose(every, args.cases)
    say("cases: " + ", ".join(case.name for case in cases))
    register(cases, args.rounds)
    names = {int(label): name for label, name in load_manifest(MANIFEST)["labels"].items()}
    grid = grid_of(*box(cases), SPACING)
    labels, body = vote(cases, grid, sorted(set(names) - {0}))
    hu = average_ct(cases, grid, body)
    write(args.output_dir, *cropped(grid, hu, labels, body), LabelTable(names))
    report(every, cases, labels, names)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dataset-dir", type=Path, required=True, help="folder that the manifest's paths start from")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the CT and its label map are written")
    parser.add_argument("--cases", type=int, default=16, help="number of patients (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=len(ROUNDS), help="rounds of registration (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of SimpleITK (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.cases < 2 or not 0 <= args.rounds <= len(ROUNDS):
        parser.error(f"--cases is at least 2 and --rounds 0 to {len(ROUNDS)}, got {args.cases} and {args.rounds}")
    return args


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---- the cases


def read_case(item: dict[str, Any]) -> Case:
    """A case of `datalist`, cropped to the patient and set in air; above and below it stays unknown."""
    ct = sitk.ReadImage(item["image"], sitk.sitkInt16)
    labels = sitk.ReadImage(item["label"], sitk.sitkInt16)
    marked = sitk.GetArrayFromImage(labels)
    body = np.stack([ndimage.binary_fill_holes(part) for part in sitk.GetArrayViewFromImage(ct) > AIR])
    marked[body & (marked == 0)] = BODY
    labels = image_like(labels, marked)
    body &= body.sum((1, 2), keepdims=True) * np.prod(ct.GetSpacing()[:2]) >= SLIVER * 100
    extent = ndimage.find_objects(body.astype(np.int8))[0][::-1]
    start, size = [s.start for s in extent], [s.stop - s.start for s in extent]
    air = [round(AROUND / ct.GetSpacing()[0]), round(AROUND / ct.GetSpacing()[1]), 0]
    ct = sitk.ConstantPad(sitk.RegionOfInterest(ct, size, start), air, air, AIR)
    labels = sitk.ConstantPad(sitk.RegionOfInterest(labels, size, start), air, air, 0)

    organs = sitk.Cast((labels > 0) & (labels < BODY), sitk.sitkInt16)
    steering = sitk.Clamp(ct, sitk.sitkInt16, *TISSUE) + organs * int(CONTOUR)
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(labels)
    landmarks = np.array([shape.GetCentroid(label) for label in LANDMARKS])
    return Case(item["case"], ct, labels, steering, landmarks, np.eye(4))


def coverage(case: Case) -> tuple[float, float, float]:
    """What a case shows, in mm: above the brainstem's centre, below the larynx's, and the patient's width."""
    spacing, size, bottom = case.ct.GetSpacing(), case.ct.GetSize(), case.ct.GetOrigin()[2]
    above = bottom + (size[2] - 1) * spacing[2] - case.landmarks[LANDMARKS.index(BRAINSTEM), 2]
    below = case.landmarks[LANDMARKS.index(LARYNX), 2] - bottom
    return above, below, size[0] * spacing[0] - 2 * AROUND


def choose(cases: Sequence[Case], count: int) -> list[Case]:
    """The `count` cases that show most of the head, among those that show the upper chest and both shoulders."""
    shown = {case.name: coverage(case) for case in cases}
    good = [case for case in cases if shown[case.name][1] >= BELOW_LARYNX and shown[case.name][2] <= WIDEST]
    if len(good) < count:
        raise ValueError(f"--cases must be at most {len(good)}, the cases with chest and shoulders, got {count}")
    return sorted(good, key=lambda case: -shown[case.name][0])[:count]


# ---- registration


def register(cases: Sequence[Case], rounds: int) -> None:
    """Find every case's map from the template; the mean of all maps is the identity."""
    align_landmarks(cases)
    average = average_steering(cases, grid_of(*box(cases), [AFFINE_SPACING] * 3))
    for case in cases:
        refine_affine(case, average)
    mean = np.mean([case.affine for case in cases], axis=0)
    for case in cases:
        case.affine = case.affine @ np.linalg.inv(mean)
    limits = box(cases)
    for spacing, iterations in ROUNDS[:rounds]:
        average = average_steering(cases, grid_of(*limits, [spacing] * 3))
        error = np.mean([refine_field(case, average, iterations) for case in cases])
        recentre(cases)
        say(f"round at {spacing:g} mm: root mean square difference {error**0.5:.1f} HU")


def align_landmarks(cases: Sequence[Case]) -> None:
    """Similarities by generalised Procrustes analysis (Gower 1975); the mean size and pose are the template's."""
    shapes = np.array([case.landmarks - case.landmarks.mean(0) for case in cases])
    size = np.linalg.norm(shapes, axis=(1, 2)).mean()
    mean = shapes.mean(0)
    for _ in range(10):
        mean = np.mean([shape @ similarity(shape, mean)[:3, :3].T for shape in shapes], axis=0)
        mean *= size / np.linalg.norm(mean)
    for case in cases:
        case.affine = similarity(mean, case.landmarks)


def similarity(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift (4, 4) that bring points (N, 3) closest to the target's (Umeyama 1991)."""
    a, b = points - points.mean(0), target - target.mean(0)
    u, strength, vt = np.linalg.svd(b.T @ a)
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])  # never a mirror image
    result = np.eye(4)
    result[:3, :3] = (u * sign) @ vt * (strength @ sign / (a**2).sum())
    result[:3, 3] = target.mean(0) - result[:3, :3] @ points.mean(0)
    return result


def box(cases: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
    """The template's corners (3,), mm: wide enough for every patient, as high and low as enough of them reach."""
    corners = []
    for case in cases:
        ends = np.array(list(np.ndindex(2, 2, 2))) * (np.array(case.ct.GetSize()) - 1)
        there = np.array([case.ct.TransformIndexToPhysicalPoint(end) for end in ends.tolist()])
        inverse = np.linalg.inv(case.affine)
        corners.append(there @ inverse[:3, :3].T + inverse[:3, 3])
    lows, highs = np.min(corners, axis=1), np.max(corners, axis=1)
    low, high = lows.min(0), highs.max(0)
    low[2], high[2] = np.quantile(lows[:, 2], COVERED), np.quantile(highs[:, 2], 1 - COVERED)
    return low, high


def grid_of(low: np.ndarray, high: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    grid = sitk.Image([int(n) for n in np.ceil((high - low) / spacing)], sitk.sitkInt16)
    grid.SetOrigin(low.tolist())
    grid.SetSpacing(list(spacing))
    return grid


def image_like(image: sitk.Image, array: np.ndarray) -> sitk.Image:
    """An image of the array, (k, j, i) or (k, j, i, 3), on the grid of another."""
    result = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    result.CopyInformation(image)
    return result


def pull(case: Case, image: sitk.Image, grid: sitk.Image, interpolator: int = sitk.sitkLinear) -> sitk.Image:
    """One of the case's images in the template's place, on `grid`; UNKNOWN where the case ends."""
    return sitk.Resample(image, grid, case_transform(case), interpolator, float(UNKNOWN), sitk.sitkInt16)


def case_transform(case: Case) -> sitk.Transform:
    affine = sitk.AffineTransform(case.affine[:3, :3].ravel().tolist(), case.affine[:3, 3].tolist())
    if case.field is None:
        return affine
    return sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(sitk.Image(case.field))])


def refine_affine(case: Case, average: sitk.Image) -> None:
    """Fit the whole affine map to the average of all cases, by least squares."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(4.0, 0.05, AFFINE_STEPS)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(case_transform(case), inPlace=False)
    found = method.Execute(average, sitk.Cast(case.steering, sitk.sitkFloat32))
    origin = np.array(found.TransformPoint((0.0, 0.0, 0.0)))
    for axis, unit in enumerate(np.eye(3).tolist()):
        case.affine[:3, axis] = np.array(found.TransformPoint(unit)) - origin
    case.affine[:3, 3] = origin


def refine_field(case: Case, average: sitk.Image, iterations: int) -> float:
    """Deform the case further towards the average; the mean squared difference before smoothing of the last step."""
    moving = pull(case, case.steering, average)
    known = sitk.Cast(moving != int(UNKNOWN), sitk.sitkFloat32)
    moving = sitk.Cast(moving, sitk.sitkFloat32) * known + average * (1 - known)
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfIterations(iterations)
    demons.SetStandardDeviations(STIFFNESS)
    step = demons.Execute(average, moving)
    case.field = step if case.field is None else composed(step, case.field)
    return float(demons.GetMetric())


def composed(first: sitk.Image, then: sitk.Image) -> sitk.Image:
    """The displacement field of x -> x + first(x), and then on by `then`; on the grid of `first`."""
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(first)
    resampler.SetTransform(sitk.DisplacementFieldTransform(sitk.Image(first)))
    resampler.UseNearestNeighborExtrapolatorOn()
    return first + resampler.Execute(then)


def recentre(cases: Sequence[Case]) -> None:
    """Take the mean deformation out of all cases, so that the template has their mean shape."""
    fields = [case.field for case in cases if case.field is not None]
    mean = image_like(fields[0], np.mean([sitk.GetArrayViewFromImage(field) for field in fields], axis=0))
    inverse = sitk.InvertDisplacementField(mean, maximumNumberOfIterations=30)
    for case, field in zip(cases, fields, strict=True):
        case.field = composed(inverse, field)


# ---- averages


def robust_mean(values: np.ndarray) -> np.ndarray:
    """The trimmed mean (...) of int16 values (N, ...) that are not UNKNOWN; AIR where none is known."""
    known = (values != UNKNOWN).sum(0)
    drop = (TRIMMED * known).astype(int)
    rank = np.arange(len(values)).reshape(-1, *[1] * known.ndim)
    kept = (rank >= drop) & (rank < known - drop)
    total = np.where(kept, np.sort(values, axis=0), 0).sum(0, dtype=np.float32)
    return np.where(known > 0, total / np.maximum(kept.sum(0), 1), AIR).astype(np.float32)


def robust_mean_image(images: Sequence[sitk.Image]) -> sitk.Image:
    """`robust_mean`, slice by slice to save memory."""
    slices = zip(*(sitk.GetArrayViewFromImage(image) for image in images), strict=True)
    return image_like(images[0], np.stack([robust_mean(np.stack(values)) for values in slices]))


def average_steering(cases: Sequence[Case], grid: sitk.Image) -> sitk.Image:
    return robust_mean_image([pull(case, case.steering, grid) for case in cases])


def average_ct(cases: Sequence[Case], grid: sitk.Image, body: np.ndarray) -> np.ndarray:
    """The template in HU, int16 (k, j, i): averaged, sharpened, in air."""
    mean = sitk.GetArrayFromImage(robust_mean_image([pull(case, case.ct, grid, sitk.sitkBSpline) for case in cases]))
    width, amount = SHARPEN
    mean += amount * (mean - ndimage.gaussian_filter(mean, width / np.array(SPACING[::-1])))
    return np.where(body, np.clip(np.rint(mean), AIR, None), AIR).astype(np.int16)


def vote(cases: Sequence[Case], grid: sitk.Image, organs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The label map, uint8, and the patient, bool (k, j, i).

    An organ is where the largest part of the cases has it, at least a part that gives it the cases' mean volume.
    """
    votes = [sitk.GetArrayFromImage(pull(case, case.labels, grid, sitk.sitkNearestNeighbor)) for case in cases]
    known = np.maximum(sum((one != UNKNOWN).astype(np.int16) for one in votes), 1)

    def share(chosen: Any) -> np.ndarray:
        count = sum(chosen(one).astype(np.float32) for one in votes)
        return ndimage.gaussian_filter(count / known, VOTE_BLUR / np.array(SPACING[::-1]))

    best = np.zeros(known.shape, np.float32)
    labels = np.zeros(known.shape, np.uint8)
    for organ in organs:
        part = share(lambda one, organ=organ: one == organ)
        voxels = round(np.mean([volume_ml(case, organ) for case in cases]) * 1000 / np.prod(SPACING))
        level = np.partition(part.ravel(), -voxels)[-voxels]
        labels[(part >= level) & (part > best)] = organ
        best = np.maximum(best, part)
    body, count = ndimage.label(share(lambda one: (one > 0) & (one <= BODY)) > 0.5)
    largest = 1 + int(np.argmax(np.bincount(body.ravel())[1:])) if count else 1
    return labels, body == largest


def volume_ml(case: Case, organ: int) -> float:
    voxels = np.count_nonzero(sitk.GetArrayViewFromImage(case.labels) == organ)
    return float(voxels * np.prod(case.labels.GetSpacing()) / 1000)


# ---- the files


def cropped(
    grid: sitk.Image, hu: np.ndarray, labels: np.ndarray, body: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both arrays as (i, j, k) with an even margin of air, and their affine (RAS+) with the centre at the origin."""
    extent = ndimage.find_objects(body.astype(np.int8))[0]
    air = [0, *(round(MARGIN / SPACING[axis]) for axis in (1, 0))]
    inside = tuple(slice(max(s.start - n, 0), s.stop + n) for s, n in zip(extent, air, strict=True))
    hu, labels = hu[inside].T, labels[inside].T
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(hu.shape) - 1) / 2
    return hu, labels, affine


def write(folder: Path, hu: np.ndarray, labels: np.ndarray, affine: np.ndarray, table: LabelTable) -> None:
    """Two compressed NIfTI files without a date, the label map with its names."""
    folder.mkdir(parents=True, exist_ok=True)
    for array, kind in ((hu, "ct"), (labels, "seg")):
        image = nib.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, "aligned")
        image.set_qform(affine, "aligned")
        image.header["descrip"] = DESCRIPTION
        if kind == "seg":
            image.header.extensions.append(nib.nifti1.Nifti1Extension(0, table.to_xml()))
        content = gzip.compress(image.to_bytes(), 9, mtime=0)
        (folder / f"{STEM}_{kind}.nii.gz").write_bytes(content)
        say(f"{STEM}_{kind}.nii.gz: {array.shape}, {len(content) / 1e6:.2f} MB")


def report(every: Sequence[Case], cases: Sequence[Case], labels: np.ndarray, names: dict[int, str]) -> None:
    """The organs' volumes beside the cases', as Markdown on stdout."""
    print(f"| organ | template, ml | {len(cases)} cases, mean (SD) | all {len(every)} cases, mean (SD) |")
    print("|---|---|---|---|")
    for organ in sorted(set(names) - {0}):
        ours = np.count_nonzero(labels == organ) * np.prod(SPACING) / 1000
        used, whole = (np.array([volume_ml(case, organ) for case in group]) for group in (cases, every))
        means = " | ".join(f"{group.mean():.1f} ({group.std():.1f})" for group in (used, whole))
        print(f"| {names[organ]} | {ours:.1f} | {means} |")


if __name__ == "__main__":
    main()
