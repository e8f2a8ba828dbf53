"""The C kernel is found by what it is made from; a machine that cannot compile it says so, and trains all the same."""

import subprocess

import jax
import pytest

from seqrec_jax import native


@pytest.fixture(autouse=True)
def afresh(monkeypatch, tmp_path):
    """As in a new process, with a cache of its own."""
    monkeypatch.setattr(native, "start", native.functools.cache(native.start.__wrapped__))
    monkeypatch.setattr(native, "softmax", native.functools.cache(native.softmax.__wrapped__))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)  # once a process
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_it_is_compiled_once_and_found_afterwards(tmp_path):
    folder = str(tmp_path / "cache")
    file, work = native.start(folder)
    if not isinstance(work, subprocess.Popen):
        pytest.skip(f"needs a C compiler: {work}")
    assert native.softmax() == f"seqrec_jax_{file.stem}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]
    native.start.cache_clear()
    assert native.start(folder) == (file, None)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_it_says_so(monkeypatch, caplog, tmp_path, compiler):
    monkeypatch.setenv("CC", compiler)
    assert native.softmax() is None
    assert "C compiler" in caplog.text and "training takes longer" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_a_torn_file_is_reported_and_made_anew_by_the_next_start(caplog, tmp_path):
    file, work = native.start(str(tmp_path / "cache"))
    if not isinstance(work, subprocess.Popen):
        pytest.skip(f"needs a C compiler: {work}")
    work.communicate()
    file.write_bytes(b"torn")
    native.start.cache_clear()
    assert native.softmax() is None and str(file) in caplog.text and not file.exists()


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
