"""The order of patch merging, on which Swin weights depend and which neither their names nor their shapes tell.

MONAI changed it in 1.5.0. The public files are older: loaded into MONAI 1.5 or later, they give wrong results without
any message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from medseg3d.layers.patches import MERGING_ORDERS, PatchMerging

CHANGED = (1, 5)  # the MONAI release in which "merging" took the order that it has now
_WEIGHT = ".reduction.weight"
_ORDER_OF_MONAI = {"PatchMerging": "merging", "PatchMergingV2": "mergingv2"}  # by class, from 1.5 on


def mergings(network: nn.Module) -> dict[str, nn.Module]:
    """Every module of the network that merges 2x2x2 tokens, by the key of its weight. In 2D there is but one order."""
    found = {}
    for path, module in network.named_modules():
        weight = getattr(getattr(module, "reduction", None), "weight", None)
        is_merging = isinstance(module, PatchMerging) or path.rpartition(".")[2] == "downsample"
        if is_merging and weight is not None and weight.dim() == 2 and weight.shape[1] == 4 * weight.shape[0]:
            found[f"{path}{_WEIGHT}".lstrip(".")] = module
    return found


def order_of(network: nn.Module) -> str | None:
    """The order in which the network merges patches; None if it does not, or nobody knows how."""
    orders = {_order(module) for module in mergings(network).values()}
    return orders.pop() if len(orders) == 1 else None


def set_order(network: nn.Module, order: str) -> None:
    for module in mergings(network).values():
        if isinstance(module, PatchMerging):
            module.order = order


class Order(NamedTuple):
    """The order that weights need, why, and whether that is a guess."""

    name: str
    reason: str
    guessed: bool = False


def settle_order(
    network: nn.Module, matched: Collection[str], record: Mapping[str, Any], wish: str, monai_version: str | None
) -> Order | None:
    """The order that weights need; None if none of them merges patches in 3D.

    Args:
        network: the network that they go into.
        matched: its keys that they fill.
        record: what the file says about itself.
        wish: "auto", or the order that the caller knows.
        monai_version: the release that trained them, if the caller knows.

    Raises:
        ValueError: unknown order or version, or the network cannot merge in the order that the weights need.
    """
    if wish != "auto" and wish not in MERGING_ORDERS:
        raise ValueError(f"merging_order must be 'auto' or one of {', '.join(MERGING_ORDERS)}, got {wish!r}")
    release = None if monai_version is None else _release(monai_version)
    matched = set(matched)
    filled = [module for key, module in mergings(network).items() if key in matched]
    if not filled:
        return None
    now = order_of(network)
    order = _needed(now, record.get("merging_order"), wish, release)
    foreign = [module for module in filled if not isinstance(module, PatchMerging)]
    if foreign and order.name != now and (now is not None or wish == "auto"):
        raise ValueError(
            f"these weights need patches merged in the order {order.name!r} ({order.reason}), and the "
            f"{type(foreign[0]).__name__} of this {type(network).__name__} merges them in the order "
            f"{now or 'unknown'!r}: it would give wrong results with them, without any message. Load them into "
            "medseg3d.networks.SwinUNETR, which knows all orders, or say with merging_order in which they were trained"
        )
    return order


def _needed(now: str | None, recorded: str | None, wish: str, release: tuple[int, int] | None) -> Order:
    if recorded is not None and recorded not in MERGING_ORDERS:
        raise ValueError(f"the file records {recorded!r}, of patch merging only {', '.join(MERGING_ORDERS)} are known")
    if wish != "auto":
        contrary = f", though the file records {recorded!r}" if recorded not in (None, wish) else ""
        return Order(wish, f"as asked{contrary}")
    if recorded is not None:
        return Order(recorded, "as the file records")
    if now == "mergingv2":
        if release is not None and release < (1, 0):
            raise ValueError("MONAI 0.9 had another 'mergingv2', which no network here has: the weights are of no use")
        return Order(now, "as the network was built, since the file does not tell", guessed=release is None)
    if release is not None:
        name = "merging" if release >= CHANGED else "legacy"
        return Order(name, "that of MONAI {}.{}".format(*release))
    reason = (
        "the file does not tell, and it is that of MONAI 0.9 to 1.4 and of all public files; if MONAI 1.5 or later "
        "trained these weights, pass merging_order='merging'"
    )
    return Order("legacy", reason, guessed=True)


def _order(module: nn.Module) -> str | None:
    return module.order if isinstance(module, PatchMerging) else _ORDER_OF_MONAI.get(type(module).__name__)


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"\s*(\d+)\.(\d+)", str(version))
    if found is None:
        raise ValueError(f"monai_version must be a release such as '1.3.2', got {version!r}")
    return int(found[1]), int(found[2])
