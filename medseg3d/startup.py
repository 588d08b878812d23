"""A command's process starts and ends sooner; what it does stays the same."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(engines: bool = True) -> Iterator[None]:
    """Import PyTorch and MONAI within this block, in a process that carries out one command and ends.

    They are three thousand modules and a million objects that stay until the end. Python's search for cycles would go
    through them time and again while they are made, and once more before the process ends: it waits here, and passes
    over them from then on.

    Args:
        engines: False if the command builds none of MONAI's engines and handlers. MONAI then does not import Ignite,
            which they are made with and which takes PyTorch's distributed training and SymPy along; to MONAI it is as
            if it were not installed, while everybody else can import it afterwards.
    """
    hides = not engines and not {"ignite", "monai"} & sys.modules.keys()
    searches = gc.isenabled()
    gc.disable()
    if hides:
        sys.modules["ignite"] = None  # type: ignore[assignment]  # Python's own word for: not to be imported
    try:
        yield
    finally:
        if hides:
            del sys.modules["ignite"]
        gc.freeze()
        if searches:
            gc.enable()
