"""Losses and their gradients against float64 numpy: values by definition, gradients by central differences."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from seqrec_jax import native
from seqrec_jax.data import batches
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.losses import fused, negatives, next_item, softmax
from seqrec_jax.losses.contrastive import info_nce
from seqrec_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[1]
MESH = make_mesh(1, 1)

ITEMS, ROWS, DIM = 13, 16, 3  # row 0 is padding, rows 14 and 15 are special
TARGETS = np.array([0, 3, 13, 0, 0, 3, 1, 7, 0, 12, 5, 3, 0, 9, 2, 0, 6])  # 11 real ones


def arrays(seed=0, scale=1.0, junk=50.0):
    """(hidden_NxD, items_VxD), with `junk` in the rows where no item is: a loss that looks at them shows it."""
    generator = np.random.default_rng(seed)
    hidden, items = generator.normal(size=(len(TARGETS), DIM)) * scale, generator.normal(size=(ROWS, DIM))
    items[[0, 14, 15]] = junk
    return hidden.astype(np.float32), items.astype(np.float32)


def numeric_gradient(function, x, step=1e-5):
    x = x.astype(np.float64)
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        high, low = x.copy(), x.copy()
        high[place] += step
        low[place] -= step
        gradient[place] = (function(high) - function(low)) / (2 * step)
    return gradient


def assert_matches(loss, oracle, *inputs):
    """Value and the gradients with respect to all inputs."""
    value, gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs)))))(*map(jnp.asarray, inputs))
    wide = [x.astype(np.float64) for x in inputs]
    np.testing.assert_allclose(value, oracle(*wide), rtol=2e-5, atol=1e-6)
    for place, gradient in enumerate(gradients):
        expected = numeric_gradient(lambda x, i=place: oracle(*wide[:i], x, *wide[i + 1 :]), wide[place])
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-5)


def cross_entropy(scores, positive):
    """−log softmax of entry `positive`."""
    top = scores.max()
    return np.log(np.exp(scores - top).sum()) + top - scores[positive]


def full_oracle(hidden, items):
    real = np.flatnonzero(TARGETS)
    return np.mean([cross_entropy(items[1 : ITEMS + 1] @ hidden[n], TARGETS[n] - 1) for n in real])


def sampled_oracle(hidden, items, drawn, bias, histories=None):
    """A negative that is the row's target does not count in that row; drawn twice, it counts twice."""
    values = []
    for n in np.flatnonzero(TARGETS):
        negatives = np.array([k for k in drawn if k != TARGETS[n]])
        own = np.array(sorted(set(histories[n]) - {TARGETS[n]}) if histories else [], int)
        scores = [
            items[[TARGETS[n]]] @ hidden[n],
            items[negatives] @ hidden[n] + bias[negatives],
            items[own] @ hidden[n],
        ]
        values.append(cross_entropy(np.concatenate(scores), 0))
    return np.mean(values)


def pair_oracle(hidden, items, drawn, kind):
    real = np.flatnonzero(TARGETS)
    positive, negative = ((hidden[real] * items[ids[real]]).sum(axis=1) for ids in (TARGETS, drawn))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    if kind == "bpr":
        return np.mean(-np.log(sigmoid(positive - negative)))
    return np.mean(-np.log(sigmoid(positive)) - np.log(1 - sigmoid(negative)))


def full(hidden, items, targets=TARGETS):
    return next_item.full_softmax(hidden, jnp.asarray(targets), items, ITEMS, MESH)


