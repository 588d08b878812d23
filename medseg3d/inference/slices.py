"""Slices: a 2D network runs on every slice along one axis, or along several whose results are fused.

Shape legend: image_C... is (channels, *spatial axes), N slices, K classes, ``*plane`` the axes within a slice. A slice
of a volume is a 2D image; by the same code a slice of a 2D image is a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from medseg3d.inference.fusion import FUSIONS, fusion_of
from medseg3d.inference.slabs import Slab
from medseg3d.inference.strategy import one_image
from medseg3d.inference.streamed import Streamed, slice_slabs
from medseg3d.inference.sub_volumes import SubVolumes

Networks = Callable | Sequence[Callable] | Mapping[Any, Callable]


class Slices(Streamed):
    """A 2D network slice by slice, a MONAI ``Inferer`` by its call.

    Along one axis slices leave as they come, and hardly any memory is needed. Several axes are fused: "mean" is the
    mean of their softmax probabilities and keeps one sum of K x volume, of the type ``accumulate``; "majority" is the
    class that most axes vote for, a tie going to the lower class, and keeps one uint8 label map an axis but the last.
    Fused logits are the logarithm of the probabilities, or of the shares of votes. Results carry no gradient. For the
    fusion of one organ's masks with clean-up see :class:`medseg3d.inference.CoarseToFine`.

    Args:
        axes: one spatial axis or several; negative ones count from the end.
        neighbours: slices on each side that the network sees as further channels; beyond the ends of the image the
            last slice is repeated. Channels are those of slice -k first, those of slice +k last.
        roi_size: windows within a slice, one size or one for each axis of the plane in the image's order; an entry of
            0, less than 0 or None takes the whole axis, as None does for all.
        overlap: share of a window that neighbours have in common, in [0, 1).
        divisible: axes that are taken whole are padded to a multiple of it, and the padding is removed again.
        padding_mode: "constant", "reflect", "replicate" or "circular", for what is smaller than its window.
        padding_value: value of constant padding.
        batch_size: slices, and windows, that go through the network at once.
        fusion: "mean" or "majority".
        accumulate: torch.float32 or torch.bfloat16, the sums of "mean"; a sum over n axes in bfloat16 has a relative
            error of up to n * 2**-9.
        device: where axes are fused; by default where the network's output is.
        progress: called as ``progress(done, total)`` after each batch of slices, along all axes of one image.

    Raises:
        ValueError: on arguments out of range.
    """

    def __init__(
        self,
        axes: int | Sequence[int] = -1,
        neighbours: int = 0,
        roi_size: Sequence[int | None] | int | None = None,
        overlap: float = 0.5,
        divisible: int = 1,
        padding_mode: str = "constant",
        padding_value: float = 0.0,
        batch_size: int = 1,
        fusion: str = "mean",
        accumulate: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if not self.axes:
            raise ValueError("axes must name one spatial axis or more, got none")
        if neighbours < 0:
            raise ValueError(f"neighbours must be 0 or more, got {neighbours}")
        if divisible < 1:
            raise ValueError(f"divisible must be 1 or more, got {divisible}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        sizes = roi_size if isinstance(roi_size, Sequence) else (roi_size,)
        for size in sizes:
            if size is not None and size > 0 and size % divisible:
                raise ValueError(f"roi_size must be made of multiples of divisible={divisible}, got {roi_size}")
        self.neighbours = neighbours
        self.roi_size = roi_size
        self.divisible = divisible
        self.batch_size = batch_size
        self.fusion = fusion
        self.accumulate = accumulate
        self.device = None if device is None else torch.device(device)
        self.progress = progress
        self.windows: dict[str, Any] = {
            "overlap": overlap,
            "batch_size": batch_size,
            "padding_mode": padding_mode,
            "padding_value": padding_value,
            "accumulate": accumulate,
        }
        SubVolumes(1, **self.windows)  # its own checks of these

    def count(self, image_size: Sequence[int]) -> int:
        return sum(image_size[axis] for axis in self.axes)

    def blending(self, image_size: Sequence[int], channels: int) -> tuple[int, int]:
        """Several axes keep a sum of all classes, or a label map an axis but the last."""
        voxels = prod(image_size)
        kept = 0
        if len(self.axes) > 1:
            kept = voxels * (channels * self.accumulate.itemsize if self.fusion == "mean" else len(self.axes) - 1)
        return kept, voxels // image_size[self.axes[-1]]

    def example(self, image_BC: torch.Tensor) -> torch.Tensor:
        """A batch of slices from the middle third: the first ones may show air."""
        dim = 2 + self.axes[0] % (image_BC.dim() - 2)
        size = image_BC.shape[dim]
        return super().example(image_BC.narrow(dim, size // 3, max(1, size // 3)))

    def slabs(self, image_BC: torch.Tensor, network: Networks, *args: Any, **kwargs: Any) -> Iterator[Slab]:
        """The segmented image (1, C, *spatial), one slice a slab, along the only or the last of the axes.

        Args:
            image_BC: one image of two spatial axes or more.
            network: called on (N, (2 * neighbours + 1) * C, *plane) with ``args`` and ``kwargs``, returns logits
                (N, K, *plane). For several axes also a sequence of networks, one an axis in the order of ``axes``, or a
                mapping from the axis (from 0 on, or as text as ``nn.ModuleDict`` has it) to its network.

        Raises:
            ValueError: there is more than one image, ``axes`` are not among its axes, the networks are not as many as
                axes, or a network returns something else.
        """
        image = one_image(image_BC)
        axes = self.axes_of(image)
        networks = networks_of(network, axes)
        done, total = 0, sum(image.shape[1 + axis] for axis in axes)
        fused = fusion_of(self.fusion, len(axes), image.shape[1:], self.accumulate, self.device)
        for axis, own in zip(axes, networks, strict=True):
            whole = torch.arange(image.shape[1 + axis], device=image.device)  # so that no number is waited for
            for start in range(0, len(whole), self.batch_size):
                numbers = whole[start : start + self.batch_size]
                logits = self.planes(image, own, axis, numbers, *args, **kwargs)
                if axis == axes[-1]:
                    values = fused.finish(axis, start, logits) if len(axes) > 1 else logits.detach()
                    yield from slice_slabs(axis, start, values)
                else:
                    fused.add(axis, start, logits)
                done += len(numbers)
                if self.progress is not None:
                    self.progress(done, total)

    def planes(
        self, image_C: torch.Tensor, network: Callable, axis: int, numbers: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """What a network makes of slices along ``axis``: (N, K, *plane) float32.

        Args:
            image_C: (C, *spatial).
            network: as for ``slabs``, for this axis.
            numbers: (N,) of the slices.
        """
        stacks = self._stacks(image_C, axis, numbers)
        plane = stacks.shape[2:]
        window = self._window(plane)
        whole = all(size <= roi for size, roi in zip(plane, window, strict=True))
        in_plane = SubVolumes(window, blend="constant" if whole else "gaussian", **self.windows)
        logits = in_plane(stacks, network, *args, **kwargs)
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f"slices need one tensor of logits, but the network returns a {type(logits).__name__}: wrap it so that "
                "it returns the logits only"
            )
        if logits.shape[2:] != plane:
            raise ValueError(
                f"slices need logits at the image's resolution, but the network makes {tuple(logits.shape[2:])} of "
                f"slices of {tuple(plane)}"
            )
        return logits

    def axes_of(self, image_C: torch.Tensor) -> tuple[int, ...]:
        """The axes, from 0 on, for an image (C, *spatial)."""
        count = image_C.dim() - 1
        axes = tuple(axis + count if axis < 0 else axis for axis in self.axes)
        if len(set(axes)) < len(axes) or not all(0 <= axis < count for axis in axes):
            raise ValueError(f"axes must be different ones of the image's {count} spatial axes, got {self.axes}")
        return axes

    def _stacks(self, image: torch.Tensor, axis: int, numbers: torch.Tensor) -> torch.Tensor:
        """Slices with their neighbours as channels, (N, (2k + 1) * C, *plane)."""
        reach = torch.arange(-self.neighbours, self.neighbours + 1, device=numbers.device)
        wanted = (numbers[:, None] + reach).clamp(0, image.shape[1 + axis] - 1).flatten().to(image.device)
        taken = image.index_select(1 + axis, wanted).movedim(1 + axis, 0)
        return taken.reshape(len(numbers), -1, *taken.shape[2:])

    def _window(self, plane: Sequence[int]) -> tuple[int, ...]:
        """Size of a window; an axis that is taken whole is one window of the next size that the network can take."""
        sizes = tuple(self.roi_size) if isinstance(self.roi_size, Sequence) else (self.roi_size,) * len(plane)
        if len(sizes) != len(plane):
            raise ValueError(f"roi_size {sizes} is for {len(sizes)} axes, but a slice has {len(plane)}: {tuple(plane)}")
        rounded = [-(-size // self.divisible) * self.divisible for size in plane]
        return tuple(size if size and size > 0 else full for size, full in zip(sizes, rounded, strict=True))


def networks_of(network: Networks, axes: Sequence[int]) -> list[Callable]:
    """One network for each axis, from one for all, a sequence, or a mapping from the axis to its network.

    Raises:
        ValueError: they are not as many as axes, an axis has none, or what is given cannot be called.
    """
    if isinstance(network, Mapping | nn.ModuleDict):
        own = {str(axis): one for axis, one in network.items()}
        if sorted(own) != sorted(map(str, axes)):
            raise ValueError(f"there must be a network for each of the axes {sorted(axes)}, got them for {sorted(own)}")
        return [own[str(axis)] for axis in axes]
    if isinstance(network, Sequence | nn.ModuleList):
        if len(network) != len(axes):
            raise ValueError(f"there must be one network for all axes or one for each of {axes}, got {len(network)}")
        return list(network)
    if not callable(network):
        raise ValueError(f"a network must be callable, or a sequence or mapping of such, got {type(network).__name__}")
    return [network] * len(axes)
