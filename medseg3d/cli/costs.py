"""The verb ``flops``: operations of a network, of a bundle on a scan, and by formula."""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medseg3d.catalogue import find_bundle
from medseg3d.cli.terminal import DONE, UsageError, asked_to_trust
from medseg3d.resources import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from medseg3d.flops import Count, Reach

CONVENTION = (
    "A multiply-add (MAC) is 2 FLOPs. Convolutions and matrix products count; biases, norms, activations, softmax, "
    "pooling and interpolation do not."
)
Rows = list[dict[str, Any]]


def flops(args: argparse.Namespace) -> int:
    """Count operations, or work them out."""
    if args.what is None and args.model is None:
        raise UsageError(
            "say what to count, before any option: a network's name, conv, attention or patches; or a bundle with -m"
        )
    if args.what is not None and args.model is not None:
        raise UsageError(f"either {args.what} or the bundle {args.model} is counted: leave {args.what} or -m out")
    if args.model is not None:
        report, rows, lines = _of_scan(args)
    elif args.what in FORMULAS:
        report, rows, lines = FORMULAS[args.what](args)
    else:
        report, rows, lines = _of_network(args)
    if args.json:
        print(json.dumps({"convention": CONVENTION, **report}, indent=2))
    elif args.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    else:
        print("\n".join([*lines, "", CONVENTION]))
    return DONE


def _cell(value: Any) -> Any:
    """Sizes in one cell of a table."""
    return " x ".join(map(str, value)) if isinstance(value, tuple | list) else value


# A network


def _of_network(args: argparse.Namespace) -> tuple[dict[str, Any], Rows, list[str]]:
    import torch

    from medseg3d.flops import count_operations, receptive_field
    from medseg3d.networks import NETWORKS

    if args.what not in NETWORKS:
        raise UsageError(
            f"{args.what!r} is neither a network ({', '.join(NETWORKS)}) nor a formula ({', '.join(FORMULAS)})"
            + did_you_mean(args.what, (*NETWORKS, *FORMULAS))
        )
    _require(args, size="of its input, such as --size 96 96 96")
    if min(args.size) < 1:
        raise UsageError(f"--size takes voxels, 1 or more along each axis; got {' '.join(map(str, args.size))}")
    arguments = _arguments(args.what, NETWORKS[args.what], args)
    try:
        with torch.device("meta"):
            network = NETWORKS[args.what](**arguments)
    except TypeError as error:  # such as a number where a list belongs
        raise UsageError(f"{args.what} cannot be made with {' '.join(args.set or ())}: {error}") from error
    shape = (1, _channels(network, arguments), *_size_for(network, args.size))
    reach = None
    try:
        count = count_operations(network, shape)
        reach = receptive_field(network, shape)
    except NotImplementedError:  # its work depends on what it sees, and on the values of its weights
        count = count_operations(NETWORKS[args.what](**arguments), shape)
    rows = [_row_of_module(row, count) for row in count.by_module(args.depth)]
    report = {"network": args.what, "arguments": arguments, **_numbers(count, reach), "modules": rows}
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return report, rows, [f"{args.what}({given})", *_summary(count, reach), "", *_table(rows)]


def _arguments(name: str, network: Callable, args: argparse.Namespace) -> dict[str, Any]:
    """What --set gives, and usual values of what the class needs beyond that."""
    given: dict[str, Any] = {}
    for pair in args.set or ():
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, such as --set feature_size=48; got {pair!r}")
        try:
            given[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[key] = text  # a word
    known = inspect.signature(network).parameters
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"{name} has no argument {unknown[0]!r}; it has {', '.join(known)}")
    axes = given.get("spatial_dims", known["spatial_dims"].default) if "spatial_dims" in known else len(args.size)
    usual = {"in_channels": 1, "out_channels": 2, "num_classes": 2, "img_size": _each(args.size, axes)}
    needed = [key for key, parameter in known.items() if parameter.default is parameter.empty]
    missing = [key for key in needed if key not in {**usual, **given} and known[key].kind.name != "VAR_KEYWORD"]
    if missing:
        raise UsageError(f"{name} needs --set {missing[0]}=...")
    return {**{key: usual[key] for key in needed if key in usual}, **given}


