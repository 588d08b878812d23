"""Networks that bundles name in MONAI: ours of the same name where it can stand in, and today's meaning of old configs.

medseg3d's SwinUNETR, UNETR and VNet take MONAI's keywords and weights and give its numbers in less time and memory.
Every change is reported in words. Source: MONAI's release notes and issues 7093, 8284, 8300.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import nn

from medseg3d.layers.patches import PatchMerging
from medseg3d.networks import UNETR, SwinUNETR, VNet

_OWN = {network.__name__: network for network in (SwinUNETR, UNETR, VNet)}
# The ways to name a network of MONAI; a class of the same name elsewhere is somebody else's.
_IN_MONAI = re.compile(r"\$?monai\.networks\.nets\.(?:\w+\.)?(\w+)|(\w+)")
# Arguments that a network no longer takes.
_REMOVED = {"SwinUNETR": {"img_size": "the network now takes any size that is a multiple of 32"}}
# Arguments that have another name.
_RENAMED = {
    "UNETR": {"pos_embed": "proj_type"},
    "ViT": {"pos_embed": "proj_type"},
    "ViTAutoEnc": {"pos_embed": "proj_type"},
}


def adapt_network(
    config: Mapping[str, Any], monai_version: str, prefer_own: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """A network's config that can be built today with the meaning it had, and what was changed.

    Configs of networks that are not MONAI's, medseg3d's among them, are left alone.

    Args:
        config: ``network_def`` of a bundle, with its ``_target_``.
        monai_version: the version that the bundle's metadata names; weights were trained with it.
        prefer_own: whether medseg3d's class stands in for MONAI's if it has all the arguments that the config names.
    """
    adapted, notes = dict(config), list[str]()
    match = _IN_MONAI.fullmatch(str(config.get("_target_", "")))
    if match is None:
        return adapted, notes
    name = match[1] or match[2]
    for argument, reason in _REMOVED.get(name, {}).items():
        if argument in adapted:
            value = adapted.pop(argument)
            notes.append(f"{name}: dropped the argument {argument}={value}, which MONAI no longer has; {reason}")
    for old, new in _RENAMED.get(name, {}).items():
        if old in adapted:
            adapted[new] = adapted.pop(old)
            notes.append(f"{name}: the argument {old} is now called {new}")
    own = prefer_own and name in _OWN and _arguments(adapted) <= signature(_OWN[name]).parameters.keys()
    if name == "SwinUNETR" and adapted.get("downsample", "merging") == "merging" and _release(monai_version) < (1, 5):
        adapted["downsample"] = "legacy" if own else legacy_merging
        notes.append(
            f"SwinUNETR: its weights are of MONAI {monai_version or '(version unknown)'}, whose patch merging took the "
            "neighbours in another order than MONAI 1.5 and later; that order is used"
        )
    if own:
        adapted["_target_"] = f"medseg3d.networks.{name}"
        notes.append(f"{name}: medseg3d's own network is used, which takes the same weights")
    return adapted, notes


def legacy_merging(dim: int, norm_layer: Callable[[int], nn.LayerNorm], spatial_dims: int) -> PatchMerging:
    """What MONAI's own SwinUNETR takes as ``downsample`` to merge patches in the order of MONAI 0.9 to 1.4."""
    merging = PatchMerging(dim, spatial_dims, order="legacy")
    merging.norm = norm_layer(2**spatial_dims * dim)
    return merging


def _arguments(config: Mapping[str, Any]) -> set[str]:
    """The names that go to the class; those such as ``_target_`` are for MONAI's parser."""
    return {name for name in config if not name.startswith("_")}


def _release(version: str) -> tuple[int, int]:
    """Major and minor number, as numbers: "1.10.0" is later than "1.6.1". (0, 0) if it cannot be read."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
