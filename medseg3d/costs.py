"""What a scan costs in operations: a bundle's own strategy beside the two others.

Slices lose the third axis, downsampling loses detail, sub-volumes lose the long range, and each takes another number of
operations of the same kind of network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medseg3d.bundle import parts_of
from medseg3d.catalogue import find_bundle
from medseg3d.compare.operations import Operations
from medseg3d.errors import in_words
from medseg3d.inference import Downsampled, Slices, SubVolumes
from medseg3d.inference.strategy import Strategy
from medseg3d.recipe import STRATEGIES, WINDOW_EDGE, as_loaded, as_strategy
from medseg3d.volume import Volume

DIVISIBLE = 32  # of slices, so that networks of five levels take them


@dataclass(frozen=True)
class ScanCost:
    """What a strategy takes for one scan.

    Attributes:
        strategy: "sub-volumes", "slices" or "downsampled".
        own: whether it is the bundle's own, with its own network.
        window: voxels along each axis of what the network sees at once.
        windows: how often it runs.
        flops: of all of them; two for a multiply-add.
        parameters: of the network.
        of_noise: whether the network ran on random values to be counted, since its work depends on what it sees.
        refusal: why there are no numbers; empty if there are.
    """

    strategy: str
    own: bool
    window: tuple[int, ...] = ()
    windows: int = 0
    flops: int = 0
    parameters: int = 0
    of_noise: bool = False
    refusal: str = ""

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.flops // 2


def scan_costs(
    model: str | Path, size: Sequence[int], spacing: Sequence[float] = (), trust: bool = False
) -> list[ScanCost]:
    """The bundle's strategy on a scan, and the others with a network of the same arguments, in 2D for slices.

    The scan is taken to be full of body: where preprocessing crops to it, a real one costs less.

    Args:
        model: name of a model that ships, or the folder or zip of a bundle; its weights need not be there.
        size: voxels of the scan along each axis.
        spacing: mm along each axis; of no use for pictures.
        trust: see :func:`medseg3d.load_model`.

    Raises:
        ValueError: sizes that do not fit the bundle, or one whose work is known only once the scan is.
    """
    bundle = find_bundle(model)
    network, preprocessing, inferer = parts_of(model, trust)
    strategy = as_strategy(inferer)
    name = next((name for name, kind in STRATEGIES.items() if isinstance(strategy, kind)), None)
    if strategy is None or name is None:
        raise ValueError(f"how often the network of {bundle.name} runs is known only once it has seen the scan")
    if bundle.pictures:
        _check_axes(size, 2, f"{bundle.name} segments pictures")
        image = torch.zeros(1, int(bundle.input_format.get("num_channels", 3)), *size)
        return [_cost(name, True, strategy, network, image)]
    _check_axes(size, 3, f"{bundle.name} segments scans")
    _check_axes(spacing, 3, "the spacing of a scan")
    volume = Volume(np.zeros(tuple(size), np.float32), np.diag([*spacing, 1.0]))
    image = preprocessing({"image": as_loaded(volume)})["image"].as_tensor()[None]
    return [
        _cost(name, True, strategy, network, image) if other == name else _other(other, model, trust, strategy, image)
        for other in STRATEGIES
    ]


def _check_axes(numbers: Sequence[float], axes: int, what: str) -> None:
    if len(numbers) != axes or min(numbers) <= 0:
        raise ValueError(f"{what}: {axes} numbers above 0 are needed, got {' '.join(map(str, numbers)) or 'none'}")


def _cost(name: str, own: bool, strategy: Strategy, network: nn.Module, image_BC: torch.Tensor) -> ScanCost:
    operations = Operations(network, strategy)
    found = operations.count(image_BC)
    assert found is not None, "coarse to fine is none of the three"
    window = tuple(strategy.example(image_BC).shape[2:])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return ScanCost(name, own, window, *found, parameters, operations.of_noise)


def _other(name: str, model: str | Path, trust: bool, own: Strategy, image_BC: torch.Tensor) -> ScanCost:
    """The cost of a strategy that is not the bundle's ``own``."""
    strategy: Strategy
    if name == "slices":
        strategy = Slices(divisible=DIVISIBLE)
    else:
        strategy = Downsampled() if name == "downsampled" else SubVolumes(WINDOW_EDGE)
    changes = {"spatial_dims": 2 if name == "slices" else 3}
    if isinstance(own, Slices):
        changes["in_channels"] = image_BC.shape[1]
    try:
        network, *_ = parts_of(model, trust, **changes)
        return _cost(name, False, strategy, network, image_BC)
    except (ValueError, TypeError) as error:  # a network of one size, or of 2D alone
        return ScanCost(name, False, refusal=in_words(error))
