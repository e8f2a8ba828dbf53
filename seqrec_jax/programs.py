"""Compiled programs kept in files, so that a run whose programs exist starts without tracing them.

JAX's own cache is asked with a traced program, and tracing takes longer than the rest of a warm start. Here a program
is found by what it is made from: this package's files, the config, the data, versions, devices and the shapes of its
arguments. Where that is new, it is traced and found by its text, which serves runs that differ in numbers alone.
"""

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import native
from seqrec_jax.config import config_hash
from seqrec_jax.systems import System

log = logging.getLogger(__name__)

VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@dataclasses.dataclass(frozen=True)
class Kept:
    """The programs of one run."""

    folder: Path
    source: str  # a digest of all that they are made from, but for the arguments
    compiler: str  # a digest of what compiles a traced text: this package's options, versions, the machine
    mesh: Mesh


def kept(system: System, config: ConfigDict, mesh: Mesh, data_hash: str) -> Kept | None:
    """The programs of a run, beside those of JAX's own cache. None (they are traced, and that cache keeps them) for
    several processes, for a folder that is no local one, and for a system from outside this package, because nobody
    knows what that is made from.
    """
    folder = jax.config.jax_compilation_cache_dir
    local = folder and "://" not in folder
    if not local or jax.process_count() > 1 or system.loss.__module__.split(".")[0] != __package__:
        return None
    compiler = _digest(_machine(mesh), _package())
    return Kept(Path(folder), _digest(compiler, config_hash(config), data_hash), compiler, mesh)


def compiling(name: str, lower: Callable[[], jax.stages.Lowered], arguments: tuple, kept: Kept | None = None) -> Future:
    """The program that `lower` traces for `arguments` (jax.stages.Compiled), from its file or compiled, which is done
    in a thread while the caller goes on; logs how long that took. A file that cannot be used is reported and made anew.
    """
    began = time.perf_counter()
    pointer = kept and kept.folder / f"{_stem(name)}-{_digest(kept.source, *_shapes(arguments))}.name"
    lowered = None if pointer and native.is_own(pointer) else lower()

    def program():
        if lowered is None:
            found = _load(kept.folder / pointer.read_text(errors="replace"), kept)
            if found:
                log.info("%s: found in %.1f s%s", name, time.perf_counter() - began, _memory(found))
                return found
        return _made(name, began, lowered or lower(), pointer, kept)

    if kept is None:  # and perhaps several processes, which must compile in one order
        future = Future()
        future.set_result(program())
        return future
    with_one_thread = ThreadPoolExecutor(1, "compiling")
    try:
        return with_one_thread.submit(program)
    finally:
        with_one_thread.shutdown(wait=False)


def _made(name, began, lowered, pointer, kept):
    traced = time.perf_counter()
    if kept is None:
        program = lowered.compile()
    else:
        # Arguments that the text does not read are not in it, and a program takes them in their shapes alone.
        digest = _digest(kept.compiler, lowered.as_text(), str(lowered.args_info), str(lowered.out_tree))
        file = kept.folder / f"{_stem(name)}-{digest}.program"
        program = _load(file, kept)
        if not program:
            with _no_cache:
                program = lowered.compile()
            _keep(file, lambda: pickle.dumps(serialize_executable.serialize(program)))
        _keep(pointer, file.name.encode)
    times = traced - began, time.perf_counter() - traced
    log.info("%s: traced in %.1f s, compiled in %.1f s%s", name, *times, _memory(program))
    return program


class _NoCache:
    """While any thread is inside, JAX's cache is off: what it finds cannot be written. It remembers from its first use
    whether it is enabled.
    """

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.before = jax.config.jax_enable_compilation_cache
                self._enable(False)
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self._enable(self.before)

    @staticmethod
    def _enable(value):
        jax.config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()


_no_cache = _NoCache()


def _stem(name: str) -> str:
    return name.replace(" ", "_")


def _load(file: Path, kept: Kept):
    if not native.is_own(file):
        return None
    try:
        payload, in_tree, out_tree = pickle.loads(file.read_bytes())
        devices = list(kept.mesh.devices.flat)
        return serialize_executable.deserialize_and_load(payload, in_tree, out_tree, execution_devices=devices)
    except Exception as error:  # of many kinds, from pickle to XLA
        log.warning("%s cannot be used (%s): compiled anew", file, _line(error))
        return None


def _keep(file: Path, content: Callable[[], bytes]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_bytes(content())
        os.replace(part, file)
    except Exception as error:  # from pickle, XLA or the disk; the run needs none of them
        log.warning("%s cannot be written (%s): the next start compiles it anew", file, _line(error))


def _line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _memory(program) -> str:
    memory = program.memory_analysis()
    return f", {memory.temp_size_in_bytes / 2**20:.0f} MiB of temporary memory" if memory else ""


def _shapes(arguments) -> list[str]:
    leaves, structure = jax.tree.flatten(arguments)
    return [str(structure), *(f"{jax.typeof(leaf)} {leaf.sharding}" for leaf in leaves)]


def _machine(mesh: Mesh) -> str:
    devices = list(mesh.devices.flat)
    flags = sorted((name, str(value)) for name, value in jax.config.values.items() if "compilation_cache" not in name)
    kernels = native.kernels() if devices[0].platform == "cpu" else {}  # known to XLA before a program that calls them
    facts = (
        devices[0].client.platform_version, devices, [device.device_kind for device in devices], flags, kernels,
        native.processor(), os.cpu_count(), [importlib.metadata.version(name) for name in VERSIONS],
        [os.environ.get(name) for name in ENVIRONMENT],
    )  # fmt: skip
    return _digest(*map(str, facts))


def _package() -> str:
    folder = Path(__file__).parent
    files = sorted([*folder.rglob("*.py"), *native.SOURCES])
    return _digest(*(f"{path.relative_to(folder)}\n{path.read_text()}" for path in files))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
