"""What the 2D backbones share: the check of their input, and a network that gives its inner maps.

Shape legend: ``x_BCHW`` is (batch, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from medseg3d.layers.derived import is_symbolic


class IntermediateLayerGetter(nn.ModuleDict):
    """The children of a network up to the last one that is asked for, one behind the other, with some of their maps.

    As torchvision has it: keys of the state_dict are the network's own, what lies behind the last map is left out, and
    the children are shared with the network, not copied. It suits networks whose ``forward`` runs their children in the
    order in which they were defined.

    Args:
        model: the network.
        return_layers: name of a child -> the name under which its map is returned.

    Raises:
        ValueError: a name is no child of the network.
    """

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str]) -> None:
        children = dict(model.named_children())
        if unknown := [name for name in return_layers if name not in children]:
            raise ValueError(
                f"{type(model).__name__} has no layer {', '.join(unknown)}; its layers are {', '.join(children)}"
            )
        names = list(children)
        end = 1 + max((names.index(name) for name in return_layers), default=-1)
        super().__init__({name: children[name] for name in names[:end]})
        self.return_layers = dict(return_layers)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """``x_BCHW`` -> the maps, in the order of the network."""
        maps: dict[str, torch.Tensor] = {}
        returned = False
        for name, layer in self.items():
            # An activation in place must not write over a map that is returned.
            x = layer(x.clone() if returned and getattr(layer, "inplace", False) else x)
            returned = name in self.return_layers
            if returned:
                maps[self.return_layers[name]] = x
        return maps


def check_images(x: torch.Tensor, channels: int, network: str, smallest: int = 1) -> None:
    """ValueError unless ``x`` is (B, channels, H, W) with sides of at least ``smallest``; exporters see no check."""
    if is_symbolic(x):
        return
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{network} takes 2 spatial axes, images as (batch, {channels}, height, width), got a shape of "
            f"{tuple(x.shape)}"
        )
    if min(x.shape[2:]) < smallest:
        raise ValueError(
            f"{network} takes images of at least {smallest}x{smallest} pixels, got {x.shape[2]}x{x.shape[3]}: pad or "
            "enlarge them"
        )
