"""The GRU against a numpy float64 statement of it, one history at a time, and as GRU4Rec."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import base
from seqrec_jax import encoders, report, run, systems
from seqrec_jax.config import load
from seqrec_jax.data.batches import Batch, batch_at
from seqrec_jax.data.prepare import prepare
from seqrec_jax.encoders import gru
from seqrec_jax.errors import UserError
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh
from seqrec_jax.systems import hparams_of
from seqrec_jax.workdir import read_lines

ROOT = Path(__file__).resolve().parents[1]
LENGTH, DIM = 6, 3
SEGMENTS = np.array([[2, 2, 0, 1, 1, 1], [3, 4, 4, 4, 4, 0]])  # 0 = padding; neighbours without a gap, too
RATES = {"embedding_dropout": 0.0, "hidden_dropout": 0.0}
ITEMS = np.where(SEGMENTS > 0, np.arange(SEGMENTS.size).reshape(SEGMENTS.shape) % 20 + 1, 0)
BATCH = Batch(
    items_RxL=jnp.array(ITEMS), segments_RxL=jnp.array(SEGMENTS), targets_RxL=jnp.zeros_like(ITEMS),
    positions_RxL=jnp.zeros_like(ITEMS), **dict.fromkeys(("users_U", "start_U", "length_U", "row_U", "column_U")),
)  # fmt: skip


def config_of(**changes):
    config = base.get_config().encoder
    config.update(kind="gru", max_length=LENGTH, dim=DIM, layers=2, init_scale=0.5, **changes)
    return FrozenConfigDict(config)


@pytest.fixture(scope="module")
def params():
    """Fresh parameters with random biases, so that none of them can be forgotten."""
    made = jax.jit(encoders.init, static_argnums=(1, 2))(jax.random.key(0), config_of(), 20)
    assert made["items"].shape == (64, DIM) and set(made["encoder"]) == {"layer_0", "layer_1"}
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * generator.normal(size=x.shape).astype(np.float32), made)


def recurrence(x_LxD, p):
    """Cho et al. (2014), with the reset gate inside the candidate's matrix product, from a state of zeros."""
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    of = {name: (np.asarray(q["kernel"], float), np.asarray(q.get("bias", 0.0), float)) for name, q in p.items()}
    state, states = np.zeros(DIM), []
    for x in np.asarray(x_LxD, float):
        (r, z), n = (sigmoid(x @ of[f"i{g}"][0] + of[f"i{g}"][1] + state @ of[f"h{g}"][0]) for g in "rz"), of["hn"]
        candidate = np.tanh(x @ of["in"][0] + of["in"][1] + r * (state @ n[0] + n[1]))
        state = (1 - z) * candidate + z * state
        states.append(state)
    return np.array(states)


def test_each_packed_history_follows_the_recurrence_alone(params):
    hidden = np.asarray(jax.jit(lambda p: encoders.encode(p, BATCH, config_of(), None, RATES))(params))
    for segment in (1, 2, 3, 4):
        x = np.asarray(params["items"])[ITEMS[segment == SEGMENTS]]
        for layer in ("layer_0", "layer_1"):
            x = recurrence(x, params["encoder"][layer])
        np.testing.assert_allclose(hidden[segment == SEGMENTS], x, rtol=1e-4, atol=1e-5)
    places = {"row_U": [0, 0, 1, 1], "column_U": [3, 0, 0, 1], "length_U": [3, 2, 1, 4]}
    batch = BATCH.replace(**{name: np.array(values) for name, values in places.items()})
    last = encoders.encode(params, batch, config_of(), None, RATES, last_only=True)
    np.testing.assert_allclose(last, hidden[[0, 0, 1, 1], [5, 1, 0, 4]], rtol=1e-5, atol=1e-6)


