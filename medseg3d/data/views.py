"""Two views of one sub-volume, for self-supervised training: turned by quarters, with boxes cut out (Tang et al.,
"Self-supervised pre-training of Swin transformers for 3D medical image analysis", CVPR 2022, section 3.2).

Shape legend: images_BC... is (batch, channels, *spatial axes), two or three spatial axes; turns_B counts quarter turns;
a mask has the spatial axes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

QUARTERS = 4
PLANE = (2, 3)  # of images_BC...: the axial plane where the third spatial axis runs along the body, as in "RAS"
SMALLEST, LARGEST = 0.05, 0.25  # edge of a box as a share of the axis, as in the authors' code


def turn_at_random(images: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image turned by 0, 90, 180 or 270 degrees in the plane of its first two spatial axes.

    Returns:
        The turned images_BC..., and turns_B (int64, 0 to 3).

    Raises:
        ValueError: these two axes differ in length.
    """
    if images.dim() < 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"quarter turns need (batch, channels, *spatial) with two first spatial axes of one length, got "
            f"{tuple(images.shape)}: crop or pad to a square"
        )
    turns = torch.randint(QUARTERS, (len(images),), generator=generator)
    turned = [torch.rot90(image, int(n), PLANE) for image, n in zip(images.split(1), turns, strict=True)]
    return torch.cat(turned), turns.to(images.device)


def random_boxes(shape: Sequence[int], share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """A boolean mask of that shape: boxes at random places, as many as cover at least ``share`` of it."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    sizes = torch.tensor(shape)
    missing = share * mask.numel()
    while missing > 0:
        edges, places = torch.rand(2, len(shape), generator=generator)
        edges = (sizes * (SMALLEST + edges * (LARGEST - SMALLEST))).ceil()
        starts = (places * (sizes - edges + 1)).floor()
        box = mask[tuple(slice(int(a), int(a + n)) for a, n in zip(starts, edges, strict=True))]
        missing -= box.numel() - int(box.sum())
        box.fill_(True)
    return mask


def cut_out(images: torch.Tensor, share: float = 0.3, generator: torch.Generator | None = None) -> torch.Tensor:
    """Images with boxes of noise, and then boxes of another image of the batch, each over ``share`` of the voxels.

    Noise has the mean and deviation of its image, where the authors' lies between 0 and 1 as their intensities do. An
    image that draws itself as the other one keeps its own voxels there.

    Args:
        images: (B, C, *spatial), any float type; they are not changed.
        share: 0 to below 1.

    Raises:
        ValueError: share is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1, got {share}")
    result = images.clone()
    others = torch.randint(len(images), (len(images),), generator=generator).tolist()
    for number, other in enumerate(others):
        own = images[number]
        noise = torch.randn(own.shape, generator=generator).to(own) * own.std() + own.mean()
        noisy, foreign = (random_boxes(own.shape[1:], share, generator).to(own.device) for _ in range(2))
        result[number] = torch.where(noisy, noise, own)
        if other != number:
            result[number] = torch.where(foreign, images[other], result[number])
    return result
