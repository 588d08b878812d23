"""How public files name what the networks here name otherwise, and which of their names may go unused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

# Parts of a name that only tell who wrapped the network: DistributedDataParallel, torch.compile.
WRAPPERS = {"module", "_orig_mod"}
# What a class around a network calls it (Lightning modules, trainers).
HOLDERS = ("model.", "net.", "network.")
# One spelling for what releases and repositories spell in several ways.
SPELLINGS = (
    (re.compile(r"^swin_vit\."), "swinViT."),  # early runs of the public pre-training code
    (re.compile(r"\.mlp\.fc([12])\."), r".mlp.linear\1."),  # model_swinvit.pt
    (re.compile(r"^(encoder\.layers\d+\.\d+)\.0\."), r"\1."),  # disruptive autoencoders: one list more in each stage
)
ENCODERS = (
    "swinViT.",
    "vit.",
    "backbone.body.",
    "backbone.",
)  # where the networks here keep the encoders that are trained alone


@dataclass(frozen=True)
class Layout:
    """Names that begin with `file` in the file begin with `network` in the network."""

    file: str
    network: str


LAYOUTS = (
    Layout("", ""),  # the same names: whole networks, and encoders that were saved with their prefix
    Layout("", "swinViT."),  # model_swinvit.pt, or a SwinTransformer of its own, into SwinUNETR and SSLHead
    Layout("encoder.", "swinViT."),  # a disruptive autoencoder into SwinUNETR and SSLHead
    Layout("", "vit."),  # ViT and ViTAutoEnc into UNETR
    Layout("swinViT.", ""),  # the encoder of SwinUNETR and SSLHead into a SwinTransformer
    Layout("encoder.", ""),  # a disruptive autoencoder into a SwinTransformer
    Layout("vit.", ""),  # the encoder of UNETR into a ViT
    Layout("", "backbone."),  # a classifier into the FCN that torchvision has
    Layout("", "backbone.body."),  # a classifier into a detector on its pyramid
)

HEADS = ("score_",)  # what FCN adds to a classifier; in a file of one there is none

_PRETRAINING = "a part of the pre-training that the network has no use for"
_CLASSIFIER = "of a classifier; a network that segments has none"
# Left over in a file without harm to any result: pattern of the name (without the layout's prefix), and why.
UNUSED_IN_FILE = (
    (r"(.*\.)?patch_embedding\.cls_token", "MONAI 0.6 to 0.8 stored a class token and did not use it"),
    (r"(.*\.)?blocks\.\d+\.(cross_attn|norm_cross_attn)\..*", "MONAI 1.4 and 1.5 stored it and did not use it"),
    (r".*\.relative_position_index", "the network makes its own from the window size"),
    (r".*\.attn_mask", "the network makes its own from the window size"),
    (r".*\.num_batches_tracked", "a counter of training steps"),
    (r"(rotation_head|contrastive_head)\..*", _PRETRAINING),
    (r"(conv|convTrans3d)\.(\d+\.)?(weight|bias)", _PRETRAINING),
    (r"conv3d_transpose(_1)?\.(weight|bias)", _PRETRAINING),
    (r"mask_token", _PRETRAINING),
    (r"(swinViT\.)?norm\.(weight|bias)", "the pre-training's last norm; Swin UNETR has none"),
    (r"(vit\.)?(cls_token|classification_head\..*)", _CLASSIFIER),
    (r"(fc|fc8)\.(weight|bias)", _CLASSIFIER),
    (r"aux(_classifier|\d)\..*", "a second head for training; the network was built without it"),
    (r"upscore\w*\.weight", "an upsampling of another stride; the network has its own"),
)
# MONAI before 0.9 gave every residual block a shortcut convolution, used or not.
_SHORTCUT = re.compile(r"(.*)\.(conv3\.conv|norm3)\.[^.]+")
_UNUSED_SHORTCUT = "MONAI before 0.9 stored a shortcut convolution here and did not use it"
# Missing in a file without harm: the same for names of the network.
UNUSED_IN_NETWORK = (
    (r"(.*\.)?norm_cross_attn\.(weight|bias)", "never used; MONAI stores it from 1.4 on"),
    (r".*\.relative_position_index", "the network makes it from the window size"),
    (r".*\.num_batches_tracked", "a counter of training steps"),
    (r"upscore\w*\.weight", "bilinear interpolation as it was built"),
)


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Plain name -> key: without the traces of wrappers and holders, in one spelling, unless two keys would meet."""
    keys = list(keys)
    names = _distinct([_unwrapped(key) for key in keys]) or keys
    while (shorter := _without_holder(names)) is not None:
        names = shorter
    return dict(zip(_distinct([_respelled(name) for name in names]) or names, keys, strict=True))


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _without_holder(names: list[str]) -> list[str] | None:
    """The names without the holder that most of them begin with; None if there is no such holder."""
    for holder in HOLDERS:
        if 2 * sum(name.startswith(holder) for name in names) > len(names):
            return _distinct([name.removeprefix(holder) for name in names])
    return None


def _respelled(name: str) -> str:
    for pattern, spelling in SPELLINGS:
        name = pattern.sub(spelling, name)
    return name


def _distinct(names: list[str]) -> list[str] | None:
    return names if len(set(names)) == len(names) and all(names) else None


def place(file: Mapping[str, torch.Tensor], network: Mapping[str, torch.Tensor]) -> tuple[Layout, dict[str, str]]:
    """The layout that gives the network most, with plain name in the network -> plain name in the file.

    Args:
        file: tensors by plain name.
        network: the same of the network.
    """
    best, best_gain = (LAYOUTS[0], dict[str, str]()), (-1, -1)
    for layout in LAYOUTS:
        placed: dict[str, str] = {}
        for name in file:
            if name.startswith(layout.file):
                target = layout.network + name.removeprefix(layout.file)
                if target not in network and not layout.file:
                    target = name  # pre-training heads stand beside the encoder, under their own names
                if target in network:
                    placed.setdefault(target, name)
        fitting = [target for target, name in placed.items() if file[name].shape == network[target].shape]
        gain = (sum(network[target].numel() for target in fitting), len(placed))
        if gain > best_gain:
            best, best_gain = (layout, placed), gain
    return best


def why_unused_in_file(name: str, layout: Layout, file: Mapping[str, torch.Tensor]) -> str:
    """Why the network may do without the tensor of this plain name; "" if no reason is known."""
    if not name.startswith(layout.file):
        return f"beside {layout.file}*, which is all that this network has a place for"
    name = name.removeprefix(layout.file)
    for pattern, reason in UNUSED_IN_FILE:
        if re.fullmatch(pattern, name):
            return reason
    shortcut = _SHORTCUT.fullmatch(name)
    convolution = file.get(f"{layout.file}{shortcut[1]}.conv3.conv.weight") if shortcut else None
    if convolution is not None and convolution.shape[0] == convolution.shape[1]:
        return _UNUSED_SHORTCUT
    return ""


def why_unused_in_network(name: str) -> str:
    """Why the file may lack the tensor of this plain name; "" if no reason is known."""
    return next((reason for pattern, reason in UNUSED_IN_NETWORK if re.fullmatch(pattern, name)), "")
