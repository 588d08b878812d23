"""The networks, one paper a file. They need torch and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from medseg3d.layers.derived import plain_pytorch
from medseg3d.networks.backbones.swin_classifier import SwinClassifier
from medseg3d.networks.deconvnet import DeconvNet
from medseg3d.networks.detection.mask_rcnn import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from medseg3d.networks.detection.upsnet import UPSNet
from medseg3d.networks.fcn import FCN
from medseg3d.networks.fcn_resnet import FCNResNet, fcn_resnet50, fcn_resnet101
from medseg3d.networks.ssl_head import SSLHead, SSLReconstruction
from medseg3d.networks.swin_unetr import SwinUNETR
from medseg3d.networks.unet import UNet, cicek_unet, ronneberger_unet
from medseg3d.networks.unetr import UNETR
from medseg3d.networks.vnet import VNet, milletari_vnet

__all__ = [
    "FCN",
    "NETWORKS",
    "UNETR",
    "DeconvNet",
    "FCNResNet",
    "MaskRCNN",
    "SSLHead",
    "SSLReconstruction",
    "SwinClassifier",
    "SwinUNETR",
    "UNet",
    "UPSNet",
    "VNet",
    "build",
    "cicek_unet",
    "fcn_resnet50",
    "fcn_resnet101",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "milletari_vnet",
    "plain_pytorch",
    "ronneberger_unet",
]

NETWORKS: dict[str, type[nn.Module]] = {
    "fcn": FCN,
    "fcn_resnet": FCNResNet,
    "deconvnet": DeconvNet,
    "unet": UNet,
    "vnet": VNet,
    "unetr": UNETR,
    "swin_unetr": SwinUNETR,
    "swin": SwinClassifier,
    "mask_rcnn": MaskRCNN,
    "upsnet": UPSNet,
}


def build(name: str, **arguments: Any) -> nn.Module:
    """The network of that name in ``NETWORKS``, built with ``arguments``.

    Raises:
        ValueError: there is no such network; the message lists those that there are.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; medseg3d has {', '.join(NETWORKS)}")
    return NETWORKS[name](**arguments)