def sampled(hidden, items, drawn, bias, targets=TARGETS):
    drawn, bias = jnp.asarray(drawn), jnp.asarray(bias)
    return next_item.sampled_softmax(hidden, jnp.asarray(targets), items, drawn, bias, MESH)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel as JAX interprets it; on a GPU it is compiled."""
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(fused.pl, "pallas_call", functools.partial(fused.pl.pallas_call, interpret=True))


def take_form(monkeypatch, form, tile=None):
    """Lets the softmax be computed in one of its forms; with so many columns a tile, or none of them kept."""
    monkeypatch.setattr(softmax, "has_kernel", lambda dim: form == "for a GPU")
    if form != "for a CPU":
        monkeypatch.setattr(native, "kernels", dict)
    elif jax.default_backend() != "cpu" or not native.kernels():
        pytest.skip("needs a C compiler, and JAX on a CPU")
    if tile:
        monkeypatch.setattr(softmax, "MANY_COLUMNS", tile)
        monkeypatch.setitem(softmax.TILE_COLUMNS, jax.default_backend(), tile)


@pytest.fixture(params=["chunks", "for a CPU", "for a GPU"])
def form(request, monkeypatch, interpreted):
    """The softmax in each of its forms."""
    take_form(monkeypatch, request.param)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("junk", [1.0, 20.0, 50.0])  # small, middle and large bounds on the scores
def test_full_softmax_is_the_cross_entropy_over_the_items(junk):
    assert_matches(full, full_oracle, *arrays(junk=junk))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("junk", [1.0, 20.0, 50.0])
def test_sampled_softmax_is_the_cross_entropy_over_target_and_negatives(junk):
    drawn = np.array([3, 3, 1, 8, 13, 10, 4])
    if junk == 50:
        drawn = np.append(drawn, 2)
    bias = -np.log(np.random.default_rng(0).dirichlet(np.ones(ROWS))).astype(np.float32)
    for b in (np.zeros(ROWS, np.float32), bias):
        assert_matches(
            lambda h, i, b=b: sampled(h, i, drawn, b),
            lambda h, i, b=b: sampled_oracle(h, i, drawn, b),
            *arrays(junk=junk, scale=junk),
        )


@pytest.mark.parametrize(
    ("form", "tile"),
    [("chunks", None), ("chunks", 3), ("for a CPU", None), ("for a CPU", 3), ("for a GPU", None)],
)
def test_a_historys_own_items_compete_once_each(monkeypatch, interpreted, form, tile):
    """Two histories in one row, with an item met twice, one that is also drawn, and targets met before."""
    take_form(monkeypatch, form, tile)
    inputs = np.array([5, 3, 5, 7, 3, 9, 0, 7, 8, 1, 1, 13, 0, 3, 6, 6, 2])
    segments = np.array([1, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 3, 3, 4, 4])
    histories = [
        [i for i, s in zip(inputs[: n + 1], segments[: n + 1], strict=True) if s == segments[n]] for n in range(17)
    ]
    assert any(TARGETS[n] in histories[n] for n in np.flatnonzero(TARGETS))
    assert any(set(histories[n]) == {TARGETS[n]} for n in np.flatnonzero(TARGETS))  # nothing of its own competes
    zeros = jnp.zeros(4, jnp.int32)
    batch = batches.Batch(
        items_RxL=inputs[None], segments_RxL=segments[None], positions_RxL=segments[None], targets_RxL=TARGETS[None],
        users_U=zeros, start_U=zeros, length_U=zeros, row_U=zeros, column_U=zeros,
    )  # fmt: skip
    drawn, bias = np.array([3, 3, 1, 8, 13, 10, 4]), np.linspace(-1, 1, ROWS).astype(np.float32)

    def loss(hidden, items):
        others = next_item.history_mass(hidden[None], batch, items)
        return next_item.sampled_softmax(
            hidden, jnp.asarray(TARGETS), items, jnp.asarray(drawn), jnp.asarray(bias), MESH, others
        )

    assert_matches(loss, lambda h, i: sampled_oracle(h, i, drawn, bias, histories), *arrays(junk=1.0))


@pytest.mark.parametrize("kind", ["bce", "bpr"])
def test_pairwise_losses_follow_their_formula(kind):
    drawn = np.random.default_rng(1).integers(1, ITEMS + 1, len(TARGETS))
    loss = next_item.binary_cross_entropy if kind == "bce" else next_item.bayesian_personalised_ranking
    assert_matches(lambda h, i: loss(h, TARGETS, drawn, i), lambda h, i: pair_oracle(h, i, drawn, kind), *arrays())


@pytest.mark.parametrize(("chunk", "tile"), [(3, None), (100, None), (4, 5), (11, 8)])
def test_chunks_and_tiles_that_do_not_divide_change_nothing(monkeypatch, chunk, tile):
    take_form(monkeypatch, "chunks", tile)
    monkeypatch.setattr(softmax, "chunk_rows", lambda columns: chunk)
    assert_matches(lambda h, i: full(h, i), full_oracle, *arrays(1))


@pytest.mark.parametrize("form", ["chunks", "for a CPU"])
@pytest.mark.parametrize("bound", [30.0, 45.0, 90.0, 115.0, 125.0, 140.0, 149.0, 160.0, 400.0, 2000.0])
def test_nothing_of_the_sum_is_lost_below_a_bound_that_no_score_reaches(monkeypatch, form, bound):
    """One column is long and not where the state points, the target scores 10 and 12,000 others -1 to 1: a third of the
    sum. With bounds of 45 to 125 the shift is lower than the bound; with 140 and more it is the maximum.
    """
    take_form(monkeypatch, form)
    columns, items = 12_101, np.zeros((12_160, 2), np.float32)
    items[1], items[2] = (0.0, bound), (10.0, 0.0)
    items[3:columns] = np.random.default_rng(0).uniform(-1, 1, (columns - 3, 2))
    hidden = np.array([[1.0, 0.0]], np.float32)
    shift = bound - np.clip(bound - softmax.SAFE, 0, softmax.HEADROOM)
    assert (shift - 10 < softmax.NEAR) == (bound < 130)

    def loss(hidden, items):
        return next_item.full_softmax(hidden, jnp.array([2]), items, columns - 1, MESH)

    value, (d_hidden, d_items) = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.asarray(hidden), jnp.asarray(items))
    scores = items[1:columns].astype(float) @ hidden[0]
    share = np.exp(scores - 10) / np.exp(scores - 10).sum()
    assert 0.6 < share[1] < 0.7
    np.testing.assert_allclose(value, -np.log(share[1]), rtol=5e-5)
    wanted = share - (np.arange(columns - 1) == 1)
    np.testing.assert_allclose(d_hidden[0], wanted @ items[1:columns], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_items[1:columns, 0], wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made again"])
@pytest.mark.parametrize(
    ("rows", "real", "columns", "dim", "scale", "with_ids"),
    [
        (1_000, 1_000, 500, 64, 1.0, False),  # more blocks than are kept at once
        (700, 65, 301, 10, 1.0, True),
        (64, 64, 48, 16, 1.0, False),
        (130, 129, 11, 100, 1.0, True),
        (200, 150, 333, 20, 30.0, True),  # maxima are sought
        (70, 0, 50, 64, 1.0, False),
    ],
)
def test_the_cpus_kernel_is_the_softmax(monkeypatch, kept, rows, real, columns, dim, scale, with_ids):
    """Rows that are not real, wherever they are, columns that do not divide, entries that are no whole vector."""
    take_form(monkeypatch, "for a CPU", None if kept else 1)
    generator = np.random.default_rng(0)
    hidden, table = scale * generator.normal(size=(rows, dim)), generator.normal(size=(columns, dim)) / dim**0.5
    bias, ids = generator.normal(size=columns), generator.integers(1, 9, columns)
    bias[columns // 2] = -np.inf
    targets = np.zeros(rows, int)
    targets[generator.permutation(rows)[:real]] = generator.integers(1, 9, real) if with_ids else 3
    positive = table[targets]
    options = {"column_ids_C": jnp.asarray(ids)} if with_ids else {}
    loss = jax.jit(
        jax.value_and_grad(lambda *x: softmax.softmax_loss(*x, bias, jnp.asarray(targets), MESH, **options), (0, 1, 2))
    )
    value, gradients = loss(*(jnp.asarray(x, jnp.float32) for x in (hidden, positive, table)))
    logits, score = hidden @ table.T + bias, (hidden * positive).sum(axis=1, keepdims=True)
    if with_ids:
        logits = np.hstack([np.where(ids == targets[:, None], -np.inf, logits), score])
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, keepdims=True)
    counts = (targets > 0)[:, None] / max(real, 1)
    np.testing.assert_allclose(value, ((np.log(total) + top - score) * counts).sum(), rtol=2e-6, atol=1e-7)
    shares = np.exp(logits - top) / total * counts
    push = (shares[:, -1:] if with_ids else 0) - counts
    shares = shares[:, :columns]
    for found, wanted in zip(
        gradients, (shares @ table + push * positive, push * hidden, shares.T @ hidden), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * scale)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    take_form(monkeypatch, "for a CPU")
    code = """
