"""Crop, mask and reorder against a numpy statement of CL4SRec's Eq. 3-5."""

import math
from itertools import combinations, permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqrec_jax import augment

WIDTH, MASK = 12, 99
OPERATORS = {
    "crop": jax.jit(lambda key, items, length, ratio: augment.crop(key, items, length, ratio)),
    "mask": jax.jit(lambda key, items, length, ratio: augment.mask(key, items, length, ratio, MASK)),
    "reorder": jax.jit(lambda key, items, length, ratio: augment.reorder(key, items, length, ratio)),
}
MANY = {name: jax.jit(jax.vmap(operator, (0, None, None, None))) for name, operator in OPERATORS.items()}
cases = given(
    seed=st.integers(0, 2**31 - 1),
    length=st.integers(0, WIDTH),
    ratio=st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0])),
)


def history_of(length):
    """Distinct items, so that each place of a view can be traced."""
    return np.concatenate([np.arange(1, length + 1) * 7 % 97, np.zeros(WIDTH - length)]).astype(np.int32)


def view_of(name, seed, length, ratio):
    """(history, view) without padding; checks the padding."""
    items = history_of(length)
    view, view_length = OPERATORS[name](jax.random.key(seed), items, length, ratio)
    view, view_length = np.asarray(view), int(view_length)
    assert items.tolist() == history_of(length).tolist(), "the input was written to"
    assert (view[view_length:] == 0).all() and (view[:view_length] > 0).all()
    return items[:length].tolist(), view[:view_length].tolist()


def floor_of(ratio, length):
    return int(np.floor(np.float32(ratio) * np.float32(length)))


def views(name, count, length, ratio):
    """Views of one history under many keys, as tuples."""
    keys = jax.random.split(jax.random.key(5), count)
    items, lengths = map(np.asarray, MANY[name](keys, history_of(length), length, ratio))
    return [tuple(row[:n]) for row, n in zip(items.tolist(), lengths.tolist(), strict=True)]


def assert_uniform(drawn, expected):
    """Chi-square below mean + 5 standard deviations; nothing but `expected` occurs."""
    counts = np.array([sum(d == e for d in drawn) for e in expected])
    assert counts.sum() == len(drawn)
    mean = len(drawn) / len(expected)
    freedom = len(expected) - 1
    assert ((counts - mean) ** 2 / mean).sum() <= freedom + 5 * math.sqrt(2 * freedom)


@settings(max_examples=100, deadline=None)
@cases
def test_crop_keeps_a_window(seed, length, ratio):
    history, view = view_of("crop", seed, length, ratio)
    kept = max(floor_of(ratio, length), 1) if length else 0
    assert len(view) == kept
    assert any(history[start : start + kept] == view for start in range(length - kept + 1))


@settings(max_examples=100, deadline=None)
@cases
def test_mask_replaces_places_of_the_history(seed, length, ratio):
    history, view = view_of("mask", seed, length, ratio)
    assert len(view) == length and view.count(MASK) == floor_of(ratio, length)
    assert all(new in (old, MASK) for old, new in zip(history, view, strict=True))


@settings(max_examples=100, deadline=None)
@cases
def test_reorder_permutes_a_window(seed, length, ratio):
    history, view = view_of("reorder", seed, length, ratio)
    assert sorted(view) == sorted(history)
    changed = [place for place in range(length) if view[place] != history[place]]
    assert not changed or changed[-1] - changed[0] < floor_of(ratio, length)


def test_histories_of_no_item_and_of_one():
    for name, ratio in product(OPERATORS, (0.0, 0.5, 1.0)):
        assert view_of(name, 0, 0, ratio)[1] == []
        assert view_of(name, 0, 1, ratio)[1] == ([MASK] if name == "mask" and ratio == 1 else history_of(1)[:1])


def test_crop_starts_anywhere_equally_often():
    items = history_of(10).tolist()
    assert_uniform(views("crop", 4000, 10, 0.6), [tuple(items[start : start + 6]) for start in range(5)])


def test_mask_takes_any_places_equally_often():
    items = history_of(5).tolist()
    masked = [tuple(MASK if i in places else items[i] for i in range(5)) for places in combinations(range(5), 2)]
    assert_uniform(views("mask", 4000, 5, 0.4), masked)


