"""What a user should know about this installation before trusting or blaming it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from medseg3d.catalogue import shipped_bundles
from medseg3d.errors import in_words

_REQUIRED = (
    *("numpy", "scipy", "torch", "safetensors", "monai", "nibabel", "SimpleITK", "isal"),
    *("connected-components-3d", "pillow", "einops"),
)
_EXTRAS = {
    "dicom": ("pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg"),
    "bundle": ("fire", "jsonschema", "pytorch-ignite", "pyyaml"),
    "train": ("psutil", "pytorch-ignite", "tqdm"),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "onnx": ("onnx", "onnxscript"),
}
# (package, version prefix, what goes wrong); sources: PyTorch issues 166122 and 166643.
_KNOWN_BAD = (("torch", "2.9.", "3D convolutions under mixed precision are much slower and take more memory"),)


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``verdict`` is "ok", "note" or "problem"."""

    verdict: str
    subject: str
    text: str


def examine() -> list[Finding]:
    """Versions, devices, extras, known bad combinations, and whether the shipped models are whole."""
    return [*_packages(), *_extras(), *_known_bad(), *_devices(), *_models()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    for package in _REQUIRED:
        version = _version(package)
        if version is None:
            yield Finding("problem", package, "is not installed: run pip install medseg3d again")
        else:
            yield Finding("ok", package, version)


def _extras() -> Iterator[Finding]:
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if _version(package) is None]
        if missing:
            yield Finding("note", f"extra {extra}", f"lacks {', '.join(missing)}: pip install medseg3d[{extra}]")
        else:
            yield Finding("ok", f"extra {extra}", "installed")


def _known_bad() -> Iterator[Finding]:
    for package, prefix, effect in _KNOWN_BAD:
        version = _version(package)
        if version is not None and version.startswith(prefix):
            yield Finding("problem", f"{package} {version}", effect)


def _devices() -> Iterator[Finding]:
    if _version("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing or a wrong system library
        yield Finding("problem", "torch", f"cannot be imported ({in_words(error)}): install it again")
        return
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", "cpu", f"{torch.get_num_threads()} threads, {capability}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield Finding("ok", f"gpu:{number}", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    elif torch.version.cuda:
        yield Finding(
            "note", "gpu", f"PyTorch is built for CUDA {torch.version.cuda}, but no device is seen: check the driver"
        )
    else:
        yield Finding("note", "gpu", "this PyTorch is a CPU build; models run on the CPU")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps", "Apple GPU")


def _models() -> Iterator[Finding]:
    for bundle in shipped_bundles():
        weights = bundle.path / "models" / "model.pt"
        if weights.is_file():
            yield Finding(
                "ok", f"model {bundle.name}", f"{bundle.version}, weights of {weights.stat().st_size / 1e6:.1f} MB"
            )
        else:
            yield Finding(
                "problem", f"model {bundle.name}", f"its weights are missing ({weights}): install medseg3d again"
            )
