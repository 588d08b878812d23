"""What went wrong, in one line for a user."""

from __future__ import annotations

from collections.abc import Iterator

_FOR_USERS = (ValueError, OSError, ImportError)  # their messages are written for the one who typed the command
# Of PyTorch on a GPU and on the CPU, and of cuBLAS, cuDNN and their like.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "_alloc_failed")


def in_words(error: BaseException) -> str:
    """The message that tells most: of the outermost error made for users, else of what lies at the bottom.

    MONAI wraps what a transform raises in errors that only say which transform it was.
    """
    chain = list(_chain(error))
    told = next((cause for cause in chain if isinstance(cause, _FOR_USERS)), chain[-1])
    if isinstance(told, OSError) and told.strerror:
        text = told.strerror if told.filename is None else f"{told.strerror}: {told.filename}"
    elif isinstance(told, ImportError):
        text = str(told).partition("\n")[0]  # MONAI adds a traceback
    else:
        text = str(told)
    text = " ".join(text.split())
    if isinstance(told, _FOR_USERS) and text:
        return text
    return f"{type(told).__name__}: {text}" if text else type(told).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or on an accelerator.

    PyTorch has a type of its own for accelerators only, and libraries under it have but their messages.
    """
    return any(
        isinstance(cause, MemoryError)
        or type(cause).__name__ == "OutOfMemoryError"  # PyTorch's: it is not imported for this
        or any(words in str(cause).lower() for words in _OUT_OF_MEMORY)
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
