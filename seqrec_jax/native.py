"""The softmax's kernel for a CPU (losses/softmax.c): compiled by this machine's C compiler, kept beside the programs.

Without a compiler XLA does its work, the same in more passes over memory; a warning says so.
"""

import contextlib
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
    part = str(file.with_name(f"{file.name}.{os.getpid()}.part"))
    headers = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
    compiling = shlex.join([*compiler, *OPTIONS, f"-I{headers}", str(SOURCE), "-lm", "-o", part])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        script = f"{compiling} && mv {shlex.join([part, str(file)])}"  # ends well though this process may not
        quiet = subprocess.DEVNULL
        return file, subprocess.Popen(script, shell=True, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return file, str(error)


@functools.cache
def softmax() -> str | None:
    """The name under which XLA knows the kernel, or None: this machine does not compile it."""
    import jax

    with contextlib.ExitStack() as stack:
        folder = jax.config.jax_compilation_cache_dir
        if not folder or "://" in folder:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="seqrec-"))
        file, work = start(folder)
        if isinstance(work, subprocess.Popen):
            _, said = work.communicate()
            work = said.strip()[-500:] if work.returncode else None
        try:
            if work:
                raise OSError(work)
            handler = jax.ffi.pycapsule(ctypes.CDLL(str(file)).softmax)
        except OSError as error:
            with contextlib.suppress(OSError):
                file.unlink()  # the next start tries again
            log.warning(
                "the softmax's kernel cannot be compiled, so XLA does its work and training takes longer (a C compiler "
                "named cc, or by the variable CC, would help): %s", error,
            )  # fmt: skip
            return None
    name = f"seqrec_jax_{file.stem}"
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return name


def is_own(file: Path) -> bool:
    """It is there, and this user's: what somebody else has written is not run."""
    return file.is_file() and file.stat().st_uid == os.getuid()


def processor() -> list[str]:
    """What tells this kind of CPU from others."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return [platform.machine(), platform.processor(), *sorted(facts)]
