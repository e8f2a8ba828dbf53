"""The C kernels are found by what they are made from; a machine without a compiler says so, and trains all the same."""

import subprocess

import jax
import pytest

from seqrec_jax import native


@pytest.fixture(autouse=True)
def afresh(monkeypatch, tmp_path):
    """As in a new process, with a cache of its own."""
    monkeypatch.setattr(native, "start", native.functools.cache(native.start.__wrapped__))
    monkeypatch.setattr(native, "kernels", native.functools.cache(native.kernels.__wrapped__))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)  # once a process
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_they_are_compiled_once_and_found_afterwards(tmp_path):
    folder = str(tmp_path / "cache")
    file, work = native.start(folder)
    if not isinstance(work, subprocess.Popen):
        pytest.skip(f"needs a C compiler: {work}")
    assert native.kernel("softmax") == f"softmax-{file.stem}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]
    native.start.cache_clear()
    assert native.start(folder) == (file, None)


def test_who_does_not_train_does_not_wait_for_them(tmp_path):
    assert native.at_hand("cells") is None and not (tmp_path / "cache").exists()
    assert native.kernel("cells") == native.at_hand("cells")


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_it_says_so(monkeypatch, caplog, tmp_path, compiler):
    monkeypatch.setenv("CC", compiler)
    assert not native.kernels()
    assert "C compiler" in caplog.text and "takes longer" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("fault", ["torn", "no folder"])
def test_a_file_that_cannot_be_used_is_made_anew(tmp_path, fault):
    cache = tmp_path / "cache"
    file, work = native.start(str(cache))
    if not isinstance(work, subprocess.Popen):
        pytest.skip(f"needs a C compiler: {work}")
    work.communicate()
    native.start.cache_clear()
    if fault == "torn":
        file.write_bytes(b"torn")
    else:
        file.unlink()
        cache.rmdir()
        cache.touch()
    assert native.kernel("softmax") == f"softmax-{file.stem}"  # of a temporary folder
    assert not file.exists() and not list(tmp_path.parent.glob("seqrec-*"))


def test_another_source_or_compiler_is_another_file(monkeypatch, tmp_path):
    monkeypatch.setattr(native.subprocess, "Popen", lambda *_, **__: None)
    files = {native.start(str(tmp_path))[0]}
    monkeypatch.setattr(native, "OPTIONS", (*native.OPTIONS, "-DX"))
    native.start.cache_clear()
    files.add(native.start(str(tmp_path))[0])
    monkeypatch.setenv("CC", "other")
    native.start.cache_clear()
    files.add(native.start(str(tmp_path))[0])
    assert len(files) == 3
