"""What every test shares. The environment is set before anything imports JAX."""

import os
import tempfile
from pathlib import Path

import pytest

# Collectives over several simulated CPU devices can deadlock JAX 0.10.2 on few cores with its default thread pool.
os.environ.setdefault("PJRT_NPROC", "16")


def pytest_configure(config: pytest.Config) -> None:
    """Each worker, and every process its tests start, compiles a program once; JAX does not write atomically. The quick
    suite is many small programs, most of whose time is LLVM's optimizations: it goes without them.
    """
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(params=["kernel", "XLA"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What has a kernel for a CPU, by the kernel and by XLA."""
    import jax

    from seqrec_jax import native

    if request.param == "XLA":
        monkeypatch.setattr(native, "kernels", dict)
    elif jax.default_backend() != "cpu" or not native.kernels():
        pytest.skip("needs a CPU and a C compiler")
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the published data sets: SEQREC_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SEQREC_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the published data sets are not here: {folder} is no folder; set SEQREC_DATA")
    return folder
