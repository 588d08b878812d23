"""``adapt``: a bundle for data of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from medseg3d.catalogue import find_bundle
from medseg3d.cli.terminal import DONE


def adapt(args: argparse.Namespace) -> int:
    """Copy a bundle, with the labels of a data set in its configs."""
    from medseg3d.training.adapting import adapt_bundle

    made = adapt_bundle(find_bundle(args.model), args.data, args.output, args.dataset_dir, args.spacing)
    print(made.path)
    print(f"labels: {', '.join(f'{number} {name}' for number, name in made.labels.items())}")
    print(f"cases: {made.cases['train']} to train on, {made.cases['validation']} to validate with")
    print(f"voxels: {_grid(made.spacing)} for the network; median of the scans {_grid(made.median_spacing)}")
    if made.pairs:
        pairs = [" and ".join(made.labels[number] for number in pair) for pair in made.pairs]
        print(f"mirrored in training, with {', '.join(pairs)} exchanged")
    else:
        print("not mirrored in training: no label has a left and a right side")
    print(f"next: medseg3d train -m {made.path} --trust -o RUN")
    return DONE


def _grid(spacing: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in spacing) + " mm"
