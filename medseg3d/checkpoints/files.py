"""Weights as they lie in files: what a file is, and its tensors by name. Objects other than tensors are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

Source: TypeAlias = str | os.PathLike[str] | IO[bytes] | Mapping[str, Any]
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
RECORD = "medseg3d"  # the entry in which save_checkpoint says what it saved
FORMAT = 1  # of that entry
# Names under which trainers keep the weights, the usual one first.
ENTRIES = ("state_dict", "model_state_dict", "model", "network_weights", "network", "net")
_AGAIN = "get the file again, and compare its size or checksum with what its source states"
# What arrives in place of weights, by the bytes that it begins with.
_NOT_WEIGHTS = (
    (rb"\s*<", f"is a web page: the link led to a page about the file or to a log-in; {_AGAIN}"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (rb"\s*[{\[]", f"is text (JSON), perhaps a server's error message; {_AGAIN}"),
    (rb"\x80", f"is a Python pickle and none of PyTorch's, or was cut short; reading one can run code; {_AGAIN}"),
    (rb"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (rb"\x89HDF", "is an HDF5 file, of Keras perhaps: its network is not one of these"),
)
_OLD_TORCH = bytes.fromhex("6cfc9c46f9206aa85019")  # what torch.save wrote before PyTorch 1.6 is a pickle with this
# Trainers store their best score as a NumPy number. Nothing runs when such a number is read.
_NUMBERS = [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]


@dataclass(frozen=True)
class Weights:
    """The tensors of a source by the names that they have there.

    Attributes:
        source: what messages call it.
        tensors: name -> tensor on the CPU; of a file, mapped into memory where that is possible.
        record: what `save_checkpoint` wrote beside the tensors; empty for files of others.
        notes: what a user may want to know about how it was read.
    """

    source: str
    tensors: dict[str, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_weights(source: Source, entry: str | None = None) -> Weights:
    """The tensors of a .pt, .pth, .ckpt or .safetensors file, of a zip with one of these, or of a mapping.

    A file that is open for reading bytes is read from where it stands, into memory.
    What a file is, its content says and not its suffix. Of several sets of tensors ``entry`` names the one to take,
    where there is such; else it is the one under a trainer's usual name.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: the file is damaged, holds objects other than tensors, or no tensors, or several sets of them.
    """
    if isinstance(source, Mapping):
        return _from_content(source, "the given mapping", entry)
    if not isinstance(source, str | os.PathLike):
        return _from_open_file(source, entry)
    if "://" in os.fspath(source):
        raise ValueError(f"{source} is an address; nothing is downloaded here: download the file and give its path")
    path = Path(source)
    if path.is_dir():
        within = sorted(str(found) for found in path.rglob("*") if found.suffix in SUFFIXES)[:3]
        advice = f"did you mean {' or '.join(within)}?" if within else f"there is no {', '.join(SUFFIXES)} file in it"
        raise IsADirectoryError(f"{path} is a folder, a file of weights is needed; {advice}")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    return _read(path, str(path), entry)


def _from_open_file(source: IO[bytes], entry: str | None) -> Weights:
    if not hasattr(source, "read"):
        raise TypeError(
            f"weights are a path, a file open for reading bytes, or a mapping, got a {type(source).__name__}"
        )
    name = str(getattr(source, "name", "the given file"))
    content = source.read()
    if not isinstance(content, bytes):
        raise ValueError(f"{name} is open as text, weights are bytes: open it with mode 'rb'")
    if not content:
        raise ValueError(f"{name} has nothing left to read: call its seek(0) first, or see whether it is empty")
    return _read(io.BytesIO(content), name, entry)


def _read(file: Path | io.BytesIO, name: str, entry: str | None) -> Weights:
    """Read a file, or a member of a zip that lies in memory."""
    head = _head(file)
    if not head:
        raise ValueError(f"{name} is empty (0 bytes): {_AGAIN}")
    if head.startswith(b"PK\x03\x04"):
        return _from_zip(file, name, entry)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return _from_safetensors(file, name, entry)
    if _OLD_TORCH in head[:32]:
        return _from_content(_torch_load(file, name, mmap=False), name, entry)
    for beginning, reason in _NOT_WEIGHTS:
        if re.match(beginning, head):
            raise ValueError(f"{name} {reason}")
    raise ValueError(
        f"{name} is no file of weights that is known here: PyTorch's and safetensors files are, this one begins with "
        f"{head[:8]!r}; if it should be one, {_AGAIN}"
    )


def _head(file: Path | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:512]
    with file.open("rb") as opened:
        return opened.read(512)


def _from_zip(file: Path | io.BytesIO, name: str, entry: str | None) -> Weights:
    """torch.save writes zips, and so do others: TorchScript, torch.export, those who pack one checkpoint."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            ends = {member.partition("/")[2] for member in members}
            if "constants.pkl" in ends:
                _refuse_program(name, "a TorchScript archive", "torch.jit.load")
            if "archive_format" in ends or "serialized_exported_program.json" in members:
                _refuse_program(name, "an exported program", "torch.export.load")
            for member in archive.infolist():
                if member.CRC:  # torch.save may have been told to write none
                    _read_through(archive, member)
            if "data.pkl" not in ends:
                return _from_member(archive, name, entry)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{name} is damaged or was cut short ({error}): {_AGAIN}") from error
    return _from_content(_torch_load(file, name, mmap=isinstance(file, Path)), name, entry)