import hashlib, jax, numpy as np
from seqrec_jax.losses.next_item import full_softmax
from seqrec_jax.sharding import make_mesh
generator = np.random.default_rng(0)
hidden, items = (generator.normal(size=(rows, 64)).astype("f") for rows in (1_000, 900))
loss = lambda h, i: full_softmax(h, np.arange(1_000) % 800, i, 898, make_mesh(1, 1))
found = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, items)
print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(found))).hexdigest())
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PJRT_NPROC": threads},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "5")
    ]
    assert len(said[0]) == 65 and len(set(said)) == 1


@pytest.mark.usefixtures("form")
def test_a_column_that_is_not_a_number_shows_in_the_loss():
    hidden, items = arrays()
    items[4] = np.nan  # no target
    assert np.isnan(full(jnp.asarray(hidden), jnp.asarray(items)))


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "with_ids"),
    [(200, 333, 64, False), (50, 3000, 20, True), (90, 70, 128, True), (1, 1, 1, False)],
)
def test_the_kernel_is_the_softmax_over_the_keys(interpreted, queries, keys, dim, with_ids):
    """Of the queries and keys that are real; with more than one tile of either, and a key that never counts."""
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(queries, dim)), generator.normal(size=(keys, dim))
    bias, ids = generator.normal(size=keys), [generator.integers(0, 9, rows) for rows in (queries, keys)]
    bias[keys // 2 : keys // 2 + (keys > 1)] = -np.inf
    real_queries, real_keys = max(1, queries - 7), max(1, keys - 7)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, bias)]
    found = jax.jit(fused.attend)(*arrays, real_queries, real_keys, *(ids if with_ids else ()))
    logits = (query @ key.T + bias)[:real_queries, :real_keys]
    if with_ids:
        logits[ids[0][:real_queries, None] == ids[1][:real_keys]] = -np.inf
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)
    np.testing.assert_allclose(found[0][:real_queries], np.log(weights.sum(axis=1)) + top[:, 0], rtol=1e-5, atol=1e-5)
    wanted = weights @ key[:real_keys] / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found[1][:real_queries], wanted, rtol=1e-4, atol=1e-5)


