"""The softmax's kernel for a CPU (losses/softmax.c): compiled by this machine's C compiler, kept beside the programs.

Without a compiler XLA does its work, the same in more passes over memory; a warning says so.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "losses" / "softmax.c"
OPTIONS = ("-O3", "-march=native", "-shared", "-fPIC")


@functools.cache
def start(folder: str) -> tuple[Path, subprocess.Popen | str | None]:
    """Begins to compile into `folder`, unless that is done. Returns the file, and who makes it or why nobody can."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    digest = hashlib.sha256("\0".join([SOURCE.read_text(), *compiler, *OPTIONS, *processor()]).encode()).hexdigest()
    file = Path(folder, f"softmax-{digest[:32]}.so")
    if is_own(file):
        return file, None
    headers = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file, subprocess.Popen(
            [*compiler, *OPTIONS, f"-I{headers}", str(SOURCE), "-o", str(_part(file))],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    except OSError as error:
        return file, str(error)


@functools.cache
def softmax() -> str | None:
    """The name under which XLA finds the kernel, or None: this machine has no C compiler."""
    import jax

    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder:
        folder = tempfile.mkdtemp(prefix="seqrec-")
    file, work = start(folder)
    try:
        if isinstance(work, subprocess.Popen):
            _, said = work.communicate()
            work = f"{work.args[0]}: {said.strip()[-500:]}" if work.returncode else os.replace(_part(file), file)
        if work:
            raise OSError(work)
        handler = jax.ffi.pycapsule(ctypes.CDLL(str(file)).softmax)
    except OSError as error:
        log.warning("no C compiler for the softmax's kernel, XLA does its work (training takes longer): %s", error)
        return None
    name = f"seqrec_jax_{file.stem}"
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return name


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}.part")


def is_own(file: Path) -> bool:
    """It is there, and this user's: what somebody else has written is not run."""
    return file.is_file() and file.stat().st_uid == os.getuid()


def processor() -> list[str]:
    """What tells this kind of CPU from others."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return [platform.machine(), platform.processor(), *sorted(facts)]
