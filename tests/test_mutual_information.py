"""S3-Rec's four objectives, value and gradient, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.losses import mutual_information as mim
from seqrec_jax.sharding import make_mesh

ITEMS, ATTRIBUTES, PLACES, DIM = 9, 7, 13, 4
SETS = [{1, 3}, {2}, set(), {1, 2, 3, 4, 5, 6, 7}, {7}, {4, 5, 6}, {1}, {2, 7}, {3}]  # of items 1..9
MESH = make_mesh(1, 1)


def dataset():
    offsets = np.cumsum([0, *map(len, SETS)])
    flat = np.concatenate([sorted(s) for s in SETS]).astype(np.int32)
    names = np.arange(ATTRIBUTES).astype(str)
    return SequenceDataset(
        np.zeros(0, np.int32), np.zeros(1, np.int64), np.arange(ITEMS).astype(str), names, "", {},
        flat, offsets, names,
    )  # fmt: skip


def drawn(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for shape in shapes]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear_of(kernel, bias, form):
    return {"kernel": kernel, **({"bias": bias} if form == "code" else {})}


def slopes(function, arrays, step=1e-5):
    """Central differences of `function` in float64, for every entry of every array."""
    found = []
    for array in arrays:
        slope = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + step
            above = function(*arrays)
            array[place] = kept - step
            slope[place] = (above - function(*arrays)) / (2 * step)
            array[place] = kept
        found.append(slope)
    return found


def agree(function, oracle, arrays):
    """`function` on float32 and `oracle` on float64 agree in value and in all gradients."""
    value, gradients = jax.jit(jax.value_and_grad(function, tuple(range(len(arrays)))))(
        *(jnp.asarray(array, jnp.float32) for array in arrays)
    )
    assert float(value) == pytest.approx(oracle(*arrays), rel=1e-5)
    for gradient, slope in zip(gradients, slopes(oracle, arrays), strict=True):
        np.testing.assert_allclose(gradient, slope, atol=2e-5 * max(np.abs(slope).max(), 1))


def test_sets_as_rows_of_zeros_and_ones():
    rows = mim.multi_hot(jnp.arange(ITEMS + 1), mim.item_attributes(dataset()), ATTRIBUTES)
    assert rows.tolist() == [[a in s for a in range(1, ATTRIBUTES + 1)] for s in [set(), *SETS]]


def attribute_oracle(x, kernel, bias, table, items, form):
    """AAP (Eq. 10) and MAP (Eq. 14), place by place and attribute by attribute."""
    total = 0.0
    for place, item in enumerate(items):
        if item == 0 or not SETS[item - 1]:
            continue
        score = {a: (x[place] @ kernel + bias) @ table[a - 1] for a in range(1, ATTRIBUTES + 1)}
        own = SETS[item - 1]
        others = score.keys() - own
        if form == "code":
            total -= sum(np.log(sigmoid(s if a in own else -s)) for a, s in score.items())
        elif others:
            normaliser = np.log(sum(np.exp(sigmoid(score[a])) for a in others))
            total -= np.mean([sigmoid(score[a]) - normaliser for a in own])
    return total


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_attributes(monkeypatch, form, chunk):
    """In chunks that do not divide the places, with places, items and attributes that do not count."""
    monkeypatch.setattr(mim, "chunk_rows", lambda _: chunk)
    items = np.array([1, 0, 3, 4, 9, 2, 0, 0, 6, 6, 8, 5, 7])
    attributes = mim.item_attributes(dataset())
    x, kernel, bias, table = drawn((PLACES, DIM), (DIM, DIM), DIM, (ATTRIBUTES, DIM))

    def oracle(x, kernel, table, bias=0.0 * bias if form == "paper" else bias):
        return attribute_oracle(x, kernel, bias, table, items, form)

    for objective in (mim.associated_attribute_prediction, mim.masked_attribute_prediction):

        def found(x, kernel, table, objective=objective):
            linear = linear_of(kernel, jnp.float32(bias), form)
            return objective(x, jnp.asarray(items), linear, table, attributes, form, MESH)

        agree(found, oracle, [x, kernel, table])


def test_attributes_where_nothing_counts_and_under_vmap():
    attributes = mim.item_attributes(dataset())
    x, kernel, table = (jnp.asarray(a, jnp.float32) for a in drawn((2, PLACES, DIM), (DIM, DIM), (ATTRIBUTES, DIM)))
    items = jnp.array([[0] * PLACES, [1, 5] + [0] * (PLACES - 2)])

    def found(x, items, table):
        linear = {"kernel": kernel}
        return mim.masked_attribute_prediction(x, items, linear, table, attributes, "paper", MESH)

    both = jax.vmap(jax.value_and_grad(found, (0, 2)), (0, 0, None))
    values, (d_x, d_table) = jax.jit(both)(x, items, table)
    expected = attribute_oracle(
        np.float64(x[1]), np.float64(kernel), 0.0, np.float64(table), np.asarray(items[1]), "paper"
    )
    assert values[0] == 0 and not d_x[0].any() and not d_table[0].any()
    assert values[1] == pytest.approx(expected, rel=1e-5) and not d_x[1, 2:].any() and d_x[1, :2].all()


def pair_oracle(positive, negatives, form):
    f, others = sigmoid(positive), [sigmoid(n) for n in negatives]
    if form == "code":
        return np.mean([-np.log(sigmoid(f - other)) for other in others])
    return -(f - np.log(sum(np.exp(other) for other in others)))


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("count", [1, 3])
def test_masked_items(form, count):
    items = np.array([1, 0, 3, 4, 9, 2, 0, 0, 6, 6, 8, 5, 7])
    negatives = np.random.default_rng(1).integers(1, ITEMS + 1, (PLACES, count))
    negatives[4, 0] = 0  # nothing was left to draw
    x, kernel, table, bias = drawn((PLACES, DIM), (DIM, DIM), (ITEMS + 2, DIM), DIM)
    bias *= form == "code"

    def oracle(x, kernel, table):
        scores = (x @ kernel + bias) @ table.T
        real = [p for p in range(PLACES) if items[p] and negatives[p].all()]
        return sum(pair_oracle(scores[p, items[p]], scores[p, negatives[p]], form) for p in real)

    def found(x, kernel, table):
        linear = linear_of(kernel, jnp.float32(bias), form)
        return mim.masked_item_prediction(x, jnp.asarray(items), jnp.asarray(negatives), linear, table, form)

    agree(found, oracle, [x, kernel, table])


@pytest.mark.parametrize("form", ["code", "paper"])
def test_segments(form):
    real = np.array([True, False, True, True])
    context, segment, corrupted, kernel, bias = drawn((4, DIM), (4, DIM), (4, DIM), (DIM, DIM), DIM)
    bias *= form == "code"

    def oracle(context, segment, corrupted, kernel):
        mapped = context @ kernel + bias
        return sum(pair_oracle(mapped[u] @ segment[u], [mapped[u] @ corrupted[u]], form) for u in np.flatnonzero(real))

    def found(context, segment, corrupted, kernel):
        linear = linear_of(kernel, jnp.float32(bias), form)
        return mim.segment_prediction(context, segment, corrupted, jnp.asarray(real), linear, form)

    agree(found, oracle, [context, segment, corrupted, kernel])


def test_the_published_pair_loss_is_bounded():
    """A sigmoid of sigmoids lies between 0.313 and 1.313 for every pair."""
    bound = functools.partial(mim._pairs, real_N=jnp.array([True]), form="code")
    best, worst = bound(jnp.array([99.0]), jnp.array([[-99.0]])), bound(jnp.array([-99.0]), jnp.array([[99.0]]))
    assert (float(best), float(worst)) == (pytest.approx(0.31326, abs=1e-4), pytest.approx(1.31326, abs=1e-4))
