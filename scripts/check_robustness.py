"""How a model bears what users do to scans: mirrored patients, other voxel sizes, cropped fields of view.

Each variant of each unseen case is segmented on its own grid and compared with the reference moved along with it.
Prints a table of mean Dice per variant and organ, as it stands in the model card.

    python scripts/check_robustness.py --dataset-dir DIR [--model headneck_ct_unet] [--split test] [--cases 6]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

import medseg3d as ms
from medseg3d.data.manifest import datalist
from medseg3d.data.transforms import labels_by_interpolation
from medseg3d.geometry import Frame
from medseg3d.metrics import dice
from medseg3d.volume import Volume

Pair = tuple[Volume, Volume]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset-dir", required=True)
    parser.add_argument("--manifest", default="openkbp_headneck")
    parser.add_argument("--model", default="headneck_ct_unet")
    parser.add_argument("--split", default="test")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model = ms.load_model(args.model, args.device)
    cases = datalist(args.manifest, args.dataset_dir, args.split, complete=True)[: args.cases]
    print("| variant | mean |", " | ".join(model.labels.values()), "|")
    print("|---|---|", "---|" * len(model.labels), sep="")
    for name, change in VARIANTS.items():
        scores = [_dice(model, *change(ms.read_volume(case["image"]), ms.read_volume(case["label"]))) for case in cases]
        by_organ = np.nanmean(scores, axis=0)
        print(
            f"| {name} | {np.nanmean(by_organ):.3f} |",
            " | ".join(f"{score:.3f}" for score in by_organ),
            "|",
            flush=True,
        )


def _dice(model: ms.Segmenter, image: Volume, reference: Volume) -> list[float]:
    """Dice per organ; NaN where the variant has cut an organ out of the field of view."""
    predicted = model.predict(image).segmentation.array
    measured = dice(predicted, reference.array, model.labels)
    return [measured[label] if (reference.array == label).any() else np.nan for label in model.labels]


def unchanged(image: Volume, labels: Volume) -> Pair:
    return image, labels


def mirrored_patient(image: Volume, labels: Volume) -> Pair:
    """Voxels mirrored left to right while the header stays: what was the left parotid is now the right one."""
    axis = next(n for n, code in enumerate(image.orientation) if code in "LR")
    swapped = labels.array.copy()
    swapped[labels.array == 3], swapped[labels.array == 4] = 4, 3
    return image.with_array(np.flip(image.array, axis)), labels.with_array(np.flip(swapped, axis))


def stored_as(codes: str) -> Callable[[Volume, Volume], Pair]:
    """The same patient with the file's axes in another order and direction."""
    return lambda image, labels: (image.reoriented(codes), labels.reoriented(codes))


def voxels_of(*spacing: float) -> Callable[[Volume, Volume], Pair]:
    """The same field of view at another voxel size."""

    def change(image: Volume, labels: Volume) -> Pair:
        frame: Frame = image.geometry.resample(spacing=spacing)
        masks = [labels.array == label for label in range(8)]
        return image.moved(frame), Volume(labels_by_interpolation(frame, masks), frame.target.affine)

    return change


def cropped_to(start: tuple[float, float, float], stop: tuple[float, float, float]) -> Callable[[Volume, Volume], Pair]:
    """A field of view from ``start`` to ``stop``, each a share of the volume's axes (the dataset is stored LPS)."""

    def change(image: Volume, labels: Volume) -> Pair:
        size = np.array(image.shape)
        frame = image.geometry.crop((size * start).astype(int), np.ceil(size * stop).astype(int))
        return image.moved(frame), labels.moved(frame, labels=True)

    return change


VARIANTS: dict[str, Callable[[Volume, Volume], Pair]] = {
    "as it is": unchanged,
    "stored SAR": stored_as("SAR"),
    "patient mirrored": mirrored_patient,
    "voxels 2 x 2 x 2 mm": voxels_of(2, 2, 2),
    "voxels 1 x 1 x 5 mm": voxels_of(1, 1, 5),
    "voxels 6 x 6 x 6 mm": voxels_of(6, 6, 6),
    "upper half of the scan": cropped_to((0, 0, 0.5), (1, 1, 1)),
    "lower half of the scan": cropped_to((0, 0, 0), (1, 1, 0.5)),
    "sides cut off (middle 30 %)": cropped_to((0.35, 0, 0), (0.65, 1, 1)),
}

if __name__ == "__main__":
    main()
