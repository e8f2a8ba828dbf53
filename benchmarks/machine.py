"""What runs the benchmark, how fast it can multiply, and whether others are using it."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from seqrec_jax.errors import UserError

GEMM = 2048


def describe() -> dict:
    """Processor, memory, versions, load; JSON-ready."""
    names = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line[:10] == "model name"]
    return {
        "processor": names[0] if names else platform.machine(),
        "usable_cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load_before": list(os.getloadavg()),
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def others_share(seconds: float = 1.0) -> float:
    """Share of the usable cores that other processes use while this one sleeps for `seconds`."""
    before = _ticks()
    time.sleep(seconds)
    idle, total = (new - old for new, old in zip(_ticks(), before, strict=True))
    return 1 - idle / max(total, 1)


def timed(work: Callable[[], object], repeats: int) -> float:
    """Seconds a call; every call is waited for."""
    began = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(work())
    return (time.perf_counter() - began) / repeats


def gemm() -> Callable[[], float]:
    """Seconds of a float32 product [2048, 2048] x [2048, 2048]: the limit of the machine."""
    left, right = jax.random.normal(jax.random.key(0), (2, GEMM, GEMM))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(left, right))
    return lambda: timed(lambda: product(left, right), 4)


def _ticks() -> tuple[int, int]:
    """(idle, all) clock ticks of the usable cores so far."""
    rows = [line.split() for line in _read("/proc/stat").splitlines()]
    usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = [[int(value) for value in row[1:9]] for row in rows if row[0] in usable]  # guests are in user and nice
    return sum(row[3] + row[4] for row in ticks), sum(map(sum, ticks))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the benchmarks need Linux, to see what else is running") from error
