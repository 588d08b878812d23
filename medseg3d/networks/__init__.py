"""The networks, one paper a file. They need torch and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from medseg3d.networks.ssl_head import SSLHead
from medseg3d.networks.swin_unetr import SwinUNETR
from medseg3d.networks.unet import UNet, cicek_unet, ronneberger_unet
from medseg3d.networks.unetr import UNETR
from medseg3d.networks.vnet import VNet, milletari_vnet

__all__ = [
    "NETWORKS",
    "UNETR",
    "SSLHead",
    "SwinUNETR",
    "UNet",
    "VNet",
    "build",
    "cicek_unet",
    "milletari_vnet",
    "ronneberger_unet",
]

NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "vnet": VNet,
    "unetr": UNETR,
    "swin_unetr": SwinUNETR,
}


def build(name: str, **arguments: Any) -> nn.Module:
    """The network of that name in ``NETWORKS``, built with ``arguments``.

    Raises:
        ValueError: there is no such network; the message lists those that there are.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; medseg3d has {', '.join(NETWORKS)}")
    return NETWORKS[name](**arguments)
