"""Public files whose names differ from the networks' by more than a beginning."""

from __future__ import annotations

import re
from collections.abc import Collection

_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(.+)")
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.(.+)")
_PERCEPTRON = ((".mlp.linear1.", ".mlp.0."), (".mlp.linear2.", ".mlp.3."))  # plain names of mlp.fc1 and mlp.fc2
_OLD_CONVOLUTION = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)")
_OLD_MASK_HEAD = re.compile(r"(roi_heads\.mask_head)\.mask_fcn(\d+)\.(weight|bias)")
_AROUND = {"patch_embed.proj.": "features.0.0.", "patch_embed.norm.": "features.0.2.", "head.fc.": "head."}


def translate(file: Collection[str], network: Collection[str]) -> dict[str, str]:
    """Plain name in the file -> the network's name for it, of those names that change; empty if no rule is for both."""
    ordered = dict.fromkeys(file).keys(), dict.fromkeys(network).keys()
    return next((names for rule in _RULES if (names := rule(*ordered))), {})


def _swin(file: Collection[str], network: Collection[str]) -> dict[str, str]:
    """Swin of its authors or of timm into the layout of torchvision.

    The authors put patch merging at the end of a stage, timm at the beginning of the next one.
    """
    if "patch_embed.proj.weight" not in file or "features.0.0.weight" not in network:
        return {}
    of_timm = not any(name.startswith("layers.0.downsample.") for name in file)
    names = {}
    for name in file:
        if found := _BLOCK.fullmatch(name):
            target = f"features.{2 * int(found[1]) + 1}.{found[2]}"
            for theirs, ours in _PERCEPTRON:
                target = target.replace(theirs, ours)
            names[name] = target
        elif found := _MERGING.fullmatch(name):
            names[name] = f"features.{2 * int(found[1]) + (0 if of_timm else 2)}.{found[2]}"
        else:
            for theirs, ours in _AROUND.items():
                if name.startswith(theirs):
                    names[name] = ours + name.removeprefix(theirs)
    return names


def _convolutional(file: Collection[str], network: Collection[str]) -> dict[str, str]:
    """VGG, torchvision's AlexNet or CaffeNet into a network that has the layers by Caffe's names: FCN, DeconvNet.

    torchvision's layers are numbered; convolutions and norms follow each other in the same order.
    """
    if "fc6.weight" not in network or not any(name.startswith("features.") for name in file):
        return {}
    with_norms = any(name.endswith("running_mean") for name in file)
    trunk = [name for name in network if name.startswith(("conv", "bn") if with_norms else "conv")]
    theirs = [layer for layer in _layers(file) if layer.startswith("features.")]
    ours = [layer for layer in _layers(trunk) if not layer.startswith("bnfc")]
    fully_connected = [layer for layer in _layers(file) if layer.startswith("classifier.")]
    if any(layer.rpartition(".")[2].isdigit() for layer in theirs):
        theirs.sort(key=lambda layer: int(layer.rpartition(".")[2]))
    pairs = dict(zip(theirs, ours, strict=False)) | dict(zip(fully_connected, ("fc6", "fc7", "fc8"), strict=False))
    parts = {name: name.rpartition(".") for name in file}
    return {name: f"{pairs[layer]}.{kind}" for name, (layer, _, kind) in parts.items() if layer in pairs}


def _layers(names: Collection[str]) -> list[str]:
    """Layers that have weights, in the order of the names."""
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _detector(file: Collection[str], network: Collection[str]) -> dict[str, str]:
    """torchvision's detectors of 2021 into those of now: a convolution is one of several, which may have norms."""
    if "rpn.head.conv.weight" not in file or "rpn.head.conv.0.0.weight" not in network:
        return {}
    names = {}
    for name in file:
        if found := _OLD_CONVOLUTION.fullmatch(name):
            names[name] = f"{found[1]}.0.{found[2]}"
        elif found := _OLD_MASK_HEAD.fullmatch(name):
            names[name] = f"{found[1]}.{int(found[2]) - 1}.0.{found[3]}"
    names |= {f"rpn.head.conv.{kind}": f"rpn.head.conv.0.0.{kind}" for kind in ("weight", "bias")}
    return names


_RULES = (_swin, _convolutional, _detector)
