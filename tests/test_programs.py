"""Kept programs: found again only where all that they are made from is the same, and then they compute the same."""

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqrec_jax import programs, run, systems, train_step
from seqrec_jax.config import load
from seqrec_jax.data.prepare import prepare
from seqrec_jax.sharding import make_mesh
from seqrec_jax.workdir import read_lines

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.max_epochs": 1, "report.baselines": "",
}  # fmt: skip


def train(workdir: Path, devices: int, **settings) -> tuple[list[dict], dict, str]:
    """A run in a process of its own: (its lines without times, its results' metrics, what it printed)."""
    flags = [f"--config.{key}={value}" for key, value in (TINY | settings).items()]
    done = subprocess.run(
        [sys.executable, "-m", "seqrec_jax.main", f"--config={ROOT / 'configs' / 'sasrec.py'}",
         f"--workdir={workdir}", *flags],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
    )  # fmt: skip
    lines = read_lines(workdir / "metrics.jsonl")
    results = json.loads((workdir / "results.json").read_text())
    timeless = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    return timeless, results["test"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_a_second_start_traces_nothing_and_computes_the_same(tmp_path, devices):
    mesh = {"mesh.data": 2, "mesh.model": 2} if devices == 4 else {}
    first = train(tmp_path / "first", devices, **mesh)
    second = train(tmp_path / "second", devices, **mesh)  # beside the first, so with its cache
    assert "train step: traced in" in first[2] and "found" not in first[2]
    assert "initial state: found in" in second[2] and "train step: found in" in second[2]
    assert "traced" not in second[2]
    assert second[:2] == first[:2]
    folder = tmp_path / ".cache" / "programs"
    assert len(list(folder.glob("*.program"))) == 3 and any(folder.glob("jit_counts-*")), "JAX's cache keeps the others"


@pytest.fixture
def parts(tmp_path):
    """What programs.kept reads; the folder is tmp_path."""
    config = load(str(ROOT / "configs" / "sasrec.py"), [(key, str(value)) for key, value in TINY.items()])
    mesh = make_mesh(1, 1)
    system = systems.build(config, prepare(config.data, tmp_path / "data"), mesh)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield system, config, mesh, "data"
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_program_is_named_by_all_that_it_is_made_from(parts, monkeypatch):
    system, config, mesh, data = parts
    kept = programs.kept(*parts)
    assert programs.kept(*parts) == kept
    other = load(str(ROOT / "configs" / "sasrec.py"), [("train.max_epochs", "3")])
    assert programs.kept(system, other, mesh, data).source != kept.source
    assert programs.kept(system, config, mesh, "others").source != kept.source
    with jax.default_matmul_precision("float32"):
        assert programs.kept(*parts).source != kept.source
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert programs.kept(*parts).compiler != kept.compiler
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_package", lambda: "edited")  # options of the compiler, which no traced text shows
        edited = programs.kept(*parts)
        assert edited.source != kept.source and edited.compiler != kept.compiler


def test_a_system_made_elsewhere_is_compiled_anew(parts):
    system, *others = parts
    assert programs.kept(dataclasses.replace(system, loss=lambda *_: 0.0), *others) is None
    strange = functools.partial(lambda *_: 0.0, 1)
    assert programs.kept(dataclasses.replace(system, loss=strange), *others) is None


def test_a_folder_elsewhere_is_left_to_jax(parts):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
    assert programs.kept(*parts) is None


@pytest.fixture
def keep(parts, caplog):
    """compile(function, x, source) with what was logged; every call traces `function` anew if it traces at all."""
    caplog.set_level(logging.INFO)
    kept = programs.kept(*parts)

    def compile_(function, x, **changes):
        caplog.clear()
        lower = functools.partial(jax.jit(lambda x: function(x)).lower, x)
        program = programs.compiling("a sum", lower, (x,), dataclasses.replace(kept, **changes)).result()
        return program(x), caplog.text

    return compile_


def test_one_program_serves_configs_that_differ_in_numbers_alone(keep, tmp_path):
    x = jnp.arange(3.0)
    assert "traced" in keep(jnp.sum, x)[1]
    assert "found" in keep(jnp.sum, x)[1]
    value, told = keep(jnp.sum, x, source="another config")
    assert "traced" in told and value == 3
    assert "found" in keep(jnp.sum, x, source="another config")[1]
    files = sorted(path.suffix for path in tmp_path.glob("a_sum*"))
    assert files == [".name", ".name", ".program"]
    assert keep(jnp.max, x, source="another function")[0] == 2
    keep(jnp.sum, x, source="edited", compiler="edited")
    assert len(list(tmp_path.glob("a_sum*.program"))) == 3, "the same text under another compiler is another program"
    assert "traced" in keep(jnp.sum, jnp.arange(4.0))[1], "another shape"
    assert "traced" in keep(jnp.sum, jnp.arange(3))[1], "another type"


def test_a_program_takes_arguments_that_it_does_not_read_in_their_shapes_alone(parts):
    """JAX leaves them out of a traced text, so that two layouts which differ in such an argument have the same."""
    kept, function = programs.kept(*parts), jax.jit(lambda x, unread: x + 1)
    for length in (5, 6):
        arguments = jnp.float32(1), jnp.zeros(length)
        lower = functools.partial(function.lower, *arguments)
        changed = dataclasses.replace(kept, source=f"a config with {length}")
        assert programs.compiling("one more", lower, arguments, changed).result()(*arguments) == 2


def test_a_damaged_file_is_told_and_made_anew(keep, tmp_path):
    x = jnp.arange(3.0)
    keep(jnp.sum, x)
    (file,) = tmp_path.glob("*.program")
    whole = file.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"nonsense"):
        file.write_bytes(damage)
        value, told = keep(jnp.sum, x)
        assert value == 3 and file.name in told and "compiled anew" in told
        assert "found" in keep(jnp.sum, x)[1]
    for damage in (b"nothing.program", b"", b"\xff"):
        next(tmp_path.glob("*.name")).write_bytes(damage)
        assert keep(jnp.sum, x)[0] == 3