def _channels(network: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Those of the input: as the network was told, or as its first convolution has them."""
    from torch import nn

    known = inspect.signature(type(network)).parameters
    if "in_channels" in known:
        return int(arguments.get("in_channels", known["in_channels"].default))
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    return next((m.in_channels for m in convolutions), 3)


def _size_for(network: nn.Module, size: Sequence[int]) -> tuple[int, ...]:
    """One number is for every axis."""
    from torch import nn

    deep = any(isinstance(m, nn.Conv3d | nn.ConvTranspose3d) for m in network.modules())
    axes = int(getattr(network, "spatial_dims", 3 if deep else 2))
    size = _each(size, axes)
    if len(size) != axes:
        raise UsageError(f"--size needs {axes} numbers for a network of {axes}D, or one for all; got {len(size)}")
    return size


def _numbers(count: Count, reach: Reach | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "input_shape": count.input_shape,
        "parameters": count.parameters,
        "macs": count.macs,
        "flops": count.flops,
        "activations": count.activations,
        "by_operation": count.by_operation,
    }
    if reach is not None:
        found["receptive_field"] = reach.field
        found["stride"] = [str(step) for step in reach.stride]
    return found


def _summary(count: Count, reach: Reach | None) -> list[str]:
    lines = [
        f"input            {_cell(count.input_shape)}",
        f"parameters       {count.parameters:,}",
        f"operations       {count.flops / 1e9:,.2f} GFLOP = {count.macs / 1e9:,.2f} GMAC",
        f"activations      {count.activations:,} numbers, {count.activations * 4 / 2**30:.2f} GiB in float32",
    ]
    if reach is None:
        lines.append("its work depends on what it sees: counted on random values, with untrained weights")
    elif all(reach.field):
        steps = _cell([str(step) for step in reach.coarsest])
        lines.append(f"receptive field  {_cell(reach.field)} voxels; coarsest stride {steps}")
    else:
        lines.append(f"receptive field  taken to be the whole input, because of {reach.because}")
    return lines


def _row_of_module(row: Any, count: Count) -> dict[str, Any]:
    return {
        "module": row.name or "(itself)",
        "kind": row.kind,
        "parameters": row.parameters,
        "macs": row.macs,
        "flops": row.flops,
        "activations": row.activations,
        "share": round(row.macs / max(count.macs, 1), 6),
    }


def _table(rows: Rows) -> list[str]:
    """Rows with names to the left and numbers to the right: operations in thousands of millions."""
    columns: dict[str, Callable[[Any], str]] = {
        **dict.fromkeys(("module", "kind", "strategy"), str),
        "window": _cell,
        **dict.fromkeys(("windows", "parameters"), "{:,}".format),
        **dict.fromkeys(("flops", "macs"), lambda n: f"{n / 1e9:,.2f}"),
        "share": "{:.1%}".format,
    }
    titles = {"flops": "GFLOP", "macs": "GMAC"}
    used = [name for name in columns if name in rows[0]]
    cells = [[titles.get(name, name) for name in used]]
    cells += [[columns[name](row[name]) if row[name] is not None else "-" for name in used] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = {"module", "kind", "strategy"}
    return [
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(used, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]


# A bundle


def _of_scan(args: argparse.Namespace) -> tuple[dict[str, Any], Rows, list[str]]:
    bundle = find_bundle(args.model)
    _require(args, size="of a scan in voxels, such as --size 512 512 180")
    if not bundle.pictures:
        _require(args, spacing="of its voxels in mm, such as --spacing 0.98 0.98 2.5")
    trust = args.trust or asked_to_trust(bundle)
    bundle.require_trust(trust)
    from medseg3d.costs import scan_costs

    found = scan_costs(bundle.path.absolute(), args.size, args.spacing or (), trust)
    rows: Rows = [
        {
            "strategy": cost.strategy,
            "own": cost.own,
            "window": cost.window or None,
            "windows": cost.windows or None,
            "parameters": cost.parameters or None,
            "flops": cost.flops or None,
            "macs": cost.macs or None,
        }
        for cost in found
    ]
    what = f"{bundle.name}, a case of {_cell(args.size)} voxels"
    lines = [
        what + (f" of {_cell(args.spacing)} mm" if args.spacing else ""),
        "",
        *_table([{**row, "strategy": row["strategy"] + " *" * (not row["own"])} for row in rows]),
    ]
    if not all(cost.own for cost in found):
        lines += ["", "* not the bundle's own: a network of the same arguments, in 2D for slices, with usual windows"]
    of_noise = any(cost.of_noise for cost in found)
    if of_noise:
        lines += ["", "its work depends on what it sees: counted on random values"]
    lines += [f"{cost.strategy}: {cost.refusal}" for cost in found if cost.refusal]
    report = {"model": bundle.name, "size": args.size, "spacing": args.spacing, "on_random_values": of_noise}
    return {**report, "strategies": rows}, rows, lines


# Formulas


def _of_convolution(args: argparse.Namespace) -> tuple[dict[str, Any], Rows, list[str]]:
    from medseg3d.flops import Convolution

    _require(
        args, in_channels="--in", out_channels="--out", kernel="such as --kernel 3 3 3", size="of the input in voxels"
    )
    axes = len(args.size)
    padding: Any = args.padding or [0]
    if padding == ["same"]:
        padding = "same"
    elif not all(isinstance(n, int) for n in padding):
        raise UsageError(f"--padding takes numbers, or the word same; got {' '.join(map(str, padding))}")
    each = {name: _each(getattr(args, name) or [1], axes) for name in ("kernel", "stride", "dilation")}
    conv = Convolution(
        args.in_channels,
        args.out_channels,
        size=tuple(args.size),
        padding=padding if padding == "same" else _each(padding, axes),
        groups=args.groups,
        transposed=args.transposed,
        **each,
    )
    return _figures("conv", conv.figures, "MACs = positions x weights; weights = taps x in x out / groups")


def _of_attention(args: argparse.Namespace) -> tuple[dict[str, Any], Rows, list[str]]:
    from medseg3d.flops import Attention

    _require(args, dim="the width of a token", tokens="along each axis, such as --tokens 8 8 8")
    grid, formula = tuple(args.tokens), "FLOPs = 8 d^2 L + 4 d L M: d the width, L tokens, M of them in a window"
    full = Attention(grid, args.dim)
    if not args.window:
        return _figures("attention", full.figures, formula)
    windowed = Attention(grid, args.dim, _each(args.window, len(grid)))
    rows: Rows = [
        {"figure": name, "full": value, "windowed": windowed.figures[name]} for name, value in full.figures.items()
    ]
    ratio = full.flops / windowed.flops
    report = {"formula": formula, "full": full.figures, "windowed": windowed.figures, "ratio": ratio}
    lines = [formula, "", f"{'':<18}{'full':>22}{'windowed':>22}"]
    lines += [f"{row['figure']:<18}{_text(row['full']):>22}{_text(row['windowed']):>22}" for row in rows]
    return report, rows, [*lines, "", f"full attention takes {ratio:,.6g} times the operations"]


def _of_patches(args: argparse.Namespace) -> tuple[dict[str, Any], Rows, list[str]]:
    from medseg3d.flops import PatchEmbedding

    _require(args, size="of the volume in voxels", patch="the edge of a patch in voxels", dim="the width of a token")
    patches = PatchEmbedding(tuple(args.size), args.in_channels or 1, args.patch, args.dim)
    return _figures("patches", patches.figures, "MACs = tokens x weights; weights = patch vector x width")


FORMULAS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], Rows, list[str]]]] = {
    "conv": _of_convolution,
    "attention": _of_attention,
    "patches": _of_patches,
}


def _figures(name: str, figures: Mapping[str, Any], formula: str) -> tuple[dict[str, Any], Rows, list[str]]:
    lines = [formula, "", *(f"{name:<18}{_text(value):>22}" for name, value in figures.items())]
    return {"formula": formula, name: dict(figures)}, [dict(figures)], lines


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _cell(value)


def _each(values: Sequence[int], axes: int) -> tuple[int, ...]:
    """One number is for every axis."""
    return tuple(values) * axes if len(values) == 1 else tuple(values)


def _require(args: argparse.Namespace, **needed: str) -> None:
    for name, what in needed.items():
        if not getattr(args, name):
            flag = {"in_channels": "in", "out_channels": "out"}.get(name, name)
            subject = args.model or args.what
            raise UsageError(f"{subject} needs --{flag}" + ("" if what == f"--{flag}" else f": {what}"))
