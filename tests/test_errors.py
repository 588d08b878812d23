"""Errors become one line that says what a user can act on."""

from __future__ import annotations

import itertools

import pytest
import torch

from medseg3d.errors import in_words, is_out_of_memory


def raised(*errors):
    """The first error, raised from the second, raised from the third, ..."""
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("image"), "KeyError: 'image'"),
        (ValueError(), "ValueError"),
        (MemoryError(), "MemoryError"),
        (FileNotFoundError(2, "no such file or folder", "a.nii"), "no such file or folder: a.nii"),
        (OSError(28, "cannot write a.nii: no space left on device"), "cannot write a.nii: no space left on device"),
        (OSError("plain"), "plain"),
        (raised(RuntimeError("applying transform"), RuntimeError("x"), KeyError("image")), "KeyError: 'image'"),
        (raised(RuntimeError("applying transform"), ValueError("too thin"), KeyError("k")), "too thin"),
        (raised(ValueError("cut off"), EOFError("end of file")), "cut off"),
    ],
)
def test_in_words(error, words):
    assert in_words(error) == words


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] CPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (torch.OutOfMemoryError("full"), True),
        (raised(RuntimeError("applying transform"), MemoryError("Unable to allocate 7 GiB")), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("the volume is a single slice"), False),
        (raised(RuntimeError("applying transform"), ValueError("x")), False),
    ],
)
def test_is_out_of_memory(error, answer):
    assert is_out_of_memory(error) == answer