def test_the_kernel_tells_what_is_not_a_number(interpreted):
    query, key = np.ones((3, 4), np.float32), np.ones((300, 4), np.float32)
    key[200] = np.nan
    lse, mean = fused.attend(query, key, np.zeros(300, np.float32), 3, 300)
    assert np.isnan(lse).all() and np.isnan(mean).all()


@pytest.mark.parametrize("dim", [8, 64, 512])
def test_the_kernel_lowers_for_a_gpu(dim):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((300, dim), (500, dim), (500,))]
    counts = [jax.ShapeDtypeStruct((), jnp.int32)] * 2
    ids = [jax.ShapeDtypeStruct((rows,), jnp.int32) for rows in (300, 500)]
    try:
        lowered = jax.jit(fused.attend).trace(*shapes, *counts, *ids).lower(lowering_platforms=("cuda",))
    except RuntimeError as error:
        pytest.skip(f"this JAX lowers for a GPU only where one is: {error}")
    assert "triton" in lowered.as_text()


@pytest.mark.usefixtures("form")
def test_large_scores_stay_finite_and_exact():
    hidden, items = arrays(2, scale=1e3)
    value, gradient = jax.jit(jax.value_and_grad(full))(hidden, items)
    np.testing.assert_allclose(value, full_oracle(hidden.astype(float), items.astype(float)), rtol=1e-4)
    assert np.isfinite(gradient).all()


