"""Training teaches something: better than popularity, a falling loss, and one program for all hyperparameters."""

import json
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from seqrec_jax import report, run, systems
from seqrec_jax.config import load
from seqrec_jax.data.batches import batch_of, epoch_key, plan_epoch
from seqrec_jax.data.prepare import prepare
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh, replicate
from seqrec_jax.systems import hparams_of
from seqrec_jax.train_step import NO_STEP, Start, compile_program, init_state, make_train_steps
from seqrec_jax.workdir import read_lines

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and compiled programs, one folder for the whole session."""
    return tmp_path_factory.getbasetemp() / "cache"


def test_sasrec_clears_popularity_and_its_loss_falls(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plots", lambda *_: None)
    settings = {
        "data.cache_dir": cache, "data.synthetic_users": 1000, "data.synthetic_items": 200, "encoder.max_length": 20,
        "encoder.dim": 32, "encoder.ffn": 64, "encoder.layers": 1, "encoder.embedding_dropout": 0.2,
        "encoder.hidden_dropout": 0.2, "train.batch_size": 64, "train.learning_rate": 0.005, "train.max_epochs": 8,
        "eval.every": 64,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    assert main([f"--config={ROOT / 'configs' / 'sasrec.py'}", f"--workdir={tmp_path}", *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    pop = results["baselines"]["pop"]["test"]
    assert results["test"]["ndcg@10"] > 1.5 * pop["ndcg@10"] and results["test"]["hr@10"] > 1.5 * pop["hr@10"]
    losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture
def tiny(cache):
    """(config, mesh, system, layout, plan, data, train_steps) of a tiny CL4SRec."""
    config = load(str(ROOT / "configs" / "cl4srec.py"), [(key, str(value)) for key, value in TINY.items()])
    mesh = make_mesh(1, 1)
    dataset = prepare(config.data, cache)
    system = systems.build(config, dataset, mesh)
    layout = run.train_layout(config, dataset, mesh)
    plan = plan_epoch(layout, epoch_key(config.seed, 0))
    return config, mesh, system, layout, plan, replicate(mesh, system.data), make_train_steps(system, config, mesh, 10)


def test_hyperparameters_are_traced(tiny):
    """One compiled program serves every learning rate, temperature, dropout and ratio; each of them has its effect."""
    config, mesh, system, layout, plan, data, train_steps = tiny
    hparams = hparams_of(config)

    def after_two_steps(**changes):
        state = init_state(system, config, mesh)
        state, sums = train_steps(state, jnp.int32(2), jnp.int32(0), layout, plan, data, hparams | changes)
        assert sums["bad_step"] == NO_STEP
        return np.asarray(state.params["items"])

    changes = {"learning_rate": 0.1, "temperature": 0.5, "embedding_dropout": 0.1, "hidden_dropout": 0.1,
               "contrast_weight": 0.7, "crop": 0.2, "mask": 0.9, "reorder": 0.1, "beta1": 0.5}  # fmt: skip
    unchanged = after_two_steps()
    assert np.array_equal(unchanged, after_two_steps())
    for name, value in changes.items():
        assert not np.array_equal(unchanged, after_two_steps(**{name: value})), name
    assert train_steps._cache_size() == 1


def test_runs_that_differ_in_hyperparameters_train_as_one_program(tiny):
    """vmap over the state and the hyperparameters: each lane is the run it would be alone."""
    config, mesh, system, layout, plan, data, train_steps = tiny
    lanes = [hparams_of(config) | changes for changes in ({"temperature": 1.0}, {"learning_rate": 0.01, "crop": 0.3})]
    alone = [
        train_steps(init_state(system, config, mesh), jnp.int32(3), jnp.int32(0), layout, plan, data, lane)[1]["loss"]
        for lane in lanes
    ]
    states = [init_state(system, config, mesh) for lane in lanes]
    state, hparams = (jax.tree.map(lambda *x: jnp.stack(x), *group) for group in (states, lanes))
    _, sums = jax.vmap(train_steps, (0, *[None] * 5, 0))(state, jnp.int32(3), jnp.int32(0), layout, plan, data, hparams)
    np.testing.assert_allclose(sums["loss"], alone, rtol=1e-5)


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(cache, loss):
    """One step over all users, dropout off."""
    changes = TINY | {"train.batch_size": 1000, "loss.next_item": loss, "loss.negatives": 40}
    found = []
    for packed in (True, False):
        given = [(key, str(value)) for key, value in (changes | {"train.packed": packed}).items()]
        config = load(str(ROOT / "configs" / "sasrec.py"), given)
        mesh = make_mesh(1, 1)
        dataset = prepare(config.data, cache)
        system = systems.build(config, dataset, mesh)
        layout = run.train_layout(config, dataset, mesh)
        assert layout.packed == packed and layout.steps == 1
        batch = batch_of(system.data["items_A"], layout, plan_epoch(layout, jax.random.key(1)), 0)
        hparams = hparams_of(config) | {"embedding_dropout": 0.0, "hidden_dropout": 0.0}
        value_and_gradients = jax.jit(jax.value_and_grad(lambda *a, s=system: s.loss(*a)[0]))
        arguments = (init_state(system, config, mesh).params, {}, batch, jax.random.key(2), hparams, system.data)
        found.append(value_and_gradients(*arguments))
    (value, gradients), (padded_value, padded_gradients) = found
    assert value == pytest.approx(float(padded_value), rel=1e-5)
    flat, padded_flat = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (gradients, padded_gradients))
    np.testing.assert_allclose(flat, padded_flat, rtol=0, atol=1e-5 * np.abs(padded_flat).max())


def test_nothing_is_copied_to_the_device_unnoticed(tiny):
    config, mesh, system, layout, *_ = tiny
    state = init_state(system, config, mesh)
    program = compile_program(system, config, mesh, layout, 10, Start(system, config, mesh))
    state, sums = program.run(state, 0, 2)
    assert int(state.step) == 2 and sums["bad_step"] == NO_STEP
    program.hparams["temperature"] = np.float32(1)
    with pytest.raises(Exception, match="[Dd]isallowed"):
        program.run(state, 2, 3)