def test_a_program_of_somebody_else_is_not_run(keep, monkeypatch):
    keep(jnp.sum, jnp.arange(3.0))
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert "traced" in keep(jnp.sum, jnp.arange(3.0))[1]


def test_a_kept_training_step_is_the_traced_one(parts, caplog):
    """Every number of the state after three steps, from programs traced, compiled and kept, and found."""
    caplog.set_level(logging.INFO)
    system, config, mesh, _ = parts
    layout = run.train_layout(config, prepare(config.data, programs.kept(*parts).folder / "data"), mesh)

    def after_three_steps(kept):
        caplog.clear()
        train_step._train_steps.cache_clear()
        state = train_step.init_state(system, config, mesh, kept)
        start = train_step.Start(system, config, mesh)
        program = train_step.compile_program(system, config, mesh, layout, 5, start, kept)
        program.wait()
        return *jax.device_get(program.run(state, 0, 3)), caplog.text.count("found in")

    (plain, sums, _), *others = [after_three_steps(kept) for kept in (None, *[programs.kept(*parts)] * 2)]
    assert [found for *_, found in others] == [0, 3]
    assert jax.config.jax_enable_compilation_cache, "off only while the three programs were compiled, at once"
    for state, others_sums, _ in others:
        jax.tree.map(np.testing.assert_array_equal, (state, others_sums), (plain, sums))


def test_kept_programs_serve_every_seed(parts, tmp_path):
    system, config, mesh, data = parts
    files = []
    for seed in (0, 2**31 - 1):
        other = config.copy_and_resolve_references()
        with other.unlocked():
            other.seed = seed
        state = train_step.init_state(system, other, mesh, programs.kept(system, other, mesh, data))
        expected = jax.jit(system.init)(jax.random.fold_in(jax.random.key(seed), 1))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.params, expected)
        files.append(sorted(tmp_path.rglob("*.program")))
    assert files[0] == files[1] and len(files[0]) == 1


def test_a_full_disk_is_told_and_the_program_runs(keep, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    value, told = keep(jnp.sum, jnp.arange(3.0))
    assert value == 3 and told.count("No space left on device") == 2  # its file and its name


def test_a_program_that_cannot_be_written_is_told_and_runs(keep, tmp_path):
    def through_the_host(x):
        return jax.pure_callback(lambda x: np.asarray(x) + 1, x, x)

    x = jnp.arange(3.0)
    for _ in range(2):
        value, told = keep(through_the_host, x)
        assert value.tolist() == [1, 2, 3] and "cannot be written" in told
    assert not any(tmp_path.glob("*.program"))


def test_jaxs_cache_is_off_until_the_last_of_several_is_compiled():
    for _ in range(2):
        with programs._no_cache:
            with programs._no_cache:
                assert not jax.config.jax_enable_compilation_cache
            assert not jax.config.jax_enable_compilation_cache
        assert jax.config.jax_enable_compilation_cache


def test_what_is_donated_stays_donated(parts, caplog):
    caplog.set_level(logging.INFO)
    x = jnp.arange(8.0)
    for turn, told in enumerate(("traced in", "found in")):
        given = x + turn
        caplog.clear()
        lower = functools.partial(jax.jit(lambda x: x + 1, donate_argnums=0).lower, given)
        program = programs.compiling("one more", lower, (given,), programs.kept(*parts)).result()
        np.testing.assert_array_equal(program(given), np.arange(8) + turn + 1)
        assert given.is_deleted() and told in caplog.text
