"""How the benchmarks measure: runs in turns, peak memory in a process of its own, operations, the machine."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], object]
MIB = 2**20

# By default glibc returns every big tensor to the kernel and faults its pages in again; raised, it keeps them.
ALLOCATORS = {
    "default": {},
    "raised": {
        "MALLOC_MMAP_THRESHOLD_": str(2**33),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**26),
    },
}


def restart_with(allocator: str, threads: int) -> None:
    """Start this very command again unless its environment is as wanted: glibc and OpenMP read it once, at start."""
    wanted = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    wanted |= {**ALLOCATORS[allocator], "OMP_NUM_THREADS": str(threads)}
    if wanted != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def seconds_of(run: Run, device: torch.device, calls: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by the clock; on a GPU the mean of ``calls`` between two events of its own clock."""
    if device.type != "cuda":
        start = clock()
        run()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def take_turns(
    runs: dict[str, Run],
    rounds: int,
    device: torch.device,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run in every round. All take one turn a round, so that a machine's drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device, calls, clock))
    return seconds


def median_ratio(times: list[float], base: list[float]) -> float:
    """Median of the ratios within one round each, which is not the ratio of the medians."""
    return median(a / b for a, b in zip(times, base, strict=True))


@dataclass(frozen=True)
class Memory:
    """MiB: what the run adds at its peak, and all that the process (or the GPU's allocator) then holds."""

    added: float
    total: float


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a fresh process: what others left in this one does not count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(run: Run, device: torch.device, compiles: bool = False) -> Memory:
    """Peak of the second call over what was held before the first; after it where that one compiles."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return Memory((peak - before) / MIB, peak / MIB)
    before_mib = _resident_after_trim()
    run()
    if compiles:  # the compiler's own modules stay in the process
        before_mib = _resident_after_trim()
    with suppress(OSError):  # not everywhere allowed; then the peak of the first call counts too
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    peak_mib = _status_mib("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Memory(peak_mib - before_mib, peak_mib)


def _resident_after_trim() -> float:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status_mib("VmRSS")


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def count_flops(network: nn.Module, input_shape: tuple[int, ...], backward: bool = False) -> int:
    """Operations of convolutions and matrix products, 2 a multiply-add.

    On meta tensors, because the fused attention of a CPU escapes the counter. The network moves to the meta device.
    """
    network = network.to("meta")
    x = torch.empty(input_shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = network(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def matmul(dtype: torch.dtype, device: torch.device) -> tuple[Run, int]:
    """A big square matrix product, whose rate networks are held against, and its operations."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def describe_machine(device: torch.device, allocator: str) -> str:
    """One line: processor, threads, versions; no names of hosts."""
    facts = [_processor(), f"{torch.get_num_threads()} threads on {len(os.sched_getaffinity(0))} cores"]
    if device.type == "cuda":
        facts = [torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}", *facts]
    else:
        facts.append(f"glibc allocator {allocator}")
    facts.append(f"torch {torch.__version__}")
    with suppress(ImportError):  # some benchmarks do without
        import monai

        facts.append(f"MONAI {monai.__version__}")
    return ", ".join(facts)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    known = [name for name, flag in {"AMX": "amx_bf16", "AVX512-BF16": "avx512_bf16"}.items() if flag in flags]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(known) or 'no bf16 instructions'})"