def test_reorder_makes_any_order_equally_often():
    assert_uniform(views("reorder", 4000, 4, 1.0), list(permutations(history_of(4)[:4].tolist())))


def test_reorder_starts_anywhere_equally_often():
    items = history_of(5).tolist()
    swapped = [tuple([*items[:i], items[i + 1], items[i], *items[i + 2 : 5]]) for i in range(4)]
    drawn = views("reorder", 4000, 5, 0.5)  # windows of two places: each start either swaps or does not
    moved = [view for view in drawn if view != tuple(items[:5])]
    assert_uniform(moved, swapped)
    assert abs(len(moved) / 4000 - 0.5) < 0.04


@pytest.mark.parametrize("name", OPERATORS)
def test_views_differ_from_the_history_whenever_the_floor_lets_them(name):
    for length, ratio in product((2, 3, 5, 10), (0.1, 0.34, 0.6, 0.9)):
        history, floor = tuple(history_of(length)[:length].tolist()), floor_of(ratio, length)
        same = sum(view == history for view in views(name, 300, length, ratio)) / 300
        if name == "reorder":
            likely = 1 / math.factorial(floor)  # the identity is one of the orders
            assert same == 1 if floor < 2 else abs(same - likely) < 5 * math.sqrt(likely * (1 - likely) / 300) + 1e-9
        else:
            changes = floor > 0 if name == "mask" else max(floor, 1) < length
            assert same == (0 if changes else 1)


def test_every_history_gets_its_own_draw_and_its_own_ratio():
    ratios = {"crop": 0.5, "mask": 0.25, "reorder": 1.0}
    items = np.tile(history_of(12), (300, 1))
    before, operator = items.copy(), np.arange(300) % 3
    all_views = jax.jit(lambda *arrays: augment.augment_all(*arrays, MASK))
    view, length = all_views(jax.random.key(0), items, np.full(300, 12), operator, ratios)
    view, length = np.asarray(view), np.asarray(length)
    assert (items == before).all()
    assert (length == np.where(operator == 0, 6, 12)).all()
    assert ((view == MASK).sum(axis=1) == np.where(operator == 1, 3, 0)).all()
    assert (np.sort(view[operator == 2]) == np.sort(items[operator == 2])).all()
    assert len(np.unique(view[operator == 1], axis=0)) > 60 and len(np.unique(view[operator == 2], axis=0)) > 95


def test_one_program_serves_every_ratio():
    many = jax.jit(lambda *arrays: augment.augment_all(*arrays, MASK))
    items, length, operator = np.tile(history_of(8), (3, 1)), np.full(3, 8), np.arange(3)
    for ratio in (0.1, 0.5, 0.9):
        many(jax.random.key(0), items, length, operator, {"crop": ratio, "mask": ratio / 2, "reorder": 1 - ratio})
    assert many._cache_size() == 1
    swept, _ = jax.vmap(OPERATORS["mask"], (None, None, None, 0))(
        jax.random.key(0), items[0], 8, jnp.array([0.25, 0.5, 1])
    )
    assert (np.asarray(swept) == MASK).sum(axis=1).tolist() == [2, 4, 8]


@pytest.mark.parametrize(
    ("choice", "operators", "pairs"),
    [
        ("uniform", ("crop", "mask", "reorder"), list(product(range(3), repeat=2))),
        ("uniform", ("reorder", "mask"), [(1, 1), (1, 2), (2, 1), (2, 2)]),
        ("different", ("crop", "mask", "reorder"), list(permutations(range(3), 2))),
        ("different", ("reorder", "crop"), [(0, 2), (2, 0)]),
        ("fixed", ("mask",), [(1, 1)]),
        ("fixed", ("reorder", "crop"), [(2, 0)]),
    ],
)
def test_operators_are_drawn_as_configured(choice, operators, pairs):
    a, b = augment.draw_operators(jax.random.key(3), 3000, operators, choice)
    assert_uniform(list(zip(a.tolist(), b.tolist(), strict=True)), pairs)
