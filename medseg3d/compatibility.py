"""Old MONAI bundles on a new MONAI: what changed its name or its meaning, and how it is taken up here.

Every change is reported in words. Source: MONAI's release notes and issues 7093, 8284, 8300.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

# Arguments that a network no longer takes.
_REMOVED = {"SwinUNETR": {"img_size": "the network now takes any size that is a multiple of 32"}}
# Arguments that have another name.
_RENAMED = {
    "UNETR": {"pos_embed": "proj_type"},
    "ViT": {"pos_embed": "proj_type"},
    "ViTAutoEnc": {"pos_embed": "proj_type"},
}
# The voxel (d, h, w) of each 2x2x2 block that makes up each group of channels, in MONAI 0.9 to 1.4.
_LEGACY_MERGING = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


def adapt_network(config: Mapping[str, Any], monai_version: str) -> tuple[dict[str, Any], list[str]]:
    """A network's config that today's MONAI can build with the meaning it had, and what was changed.

    Args:
        config: ``network_def`` of a bundle, with its ``_target_``.
        monai_version: the version that the bundle's metadata names; weights were trained with it.
    """
    adapted = dict(config)
    name = str(config.get("_target_", "")).rsplit(".", 1)[-1]
    notes = []
    for argument, reason in _REMOVED.get(name, {}).items():
        if argument in adapted:
            value = adapted.pop(argument)
            notes.append(f"{name}: dropped the argument {argument}={value}, which MONAI no longer has; {reason}")
    for old, new in _RENAMED.get(name, {}).items():
        if old in adapted:
            adapted[new] = adapted.pop(old)
            notes.append(f"{name}: the argument {old} is now called {new}")
    old_merging = adapted.get("downsample", "merging") == "merging" and _release(monai_version) < (1, 5)
    if name == "SwinUNETR" and old_merging:
        adapted["downsample"] = legacy_merging()
        notes.append(
            f"SwinUNETR: its weights are of MONAI {monai_version or '(version unknown)'}, whose patch merging took the "
            "neighbours in another order than MONAI 1.5 and later; that order is used"
        )
    return adapted, notes


def legacy_merging() -> type:
    """Patch merging with the order of MONAI 0.9 to 1.4, with which every public Swin UNETR checkpoint was trained."""
    from monai.networks.nets.swin_unetr import PatchMergingV2

    class LegacyPatchMerging(PatchMergingV2):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dim() != 5:  # in 2D the order never changed
                return super().forward(x)
            d, h, w = x.shape[1:4]
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
            x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in _LEGACY_MERGING], dim=-1)
            return self.reduction(self.norm(x))

    return LegacyPatchMerging


def _release(version: str) -> tuple[int, int]:
    """Major and minor number, as numbers: "1.10.0" is later than "1.6.1". (0, 0) if it cannot be read."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
