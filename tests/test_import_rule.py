"""Imports go down only; networks and layers know torch and nothing else; importing medseg3d is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up. A module may import what lies on lower floors, and its own package. "medseg3d" is the package's
# own __init__, which names what is public.
FLOORS = [
    {"interpolation", "resources", "version", "errors", "sizes", "startup"},
    {"geometry", "tasks"},
    {"volume"},
    {"io", "layers", "losses", "metrics", "catalogue"},
    {"data", "networks", "flops"},
    {"inference", "checkpoints", "compatibility"},
    {"report", "recipe", "runner"},
    {"trial", "segmentation", "outputs"},
    {"planning"},
    {"training", "segmenter", "several", "batch", "pictures", "bundle_weights"},
    {"bundle"},
    {"compare"},
    {"medseg3d", "doctor"},
    {"costs"},
    {"cli"},
    {"__main__"},
]
# Files of one room: a Segmenter, or several of them, predict many cases by the code in batch.py.
NEIGHBOURS = [{"segmenter", "several", "batch", "pictures"}]
# Where less is allowed than all that lies below.
ONLY = {
    "io": {"volume", "geometry", "tasks"},
    "layers": set(),
    "losses": set(),
    "metrics": {"geometry", "tasks"},
    "data": {"io", "volume", "geometry", "resources", "tasks", "version"},
    "networks": {"layers"},
    "flops": set(),  # networks arrive as modules
    "checkpoints": {"io", "layers", "networks", "version"},
    "compatibility": {"layers", "networks"},
    # Networks and transforms arrive as callables.
    "inference": {"errors", "io", "volume", "geometry", "interpolation", "tasks"},
}
THIRD_PARTY_ONLY = {
    "interpolation": {"numpy"},
    "geometry": {"numpy"},
    "volume": {"numpy"},
    "tasks": {"numpy", "scipy"},
    "layers": {"torch"},
    "networks": {"torch"},
    "flops": {"torch"},
    "losses": {"torch"},
    "checkpoints": {"torch", "numpy", "safetensors"},
    "metrics": {"numpy", "scipy"},
    "report": {"numpy", "scipy", "PIL", "cc3d"},
}
FILE_FORMATS = {"nibabel", "SimpleITK", "pydicom", "isal"}  # files are opened in io and nowhere else


def imported(source):
    """Every module that the source imports, at the top or within functions, as dotted names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(room):
    floors = [n for n, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"medseg3d.{room} has no floor yet: put it on one in {__file__}"
    return floors[0]


def room_of(dotted, rooms):
    """The room that `medseg3d.x.y` names; a plain name in medseg3d (its version, say) is the package itself."""
    room = dotted.partition(".")[2].partition(".")[0]
    return room if room in rooms else "medseg3d"


def breaches(room, source, rooms):
    """Each import of the source of a module in `room` that the rules forbid, with the reason."""
    for name in imported(source):
        package = name.split(".")[0]
        if package == "medseg3d":
            target = room_of(name, rooms)
            if target == room or any({target, room} <= rooms for rooms in NEIGHBOURS):
                continue
            if floor_of(target) >= floor_of(room):
                yield f"{room} imports {name}, which does not lie below it"
            elif target not in ONLY.get(room, {target}):
                yield f"{room} imports {name}, but may import only {sorted(ONLY[room])} of medseg3d"
        elif package not in sys.stdlib_module_names:
            if package not in THIRD_PARTY_ONLY.get(room, {package}):
                yield f"{room} imports {name}, but may import only {sorted(THIRD_PARTY_ONLY[room])}"
            if package in FILE_FORMATS and room != "io":
                yield f"{room} imports {name}, but only io reads and writes files"


def modules():
    package = ROOT / "medseg3d"
    for path in sorted(package.rglob("*.py")):
        first = path.relative_to(package).parts[0]
        yield ("medseg3d" if first == "__init__.py" else first.removesuffix(".py")), path


def test_imports_go_down_only():
    found = list(modules())
    rooms = {room for room, _ in found}
    assert {"geometry", "networks", "data", "inference"} <= rooms
    wrong = [
        f"{path.relative_to(ROOT)}: {breach}"
        for room, path in found
        for breach in breaches(room, path.read_text(), rooms)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "source", "allowed"),
    [
        ("networks", "from medseg3d.layers.convolution import CONV\nimport torch, math", True),
        ("networks", "from medseg3d.networks.unet import UNet", True),
        ("networks", "from medseg3d import geometry", False),
        ("networks", "def f():\n    import monai", False),
        ("networks", "import numpy as np", False),
        ("layers", "from medseg3d.networks import unet", False),
        ("volume", "from medseg3d.geometry import Geometry", True),
        ("geometry", "from medseg3d.volume import Volume", False),
        ("geometry", "import torch", False),
        ("metrics", "import medseg3d.io.nifti", False),
        ("inference", "from medseg3d.networks import UNet", False),
        ("data", "if True:\n    from medseg3d.inference import SubVolumes", False),
        ("report", "from nibabel.nifti1 import Nifti1Image", False),
        ("cli", "from medseg3d import __version__", True),
        ("bundle", "from medseg3d import __version__", False),
    ],
)
def test_the_rule_finds_what_it_should(room, source, allowed):
    rooms = set().union(*FLOORS)
    assert (not list(breaches(room, source, rooms))) == allowed


def test_importing_medseg3d_imports_neither_torch_nor_monai():
    code = "import sys, medseg3d; print(sorted({'torch', 'monai', 'nibabel', 'SimpleITK'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_networks_import_without_monai():
    code = "import sys, medseg3d.networks, medseg3d.losses; print('monai' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
