"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from medseg3d.io.formats import split_name

_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.EISDIR: "choose another name, a folder has this one",
    errno.ENOTDIR: "choose another folder, a file has this name",
    errno.EEXIST: "choose another folder, a file has this name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


T = TypeVar("T")


def write_atomic(path: str | Path, write: Callable[[Path], T], check: Callable[[Path, T], None] | None = None) -> Path:
    """Write a file so that its name appears only once it is whole.

    `write(temporary)` fills a hidden file with the same suffix in the same folder, which is flushed to the disk;
    `check(temporary, what write returned)`, if given, reads it again and raises if it is wrong; then it takes the name
    `path` and the place of an older file. Whatever is raised on the way, Ctrl-C included, the hidden file is removed
    and the older one left as it was. Missing parent folders are made.

    Raises:
        OSError: what failed on which file and what to do, with the errno of the cause.
    """
    path = Path(path)
    stem, suffix = split_name(path)
    temporary = path.with_name(f".{stem[:100]}.{secrets.token_hex(4)}.partial{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            written = write(temporary)
            _flush(temporary)
            if check is not None:
                check(temporary, written)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"cannot write {path}: {os.strerror(error.errno).lower()}"
        raise OSError(error.errno, "; ".join(filter(None, (reason, _ADVICE.get(error.errno))))) from error
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text as :func:`write_atomic` writes."""
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flush(path: Path) -> None:
    """Some file systems report a full disk only when they must store the bytes."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
