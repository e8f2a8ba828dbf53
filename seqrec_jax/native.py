"""Kernels for a CPU (kernels/*.c): compiled by this machine's own C compiler, and kept beside the compiled programs.

Without a compiler XLA does their work, the same in more passes over memory; a warning says so.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import secrets
import shlex
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = sorted((Path(__file__).parent / "kernels").glob("*.[ch]"))
NAMES = [path.stem for path in SOURCES if path.suffix == ".c"]
OPTIONS = (
    "-O2", "-shared", "-fPIC",
    # Vectors and short loops are written out: more would only take longer to compile. A sum of products is one of fused
    # operations, in its order, wherever it is made.
    "-ffp-contract=fast", "-fno-tree-vectorize",
    # ARM's need no option, and not all of its compilers take this one.
    *(() if platform.machine() in ("aarch64", "arm64") else ("-march=native",)),
)  # fmt: skip


@functools.cache
def start(folder: str) -> tuple[Path, subprocess.Popen | str | None]:
    """Begins to compile into `folder`, unless that is done. Returns the file, and who makes it or why nobody can."""
    headers = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
    compiler = os.environ.get("CC", "cc")
    texts = [path.read_text() for path in (*SOURCES, headers / "xla" / "ffi" / "api" / "c_api.h")]
    digest = hashlib.sha256("\0".join([*texts, compiler, *OPTIONS, *processor()]).encode()).hexdigest()
    file = Path(folder, f"kernels-{digest[:32]}.so")
    if is_own(file):
        return file, None
    part = str(file.with_name(f"{file.name}.{secrets.token_hex(4)}.part"))
    files = [str(path) for path in SOURCES if path.suffix == ".c"]
    arguments = shlex.join([*OPTIONS, f"-I{headers}", *files, "-lm", "-o", part])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        script = f"{compiler} {arguments} && mv {shlex.join([part, str(file)])}"  # ends well though we may not
        quiet = subprocess.DEVNULL
        return file, subprocess.Popen(script, shell=True, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return file, str(error)


def kernel(name: str) -> str | None:
    """The name under which XLA knows the kernel in `name`.c, or None: this machine does not compile it."""
    return kernels().get(name)


def ask(mesh) -> None:
    """For the kernels, by who trains or evaluates on `mesh`, before anything is traced."""
    if mesh.devices.flat[0].platform == "cpu":
        kernels()


def at_hand(name: str) -> str | None:
    """The same where kernels were asked for already; nobody else waits for them."""
    return kernel(name) if start.cache_info().currsize else None


@functools.cache
def kernels() -> dict[str, str]:
    """All of them, known to XLA from now on."""
    import jax

    folder, failure = jax.config.jax_compilation_cache_dir, None
    with tempfile.TemporaryDirectory(prefix="seqrec-") as temporary:  # where there is no folder, or no writing in it
        for place in (folder, temporary) if folder and "://" not in folder else (temporary,):
            file, work = start(place)
            try:
                if isinstance(work, subprocess.Popen):
                    _, said = work.communicate()
                    work = said.strip()[-500:] if work.returncode else None
                if work:
                    raise OSError(work)
                library = ctypes.CDLL(str(file))
                names = {name: f"{name}-{file.stem}" for name in NAMES}
                for name, target in names.items():
                    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
                return names
            except Exception as error:  # from the compiler, the loader or XLA; XLA can do without
                failure = failure or error
                with contextlib.suppress(OSError):
                    file.unlink()  # the next start makes it anew
    log.warning(
        "no kernels for this CPU, so XLA does their work, which takes longer (they need a C compiler named cc, or by "
        "the variable CC): %s", failure,
    )  # fmt: skip
    return {}


def is_own(file: Path) -> bool:
    """It is there, and this user's: what somebody else has written is not run."""
    return file.is_file() and file.stat().st_uid == os.getuid()


def processor() -> list[str]:
    """What tells this kind of CPU from others."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return [platform.machine(), platform.processor(), *sorted(facts)]


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