LOSSES = {
    "full": lambda h, i, targets=TARGETS: full(h, i, targets=targets),
    "sampled": lambda h, i, targets=TARGETS: sampled(h, i, [1, 4, 4], np.zeros(ROWS, np.float32), targets=targets),
    "bce": lambda h, i, targets=TARGETS: next_item.binary_cross_entropy(h, targets, np.full(17, 4), i),
    "bpr": lambda h, i, targets=TARGETS: next_item.bayesian_personalised_ranking(h, targets, np.full(17, 4), i),
}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_batch_without_targets_gives_zero_and_padding_no_gradient(loss):
    gradients_of = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (d_hidden, d_items) = gradients_of(*arrays(), np.zeros_like(TARGETS))
    assert value == 0 and not d_hidden.any() and not d_items.any()
    value, (d_hidden, d_items) = gradients_of(*arrays(), TARGETS)
    assert np.isfinite(value) and (np.abs(d_hidden).sum(axis=1) > 0).tolist() == (TARGETS > 0).tolist()
    assert not d_items[0].any() and not d_items[ITEMS + 1 :].any() and d_items[4].any()


@pytest.mark.usefixtures("form")
def test_losses_and_gradients_vmap_over_a_scalar():
    hidden, items = map(jnp.asarray, arrays())
    scales = np.array([0.5, 1.0, 2.0], np.float32)
    for loss in LOSSES.values():
        scaled = jax.value_and_grad(lambda s, f=loss: f(s * hidden, items))
        swept, one = jax.jit(jax.vmap(scaled))(scales), jax.jit(scaled)
        alone = [one(s) for s in scales]
        np.testing.assert_allclose(np.stack(swept), np.array(alone).T, rtol=1e-4, atol=1e-6)
    a, b = arrays(3)[0], arrays(4)[0]
    swept = jax.jit(jax.vmap(lambda t: info_nce(a, b, np.ones(17, bool), t, MESH)))(scales)
    np.testing.assert_allclose(
        swept, [info_nce_oracle(a.astype(float), b.astype(float), np.ones(17, bool), t) for t in scales], rtol=1e-4
    )


# Contrast -------------------------------------------------------------------------------------------------------------