def test_gradients_stay_in_their_history_and_flow_back_alone(params):
    model = gru.GRU(config_of())
    embedded = np.asarray(params["items"])[ITEMS]
    states = lambda x: model.apply({"params": params["encoder"]}, x, BATCH.segments_RxL, None, 0.0, 0.0)  # noqa: E731
    jacobian = np.asarray(jax.jit(jax.jacrev(states))(embedded)).reshape(12, DIM, 12, DIM)
    flat = SEGMENTS.ravel()
    allowed = (flat[:, None] == flat) & np.tri(12, dtype=bool)
    real = flat > 0
    assert (np.abs(jacobian).max(axis=(1, 3))[real] > 0).tolist() == allowed[real].tolist()


def test_dropout_follows_its_key_and_its_rates(params):
    encode = jax.jit(lambda key, hparams: encoders.encode(params, BATCH, config_of(), key, hparams))
    plain, (one, other) = encode(None, RATES), jax.random.split(jax.random.key(0))
    np.testing.assert_allclose(encode(one, RATES), plain, rtol=1e-5, atol=1e-6)
    for name in RATES:
        dropped = encode(one, RATES | {name: 0.5})
        assert not np.allclose(dropped, plain, atol=1e-3)
        assert not np.allclose(dropped, encode(other, RATES | {name: 0.5}), atol=1e-3)
    assert encode._cache_size() == 2  # with and without a key; rates compile nothing


def test_bfloat16_inside_float32_outside(params):
    encode = jax.jit(lambda p: encoders.encode(p, BATCH, config_of(dtype="bfloat16"), None, RATES))
    exact = encoders.encode(params, BATCH, config_of(), None, RATES)
    assert encode(params).dtype == jnp.float32 and 0 < np.abs(encode(params) - exact).max() < 0.05


def test_bidirectional_is_refused_before_any_work():
    for call in (
        lambda: encoders.init(jax.random.key(0), config_of(), 20, causal=False),
        lambda: encoders.encode({}, None, config_of(), None, {}, causal=False),
    ):
        with pytest.raises(UserError, match="encoder.kind=gru .* cannot be bidirectional.*encoder.kind=transformer"):
            call()


@pytest.mark.parametrize("name", ["sasrec", "sasrec_aug", "cl4srec", "duorec"])
def test_every_system_trains_the_encoder_of_its_config(tmp_path_factory, name):
    tiny = {"data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.kind": "gru", "train.batch_size": 24}
    config = load(str(ROOT / "configs" / f"{name}.py"), [(key, str(value)) for key, value in tiny.items()])
    dataset, mesh = prepare(config.data, tmp_path_factory.getbasetemp() / "cache"), make_mesh(1, 1)
    system, layout = systems.build(config, dataset, mesh), run.train_layout(config, dataset, mesh)
    params = jax.eval_shape(system.init, jax.random.key(0))
    assert all(layer.startswith("layer_") for layer in params["encoder"])
    step = lambda data: (batch_at(data["items_A"], layout, 0, 0), jax.random.key(0), hparams_of(config), data)  # noqa: E731
    gradients = jax.eval_shape(
        lambda params, data: jax.grad(lambda p: system.loss(p, {}, *step(data))[0])(params), params, system.data
    )
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)


@pytest.mark.slow
def test_gru4rec_learns(tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.setattr(report, "plots", lambda *_: None)
    settings = {
        "data.cache_dir": tmp_path_factory.getbasetemp() / "cache", "data.synthetic_users": 1000,
        "data.synthetic_items": 200, "encoder.max_length": 20, "encoder.dim": 32, "train.batch_size": 64,
        "train.learning_rate": 0.01, "train.max_epochs": 8, "eval.every": 64,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    assert main([f"--config={ROOT / 'configs' / 'gru4rec.py'}", f"--workdir={tmp_path}", *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    pop = results["baselines"]["pop"]["test"]
    assert results["test"]["ndcg@10"] > 1.5 * pop["ndcg@10"] and results["test"]["hr@10"] > 1.5 * pop["hr@10"]
    losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    assert results["system"] == "sasrec gru" and "\nsasrec gru (test)" in capsys.readouterr().out
    assert json.loads((tmp_path / "baselines" / "pop" / "results.json").read_text())["system"] == "pop"
