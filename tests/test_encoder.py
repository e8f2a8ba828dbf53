"""The Transformer against a numpy float64 statement of it, and what may see what by exact gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import base
from seqrec_jax.data.batches import Batch
from seqrec_jax.encoders import transformer

LENGTH, DIM = 6, 4
start = jax.jit(transformer.init, static_argnums=(1, 2))
RATES = {"embedding_dropout": 0.0, "hidden_dropout": 0.0}


def config_of(original=False, layers=1, **changes):
    config = base.get_config()
    if original:
        base.original_backbone(config)
    config.encoder.update(max_length=LENGTH, dim=DIM, heads=2, ffn=5, layers=layers, init_scale=0.5, **changes)
    return FrozenConfigDict(config.encoder)


def batch_of(segments):
    """Rows with these segments; positions count from the left edge of the row."""
    segments = np.array(segments)
    items = np.where(segments > 0, np.arange(segments.size).reshape(segments.shape) % 20 + 1, 0)
    ends = [np.flatnonzero(segments == s)[-1] for s in range(1, segments.max() + 1)]
    last = jnp.array(ends)
    ones = jnp.ones(len(ends), jnp.int32)
    return Batch(
        items_RxL=jnp.array(items), segments_RxL=jnp.array(segments), targets_RxL=jnp.zeros_like(items),
        positions_RxL=jnp.broadcast_to(jnp.arange(LENGTH), segments.shape), users_U=ones, start_U=ones,
        length_U=ones, row_U=last // LENGTH, column_U=last % LENGTH,
    )  # fmt: skip


def parameters(config):
    """Fresh parameters with random biases and norms, so that none of them can be forgotten."""
    params = start(jax.random.key(0), config, 20)
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * generator.normal(size=x.shape).astype(np.float32), params)


def influence(config, segments, causal=True):
    """[cell out, cell in]: the largest |derivative| of any state entry with respect to any embedding entry."""
    model, batch = transformer.Transformer(config, causal), batch_of(segments)
    params = {"params": parameters(config)["encoder"]}
    embedded = np.random.default_rng(1).normal(size=(*batch.items_RxL.shape, DIM)).astype(np.float32)
    run = lambda x: model.apply(params, x, batch.positions_RxL, batch.segments_RxL, None, 0.0, 0.0)  # noqa: E731
    jacobian = np.asarray(jax.jit(jax.jacrev(run))(embedded))
    cells = batch.items_RxL.size
    return np.abs(jacobian.reshape(cells, DIM, cells, DIM)).max(axis=(1, 3))


# What sees what -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("original", "filter_"), [(False, 0.0), (True, 0.0), (False, 0.7)])
def test_a_causal_state_depends_on_the_past_alone(original, filter_):
    seen = influence(config_of(original, filter=filter_), [[1] * LENGTH])
    allowed = np.tril(np.ones((LENGTH, LENGTH), bool))
    assert (seen[~allowed] == 0).all() and (seen[allowed] > 0).all()


def test_a_bidirectional_state_depends_on_the_whole_history():
    assert (influence(config_of(), [[1] * LENGTH], causal=False) > 0).all()


@pytest.mark.parametrize(("causal", "filter_"), [(True, 0.0), (False, 0.0), (True, 0.7), (False, 0.7)])
def test_packed_histories_do_not_see_each_other_nor_padding(causal, filter_):
    segments = np.array([[2, 2, 0, 1, 1, 1], [3, 0, 4, 4, 4, 0]])
    seen = influence(config_of(filter=filter_), segments, causal)
    flat = segments.ravel()
    same = (flat[:, None] == flat[None]) & (flat > 0)
    allowed = same & (np.tril(np.ones((12, 12), bool)) if causal else True)
    real = flat > 0
    assert (seen[real] > 0).tolist() == allowed[real].tolist()


@pytest.mark.parametrize("filter_", [0.0, 0.7])
def test_a_packed_history_has_the_state_it_has_alone(filter_):
    config = config_of(filter=filter_, filter_width=2)
    params = parameters(config)
    encode = jax.jit(lambda batch: transformer.encode(params, batch, config, None, RATES))
    packed = batch_of([[1, 1, 2, 2, 2, 0]])
    alone = batch_of([[0, 0, 1, 1, 1, 0]])
    noisy = alone.replace(items_RxL=alone.items_RxL.at[0, 5].set(7), positions_RxL=alone.positions_RxL.at[0, 0].set(5))
    states = encode(packed)[0, 2:5]
    alone = alone.replace(items_RxL=packed.items_RxL * (alone.segments_RxL > 0))
    np.testing.assert_allclose(encode(alone)[0, 2:5], states, rtol=1e-5, atol=1e-6)
    assert (encode(noisy)[0, 2:5] == encode(alone)[0, 2:5]).all()  # whatever stands in padding


@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention_is_plain_attention(causal):
    segments = np.array([[2, 2, 0, 1, 1, 1], [3, 0, 4, 4, 4, 0]])
    params, batch = parameters(config_of()), batch_of(segments)
    real = jnp.array(segments > 0)[..., None]

    def loss(params, config):
        hidden = transformer.encode(params, batch, config, None, RATES, causal=causal)
        return (jnp.where(real, hidden, 0) ** 3).sum(), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (plain, fused) = (run(params, config_of(attention=kind)) for kind in ("plain", "fused"))
    np.testing.assert_allclose(fused[0][1][segments > 0], plain[0][1][segments > 0], rtol=1e-5, atol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (fused[1], plain[1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_last_states_are_those_of_the_last_items():
    batch = batch_of([[1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 3, 4]])
    hidden = jnp.arange(2 * LENGTH * 3.0).reshape(2, LENGTH, 3)
    assert transformer.last_states(hidden, batch).tolist() == [
        hidden[row, column].tolist() for row, column in ((0, 1), (0, 4), (1, 4), (1, 5))
    ]


@pytest.mark.parametrize(("norm", "filter_"), [("post", 0.0), ("pre", 0.0), ("query", 0.0), ("post", 0.7)])
def test_the_last_states_alone_are_the_same(norm, filter_):
    config = config_of(layers=2, norm=norm, final_norm=True, filter=filter_, filter_width=2)
    batch = batch_of([[1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 3, 4]])
    params = parameters(config)
    of_all = transformer.last_states(transformer.encode(params, batch, config, None, RATES), batch)
    alone = transformer.encode(params, batch, config, None, RATES, last_only=True)
    np.testing.assert_allclose(alone, of_all, rtol=1e-5, atol=1e-6)


# The formula ----------------------------------------------------------------------------------------------------------


def norm(x, p, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attention(query, others, p, heads, visible):
    """Head by head, cell by cell."""
    q, k, v = dense(query, p["query"]), dense(others, p["key"]), dense(others, p["value"])
    width, mixed = q.shape[1] // heads, np.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for cell in range(len(q)):
            seen = np.flatnonzero(visible[cell])
            weight = np.exp(k[seen, part] @ q[cell, part] / math.sqrt(width))
            mixed[cell, part] = weight / weight.sum() @ v[seen, part]
    return dense(mixed, p["output"])


def feed_forward(x, p, activation):
    gelu = np.vectorize(lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))))
    inner = dense(x, p["inner"])
    return dense(gelu(inner) if activation == "gelu" else np.maximum(inner, 0), p["outer"])


def filtered(x, p, config, visible):
    """Cell by cell: the mean of the latest that it sees, and what is left of it times a factor a dimension."""
    found = np.zeros_like(x)
    for cell in range(len(x)):
        near = [c for c in np.flatnonzero(visible[cell]) if abs(c - cell) < config.filter_width]
        low = sum(x[c] for c in near) / len(near)
        found[cell] = low + p["filter"] ** 2 * (x[cell] - low)
    return found


def block(x, p, config, visible):
    epsilon, share = config.norm_epsilon, config.filter
    if config.norm == "post":
        attended = norm(x + attention(x, x, p, config.heads, visible), p["norm_attention"], epsilon)
        if share:
            beside = norm(x + filtered(x, p, config, visible), p["norm_filter"], epsilon)
            attended = share * beside + (1 - share) * attended
        return norm(attended + feed_forward(attended, p, config.activation), p["norm_ffn"], epsilon)
    if config.norm == "pre":
        y = norm(x, p["norm_attention"], epsilon)
        mixed = (1 - share) * attention(y, y, p, config.heads, visible)
        x = x + mixed + (share * filtered(y, p, config, visible) if share else 0)
        return x + feed_forward(norm(x, p["norm_ffn"], epsilon), p, config.activation)
    query = norm(x, p["norm_attention"], epsilon)  # SASRec: keys and values are not normed, the residual is
    mixed = (1 - share) * attention(query, x, p, config.heads, visible)
    mixed += share * filtered(x, p, config, visible) if share else 0
    x = norm(query + mixed, p["norm_ffn"], epsilon)
    return x + feed_forward(x, p, config.activation)


@pytest.mark.parametrize(
    ("name", "activation", "share"),
    [
        *(("post", "gelu", 0.0), ("post", "relu", 0.0), ("pre", "gelu", 0.0), ("query", "relu", 0.0)),
        *(("post", "gelu", 0.7), ("pre", "gelu", 0.3), ("query", "relu", 0.7)),
    ],
)
def test_a_block_equals_its_formula(name, activation, share):
    config = config_of(norm=name, activation=activation, filter=share, filter_width=3)
    p = parameters(config)["encoder"]["block_0"]
    x = np.random.default_rng(2).normal(size=(LENGTH, DIM))
    visible = np.tril(np.ones((LENGTH, LENGTH), bool))
    model = transformer.Block(config)
    found = jax.jit(lambda x: model.apply({"params": p}, x, visible[None], None, 0.0))(x[None].astype(np.float32))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    np.testing.assert_allclose(found[0], block(x, wide, config, visible), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("original", [False, True])
def test_the_encoder_equals_its_formula(original):
    config = config_of(original, layers=2)
    params = parameters(config)
    batch = batch_of([[1, 1, 1, 1, 0, 0]])
    found = jax.jit(lambda b: transformer.encode(params, b, config, None, RATES))(batch)[0, :4]
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    p, x = wide["encoder"], wide["items"][np.asarray(batch.items_RxL[0, :4])]
    x = (x * math.sqrt(DIM) if original else x) + p["positions"][:4]
    x = x if original else norm(x, p["norm_input"], config.norm_epsilon)
    for layer in range(2):
        x = block(x, p[f"block_{layer}"], config, np.tril(np.ones((4, 4), bool)))
    x = norm(x, p["norm_output"], config.norm_epsilon) if original else x
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_close_to_float32_and_keeps_float32_outside():
    batch, states = batch_of([[1, 1, 1, 2, 2, 0]]), {}
    for dtype in ("float32", "bfloat16"):
        config = config_of(dtype=dtype)
        params = parameters(config)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        states[dtype] = jax.jit(lambda b, p=params, c=config: transformer.encode(p, b, c, None, RATES))(batch)[0, :5]
        assert states[dtype].dtype == jnp.float32
    gap = np.abs(states["float32"] - states["bfloat16"]).max()
    assert 0 < gap < 0.1


# Start and dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "bound", "spread"), [("truncated_normal", 1.0, 0.5397), ("normal", 6.0, 1.0)])
def test_tables_and_kernels_start_within_their_bounds(init, bound, spread):
    config = config_of(init=init, layers=2)
    params = start(jax.random.key(0), config, 2000)
    assert params["items"].shape == (2048, DIM)
    block = params["encoder"]["block_1"]
    drawn = [params["items"], params["encoder"]["positions"], block["query"]["kernel"], block["inner"]["kernel"]]
    assert all(np.abs(x).max() <= bound * 0.5 for x in drawn)
    assert np.std(params["items"]) == pytest.approx(spread * 0.5, rel=0.03)
    entries = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params["encoder"]) if leaf.ndim == 2])
    assert np.std(entries) == pytest.approx(spread * 0.5, rel=0.1) and len(np.unique(entries)) == len(entries)
    assert not block["query"]["bias"].any() and (block["norm_ffn"]["scale"] == 1).all()
    assert not np.array_equal(block["query"]["kernel"], params["encoder"]["block_0"]["query"]["kernel"])


def test_the_table_has_room_for_padding_and_the_mask_and_divides():
    for items in (1, 61, 62, 63, 64, 126, 127, 12101):
        rows = transformer.table_rows(items)
        assert rows % 64 == 0 and items + 2 <= rows < items + 2 + 64


@pytest.mark.usefixtures("form")
def test_a_vector_is_split_into_its_parts():
    """In both forms, alone and side by side: in order, of any shape, among them none at all."""
    shapes = [(), (2, 3), (0, 4), (5,), (1, 1, 2), ()]
    for dtype in (np.float32, np.uint32):
        whole_2xN = np.arange(30).reshape(2, 15).astype(dtype)
        found = jax.jit(jax.vmap(lambda vector: transformer.split(vector, shapes)))(whole_2xN)
        assert [part.shape for part in found] == [(2, *shape) for shape in shapes]
        np.testing.assert_array_equal(np.concatenate([part.reshape(2, -1) for part in found], axis=1), whole_2xN)
        assert {part.dtype for part in found} == {np.dtype(dtype)}


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    drop, (words,) = jax.jit(transformer.dropout), transformer.words_of(jax.random.split(jax.random.key(1), 1))
    x = np.full((200, 200), 3.0, np.float32)
    for rate in (0.0, 0.1, 0.5, 0.9):
        y = np.asarray(drop(words, x, rate))
        assert abs((y == 0).mean() - rate) < 0.01 and y.mean() == pytest.approx(3, rel=0.03)
        np.testing.assert_allclose(y[y != 0], 3 / (1 - rate), rtol=1e-4)
    assert drop._cache_size() == 1
    assert transformer.dropout(None, x, 0.5) is x


def test_dropout_masks_are_independent():
    """Of neighbours, of cells a row or a feature apart, and of any two keys: correlations are those of chance."""
    ones, keys = np.ones((512, 64), np.float32), jax.random.split(jax.random.key(0), 12)
    drop, words_K = jax.jit(transformer.dropout), transformer.words_of(keys)
    masks = np.array([np.sign(drop(words, ones, 0.5) - 0.5).ravel() for words in words_K])
    chance = 5 / np.sqrt(ones.size)
    assert (np.abs(masks.mean(axis=1)) < chance).all()
    assert (np.abs(masks @ masks.T / ones.size - np.eye(12)) < chance).all()
    for lag in (1, 2, 3, 32, 64, 128, 1024):
        assert (np.abs((masks[:, lag:] * masks[:, :-lag]).mean(axis=1)) < chance).all()


def test_dropout_of_the_encoder_follows_its_key_and_its_rates():
    config = config_of()
    params, batch = parameters(config), batch_of([[1, 1, 1, 2, 2, 2]])
    encode = jax.jit(lambda key, hparams: transformer.encode(params, batch, config, key, hparams))
    plain = encode(None, RATES)
    one, other = jax.random.split(jax.random.key(0))
    np.testing.assert_allclose(encode(one, RATES), plain, rtol=1e-5, atol=1e-6)
    for name in RATES:
        dropped = encode(one, RATES | {name: 0.5})
        assert not np.allclose(dropped, plain, atol=1e-3)
        assert not np.allclose(dropped, encode(other, RATES | {name: 0.5}), atol=1e-3)
    assert encode._cache_size() == 2  # with and without a key; rates compile nothing
