"""Whether freed memory stays with the process, as the kernel counts its pages."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from medseg3d.inference import memory
from medseg3d.inference.memory import keep_freed_memory
from tests.conftest import ROOT

BLOCK = 200  # MB
HALF = BLOCK // 2


def resident():
    """MB that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def held_after_use(size=BLOCK):
    """MB that the process holds more, after a block was used and freed, than before."""
    before = resident()
    block = torch.ones(size * 1_000_000, dtype=torch.uint8)
    assert block[-1] == 1
    del block
    return resident() - before


def memory_is_kept_within_and_given_back_afterwards():
    assert held_after_use() < HALF
    before = resident()
    with keep_freed_memory():
        assert held_after_use() > HALF
        assert held_after_use(BLOCK - 10) < HALF, "what was kept is used again"
        assert resident() - before > HALF
    assert resident() - before < HALF
    assert held_after_use() < HALF


def memory_is_given_back_from_below_what_is_still_used():
    before = resident()
    with keep_freed_memory():
        block = torch.ones(BLOCK * 1_000_000, dtype=torch.uint8)
        result = torch.ones(1_000_000)
        del block
        assert resident() - before > HALF
    assert resident() - before < HALF and result.sum() == 1e6


def the_outermost_block_decides():
    before = resident()
    with keep_freed_memory():
        with keep_freed_memory():
            assert held_after_use() > HALF
        assert resident() - before > HALF
        assert held_after_use(BLOCK - 10) < HALF
    assert resident() - before < HALF


def an_error_gives_it_back_too():
    before = resident()
    with pytest.raises(ValueError, match="of the network"), keep_freed_memory():
        held_after_use()
        raise ValueError("of the network")
    assert resident() - before < HALF
    assert held_after_use() < HALF


@pytest.mark.skipif(memory._glibc() is None, reason="this C library has no mallopt and malloc_trim")
@pytest.mark.parametrize(
    "check",
    [
        memory_is_kept_within_and_given_back_afterwards,
        memory_is_given_back_from_below_what_is_still_used,
        the_outermost_block_decides,
        an_error_gives_it_back_too,
    ],
    ids=lambda check: check.__name__,
)
def test_in_a_process_of_its_own(check):
    """What other tests have left free in the heap would be used first."""
    code = f"from {__name__} import {check.__name__} as check; check()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Recorder:
    """A C library that only notes what it was asked for."""

    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, pad):
        self.calls.append("trim")


BEGIN, END = [(-4, 0), (-1, 2**31 - 1)], [(-4, 65536), (-1, 128 * 1024), "trim"]


def test_many_threads_are_one_use(monkeypatch):
    libc = Recorder()
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    everybody = threading.Barrier(8)

    def use():
        for _ in range(50):
            with keep_freed_memory():
                everybody.wait()
            everybody.wait()

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert libc.calls == (BEGIN + END) * 50


def test_nothing_happens_without_glibc(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with keep_freed_memory(), keep_freed_memory():
        assert memory._users == 0


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux"])
def test_other_c_libraries_are_left_alone(platform, monkeypatch):
    """musl, on Linux, has neither function."""
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory._glibc.__wrapped__() is None