def info_nce_oracle(a, b, valid, temperature, similarity="dot", targets=None):
    """Eq. 2, anchor by anchor: the positive among itself and the 2(N − 1) states of other users (of other targets)."""
    targets = np.arange(len(a)) if targets is None else targets
    states = {(view, user): x[user] for view, x in enumerate((a, b)) for user in np.flatnonzero(valid)}
    if similarity == "cosine":
        states = {name: x / np.linalg.norm(x) for name, x in states.items()}
    losses = []
    for (view, user), anchor in states.items():
        positive = anchor @ states[1 - view, user] / temperature
        others = [anchor @ x / temperature for (_, other), x in states.items() if targets[other] != targets[user]]
        losses.append(cross_entropy(np.array([positive, *others]), 0))
    return np.mean(losses)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_info_nce_is_equation_2_over_the_valid_users(similarity):
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 5, 4)).astype(np.float32)
    valid = np.array([True, False, True, True, False])
    a[~valid] = b[~valid] = 20.0
    for temperature in (1.0, 0.4):
        assert_matches(
            lambda x, y, t=temperature: info_nce(x, y, valid, t, MESH, similarity),
            lambda x, y, t=temperature: info_nce_oracle(x, y, valid, t, similarity),
            a,
            b,
        )


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("targets", [None, [4, 4, 2, 4, 2, 7], [3] * 6], ids=["kept", "removed", "all the same"])
def test_info_nce_is_duorecs_equation_14(similarity, targets):
    """Summed directions are the two views' means; a negative with the anchor's target is none. Invalid users: 1."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 6, 4)).astype(np.float32)
    valid = np.arange(6) != 1
    targets_U = None if targets is None else np.array(targets)
    for directions, factor in (("averaged", 1), ("summed", 2)):
        assert_matches(
            lambda x, y, d=directions: info_nce(x, y, valid, 0.6, MESH, similarity, targets_U=targets_U, directions=d),
            lambda x, y, f=factor: f * info_nce_oracle(x, y, valid, 0.6, similarity, targets_U),
            a,
            b,
        )


@pytest.mark.parametrize("count", [0, 1])
def test_info_nce_without_negatives_is_zero(count):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda a, b: info_nce(a, b, np.arange(3) < count, 1.0, MESH), (0, 1))
    )(a, b)
    assert value == pytest.approx(0, abs=1e-6) and np.allclose(gradients, 0, atol=1e-6)


# Negatives ------------------------------------------------------------------------------------------------------------

HISTORIES = [[1, 3, 3, 7, 2, 5], [2, 6], [1, 2, 3, 4, 5, 6, 7, 1, 1], [7, 7, 7, 4, 4], [5], [1, 2, 3, 4, 5, 7, 6, 6]]
CATALOGUE = 7


def small_dataset():
    offsets = np.cumsum([0, *map(len, HISTORIES)])
    return SequenceDataset(
        np.concatenate(HISTORIES).astype(np.int32),
        offsets,
        np.arange(1, 8).astype(str),
        np.arange(6).astype(str),
        "",
        {},
    )


def training_parts():
    return [history[:-2] if len(history) >= 3 else history for history in HISTORIES]


def source_of(**loss):
    config = get_config().loss
    config.update(loss)
    return negatives.negative_source(config, small_dataset(), 64)


def test_absent_items_are_drawn_uniformly_and_nothing_else():
    users = np.repeat(np.arange(len(HISTORIES)), 3000)
    absent = source_of(next_item="bce").absent
    draw = jax.jit(negatives.draw_absent, static_argnums=3)
    drawn = np.asarray(draw(jax.random.key(0), users, absent, CATALOGUE)).reshape(-1, 3000)
    for part, items in zip(training_parts(), drawn, strict=True):
        free = [item for item in range(1, CATALOGUE + 1) if item not in part] or [0]
        assert set(items) == set(free)  # what is only tested may be drawn: it is not known in training
        counts, mean = np.bincount(items)[free], 3000 / len(free)
        assert ((counts - mean) ** 2 / mean).sum() <= len(free) + 5 * np.sqrt(2 * len(free))


def test_absent_items_of_many_users():
    generator = np.random.default_rng(0)
    parts = [generator.integers(1, 31, generator.integers(0, 40)) for _ in range(100)]
    offsets = np.cumsum([0, *map(len, parts)])
    absent = negatives.absent_items(np.concatenate(parts), offsets, np.diff(offsets))
    drawn = jax.jit(negatives.draw_absent, static_argnums=3)(
        jax.random.key(1), np.repeat(np.arange(100), 600), absent, 30
    )
    for part, items in zip(parts, np.asarray(drawn).reshape(100, 600), strict=True):
        assert set(items) == set(range(1, 31)) - set(part)


def test_shared_negatives_follow_the_training_popularity():
    source = source_of(next_item="sampled", negative_distribution="popularity")
    drawn = np.asarray(negatives.draw_shared(jax.random.key(0), 20000, source, CATALOGUE))
    share = np.bincount(sum(training_parts(), []), minlength=CATALOGUE + 1) / len(sum(training_parts(), []))
    assert 1 <= drawn.min() and drawn.max() <= CATALOGUE
    np.testing.assert_allclose(np.bincount(drawn, minlength=8) / 20000, share, atol=0.015)
    drawn_so_often = get_config().loss.negatives * share[1:]
    np.testing.assert_allclose(np.exp(-source.bias_V[1:8]), drawn_so_often, atol=0.5, rtol=1e-2)
    assert np.isfinite(source.bias_V).all()


def test_every_item_of_a_large_catalogue_can_be_drawn():
    """As many items as float32 has numbers between 0 and 1 four times over, one action each."""
    upto = jnp.arange(2**25 + 1, dtype=jnp.int32)
    source = negatives.NegativeSource(None, None, upto)
    drawn = np.asarray(negatives.draw_shared(jax.random.key(0), 8000, source, 2**25))
    assert 1 <= drawn.min() and drawn.max() <= 2**25
    for bit in range(25):
        assert ((drawn >> bit) & 1).mean() == pytest.approx(0.5, abs=0.03)  # 5 standard deviations


def test_items_without_actions_are_drawn_as_often_as_their_bias_says():
    """One action among 4,000 items: what smoothing adds to the 3,999 others is 4 / 5 of the draws."""
    names = np.arange(1, 4001).astype(np.str_)
    data = SequenceDataset(np.int32([1, 2, 3]), np.array([0, 3]), names, names[:1], hash="", report={})
    config = get_config().loss
    config.update(next_item="sampled", negative_distribution="popularity")
    source = negatives.negative_source(config, data, 4032)
    drawn = np.asarray(negatives.draw_shared(jax.random.key(0), 20000, source, 4000))
    share = np.exp(-source.bias_V) / config.negatives
    assert share[1] == pytest.approx(1.001 / 5, rel=1e-4) and share[1:4001].sum() == pytest.approx(1, rel=1e-4)
    assert (drawn == 1).mean() == pytest.approx(share[1], abs=0.015)
    assert len(np.unique(drawn)) > 3800


def test_shared_negatives_are_uniform_without_popularity():
    source = source_of(next_item="sampled")
    drawn = np.asarray(negatives.draw_shared(jax.random.key(0), 20000, source, CATALOGUE))
    np.testing.assert_allclose(np.bincount(drawn, minlength=8) / 20000, [0, *[1 / 7] * 7], atol=0.015)
    assert not source.bias_V.any()


@pytest.mark.parametrize("kind", ["bce", "bpr"])
def test_each_cell_meets_a_negative_of_its_own_user(kind):
    """Users who lack a single item leave the draw no choice; who lacks none has no loss."""
    parts = [[1, 2, 3, 5, 6, 7], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]  # they lack 4, 7 and nothing
    offsets = np.cumsum([0, *map(len, parts)])
    source = negatives.NegativeSource(
        negatives.absent_items(np.concatenate(parts), offsets, np.diff(offsets)), None, None
    )
    segments = np.array([[2, 2, 0, 1, 1], [3, 3, 0, 0, 0]])
    targets = np.array([[2, 6, 0, 3, 7], [1, 2, 0, 0, 0]])
    zeros = jnp.zeros(4, jnp.int32)
    batch = batches.Batch(
        items_RxL=targets, segments_RxL=segments, positions_RxL=segments, targets_RxL=targets,
        users_U=jnp.array([0, 1, 2, -1]), start_U=zeros, length_U=zeros, row_U=zeros, column_U=zeros,
    )  # fmt: skip
    hidden, items = np.random.default_rng(0).normal(size=(2, 5, 3)), np.random.default_rng(1).normal(size=(64, 3))
    config = get_config().loss
    config.next_item = kind
    loss = jax.jit(lambda *arrays: next_item.next_item_loss(*arrays, source, config, CATALOGUE, MESH))
    value = loss(jax.random.key(0), hidden.astype(np.float32), batch, items.astype(np.float32))
    losses = []
    for column, target, negative in ((0, 2, 7), (1, 6, 7), (3, 3, 4), (4, 7, 4)):
        positive, negative = items[target] @ hidden[0, column], items[negative] @ hidden[0, column]
        losses.append(
            np.log1p(np.exp(negative - positive))
            if kind == "bpr"
            else np.log1p(np.exp(-positive)) + np.log1p(np.exp(negative))
        )
    assert value == pytest.approx(np.mean(losses), rel=1e-5)