def _refuse_program(name: str, what: str, reader: str) -> NoReturn:
    raise ValueError(
        f"{name} is {what}: a program with its weights, and reading it can run what is in it, so it was not read. If "
        f"you trust its source, take the weights out once, torch.save({reader}({name!r})"
        f"{'.cpu()' if 'jit' in reader else ''}.state_dict(), 'weights.pt'), and load weights.pt"
    )


def _read_through(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """To its end, where the checksum is compared; torch.load never does."""
    with archive.open(member) as opened:
        while opened.read(1 << 20):
            pass


def _from_member(archive: zipfile.ZipFile, name: str, entry: str | None) -> Weights:
    files = [member for member in archive.namelist() if not member.startswith("__MACOSX/")]
    members = [member for member in files if member.lower().endswith(SUFFIXES)]
    if len(members) != 1:
        raise ValueError(
            f"{name} is a zip with {len(members)} files of weights in it ({', '.join(members[:5] or files[:5])}), and "
            "one is needed: unpack it and give the path of the right file"
        )
    return _read(io.BytesIO(archive.read(members[0])), f"{name}/{members[0]}", entry)


def _from_safetensors(file: Path | io.BytesIO, name: str, entry: str | None) -> Weights:
    try:
        if isinstance(file, io.BytesIO):
            data = file.getvalue()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            tensors, metadata = safetensors.torch.load(data), header.get("__metadata__")
        else:
            with safetensors.safe_open(file, "pt") as opened:
                metadata = opened.metadata()
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, it is no mapping
        record = json.loads((metadata or {}).get(RECORD, "{}"))
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is damaged or was cut short ({error}): {_AGAIN}") from error
    return _from_content({**tensors, RECORD: record} if record else tensors, name, entry)


def _torch_load(file: Path | io.BytesIO, name: str, mmap: bool) -> Any:
    numbers: list[Any] = [np.dtype, *_NUMBERS]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # its name in files of NumPy 1 and of 2
        numbers.append((np.float64(0).__reduce__()[0], f"{module}.scalar"))
    if isinstance(file, Path) and file.suffix == ".safetensors":  # which torch.load would take it for, by its name
        file, mmap = io.BytesIO(file.read_bytes()), False
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        with torch.serialization.safe_globals(numbers):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch, pickle and zipfile each raise their own
        objects = sorted(set(re.findall(r"GLOBAL (\S+)", str(error)))) if _is_refusal(error) else []
        if not objects:
            told = re.search(r"WeightsUnpickler error: (.*)", str(error))
            reason = told[1] if told else str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{name} is damaged or was cut short ({reason}): {_AGAIN}") from error
        raise ValueError(
            f"{name} holds code or objects other than tensors ({', '.join(objects)}); reading those can run what the "
            "file's author put there, so nothing of it was read or run. If you trust its source, convert it once: "
            f"content = torch.load({name!r}, weights_only=False), then torch.save(content['state_dict'], 'weights.pt') "
            "(of a whole network, content.state_dict()), and load weights.pt"
        ) from error


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)


def _from_content(content: Any, name: str, wanted: str | None) -> Weights:
    """The one set of tensors in what a file holds: itself, or under the wanted or a trainer's name for it."""
    found = list(_sets_of_tensors(content))
    found = [item for item in found if wanted in (item[0], item[0].partition(".")[0])] or found
    if not found:
        raise ValueError(f"{name} holds no tensors by name, which a state_dict is; it holds {_contents(content)}")
    if len(found) == 1:
        entry, tensors = found[0]
    else:
        known = {entry: rank for rank, entry in enumerate(ENTRIES)}
        entry, tensors = min(found, key=lambda item: known.get(item[0].rpartition(".")[2], len(known)))
        if entry.rpartition(".")[2] not in known:
            names = ", ".join(f"{entry!r} ({len(tensors)})" for entry, tensors in found[:8])
            raise ValueError(
                f"{name} holds several sets of tensors: {names}. Give the right one instead of the file, such as "
                f"torch.load(path, weights_only=True)[{found[0][0]!r}]"
            )
    record = content.get(RECORD) if isinstance(content, Mapping) else None
    record = dict(record) if isinstance(record, Mapping) else {}
    if int(record.get("format", FORMAT)) > FORMAT:
        raise ValueError(f"{name} was written by a later medseg3d ({record.get('version')}): update medseg3d")
    orders = {local.get("merging_order") for local in getattr(tensors, "_metadata", {}).values()} - {None}
    if len(orders) == 1:
        record.setdefault("merging_order", orders.pop())
    others = [other for other, _ in found if other != entry]
    notes = [f"the weights are its entry {entry!r}; it also holds {', '.join(map(repr, others))}"] if others else []
    only = {key: value.detach() for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    return Weights(name, only, record, notes)


def _sets_of_tensors(content: Any, entry: str = "", depth: int = 2) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(entry, mapping of names to tensors) for each that the content holds, down to `depth` levels."""
    if not isinstance(content, Mapping) or depth < 0:
        return
    deeper = [
        found
        for name, value in content.items()
        for found in _sets_of_tensors(value, f"{entry}.{name}" if entry else str(name), depth - 1)
    ]
    if deeper:
        yield from deeper
    elif all(isinstance(key, str) for key in content) and any(isinstance(v, torch.Tensor) for v in content.values()):
        yield entry, content


def _contents(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [f"{key!r} ({type(value).__name__})" for key, value in content.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
