"""A sublayer by the kernels for a CPU and by XLA, against a numpy float64 statement of it and its slopes."""

import itertools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqrec_jax import native
from seqrec_jax.encoders.sublayer import Form, sublayer

ROOT = Path(__file__).resolve().parents[1]
NORMS = ("post", "pre", "query")
ROWS, LENGTH, DIM, FFN = 5, 21, 32, 48  # cells for two tasks of a feed-forward and a part of one
WORDS = (jnp.uint32(5), jnp.uint32(4_000_000_000)), (jnp.uint32(123), jnp.uint32(77))
EPSILON = 1e-3


def arguments(form, *, causal=True, rows=ROWS, length=LENGTH, dim=DIM, ffn=FFN, seed=0):
    """(x, visible, norm, inner, outer): packed rows with padding, parameters none of which is trivial."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    width = ffn if form.activation else dim
    inner = tuple((draw(dim, width) / math.sqrt(dim), draw(width)) for _ in range(1 if form.activation else 3))
    segments = np.sort(rng.integers(0, 4, (rows, length)))[:, ::-1]
    visible = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
    visible &= np.tril(np.ones((length, length), bool)) | (not causal)
    norm, outer = (1 + draw(dim) / 3, draw(dim)), (draw(width, dim) / math.sqrt(width), draw(dim))
    return draw(rows * length, dim), None if form.activation else visible, norm, inner, outer


def published(form, x, visible, norm, inner, outer):
    """The sublayer without dropout; attention head by head, of the cells that see something."""
    affine = lambda x, w: x @ w[0] + w[1]  # noqa: E731

    def normed(x):
        mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
        return (x - mean) / np.sqrt(variance + form.epsilon) * norm[0] + norm[1]

    source = x if form.norm == "post" else normed(x)
    if form.activation:
        core = affine(source, inner[0])
        below = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
        core = core * below(core) if form.activation == "gelu" else np.maximum(core, 0)
    else:
        rows, length, _ = visible.shape
        others = x if form.norm == "query" else source
        query, key, value = (
            affine(y, w).reshape(rows, length, form.heads, -1)
            for y, w in zip((source, others, others), inner, strict=True)
        )
        core = np.zeros_like(query)
        for row, head, cell in itertools.product(range(rows), range(form.heads), range(length)):
            seen = visible[row, cell]
            if seen.any():
                weight = np.exp(key[row, seen, head] @ query[row, cell, head] / math.sqrt(query.shape[3]))
                core[row, cell, head] = weight / weight.sum() @ value[row, seen, head]
        core = core.reshape(len(x), -1)
    x = (source if form.norm == "query" else x) + affine(core, outer)
    return normed(x) if form.norm == "post" else x


def real(visible, cells):
    """[N, 1]: cells that see something; those of a feed-forward all count."""
    return np.ones((cells, 1)) if visible is None else visible.any(axis=2).reshape(-1, 1)


def run(form, given, weights_NxD, words=(None, None), rate=0.0):
    """The result, and the gradients of its weighted sum with respect to x, norm, inner and outer."""
    x, visible, *maps = given

    @jax.jit
    def both(*floats):
        out, back = jax.vjp(lambda x, *maps: sublayer(form, x, visible, *maps, words, rate), *floats)
        return out, back(jnp.asarray(weights_NxD, out.dtype))

    return both(x, *maps)


CASES = [
    *(Form(norm, EPSILON, heads=heads) for norm, heads in itertools.product(NORMS, (1, 2))),
    *(Form(norm, EPSILON, activation) for norm, activation in itertools.product(NORMS, ("gelu", "relu"))),
]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_its_formula_and_its_slopes(case):
    given = arguments(case)
    x, visible, *maps = given
    counts = real(visible, len(x))
    weights = np.random.default_rng(1).normal(size=x.shape) * counts
    out, gradients = run(case, given, weights)
    wide = jax.tree.map(np.float64, (x, *maps))
    at = lambda floats: published(case, floats[0], visible, *floats[1:])  # noqa: E731
    np.testing.assert_allclose(out * counts, at(wide) * counts, rtol=1e-4, atol=1e-5)
    rng = np.random.default_rng(2)
    for place in [None, *range(len(jax.tree.leaves(wide)))]:  # in the direction of all arrays, and of each alone
        leaves, structure = jax.tree.flatten(wide)
        steps = [1e-6 * rng.normal(size=x.shape) * (place in (None, n)) for n, x in enumerate(leaves)]
        pairs = list(zip(leaves, steps, strict=True))
        moved = [jax.tree.unflatten(structure, [a + sign * b for a, b in pairs]) for sign in (1, -1)]
        slope = (weights * (at(moved[0]) - at(moved[1]))).sum() / 2
        found = sum((b * np.float64(g)).sum() for b, g in zip(steps, jax.tree.leaves(gradients), strict=True))
        size = np.linalg.norm(np.concatenate([b.ravel() for b in steps])) * np.linalg.norm(gradients[0])
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-4 * size)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rate", [None, 0.0, 0.4])
def test_the_kernels_do_what_xla_does(monkeypatch, case, rate):
    """With the same masks of dropout, bidirectional, and for cells that see nothing, too."""
    if not native.kernels():
        pytest.skip("needs a C compiler")
    given = arguments(case, causal=False)
    weights = np.random.default_rng(1).normal(size=given[0].shape)
    words = (None, None) if rate is None else WORDS
    found = run(case, given, weights, words, np.float32(rate or 0))
    monkeypatch.setattr(native, "kernels", dict)
    expected = run(case, given, weights, words, np.float32(rate or 0))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_called_where_they_can_be(form, case):
    x, visible, *maps = arguments(case)
    gradient = jax.grad(lambda x: sublayer(case, x, visible, *maps, WORDS, 0.1).sum())
    assert str(jax.make_jaxpr(gradient)(x)).count("= ffi_call[") == (2 if form == "kernel" else 0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", [Form("post", EPSILON, heads=2), Form("pre", EPSILON, "gelu")], ids=str)
def test_runs_side_by_side_are_as_alone(case):
    many = [arguments(case, seed=seed) for seed in range(2)]
    of = lambda rate, x, *maps: sublayer(case, x, many[0][1], *maps, WORDS, rate)  # noqa: E731
    floats = [(np.float32(rate), given[0], *given[2:]) for rate, given in zip((0.2, 0.6), many, strict=True)]
    together = jax.jit(jax.vmap(of))(*jax.tree.map(lambda *x: np.stack(x), *floats))
    for one, other in zip(together, floats, strict=True):
        np.testing.assert_allclose(one, jax.jit(of)(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    "case", [Form("post", EPSILON, "relu"), Form("pre", EPSILON, "gelu"), Form("query", EPSILON, heads=2)], ids=str
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(case, value):
    """Of an inner product alone, whose activation could hide it."""
    given = arguments(case)
    given[3][0][0][3, 5] = value
    out, gradients = run(case, given, np.ones_like(given[0]))
    assert not np.isfinite(out).all() or not all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def in_a_process(file, **environment):
    """What the kernels give for some cases there, as arrays."""
    code = f"""
import sys, jax, numpy as np
sys.path.insert(0, "tests")
from seqrec_jax import native
from test_sublayer import CASES, WORDS, arguments, run
assert native.kernels()
given = [arguments(case, rows=30) for case in CASES[::3]]
found = [run(c, g, np.ones_like(g[0]), WORDS, np.float32(0.4)) for c, g in zip(CASES[::3], given)]
np.savez({str(file)!r}, *jax.tree.leaves(found))
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, check=True)
    return list(np.load(file).values())


def test_any_number_of_threads_gives_the_same_bits(tmp_path):
    if not native.kernels():
        pytest.skip("needs a C compiler")
    one, five = (in_a_process(tmp_path / f"{threads}.npz", PJRT_NPROC=threads) for threads in ("1", "5"))
    assert all(np.array_equal(a, b) for a, b in zip(one, five, strict=True)) and len(one) > 30


def test_narrower_vectors_give_the_same(tmp_path):
    if not native.kernels() or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs a C compiler for x86")
    compiler = os.environ.get("CC", "cc")
    widest, *others = (
        in_a_process(tmp_path / f"{place}.npz", CC=f"{compiler} {option}")
        for place, option in enumerate(("", "-mno-avx512f", "-mno-avx"))
    )
    largest = max(np.abs(x).max() for x in widest)
    for other in others:
        for a, b in zip(widest, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize(
    ("form", "dim", "ffn"),
    [
        (Form("post", EPSILON, heads=2), 24, 0),
        (Form("post", EPSILON, "gelu"), 32, 40),
        (Form("post", EPSILON, heads=4), 32, 0),
    ],
    ids=str,
)
def test_other_widths_are_left_to_xla(monkeypatch, form, dim, ffn):
    native.kernels()
    given = arguments(form, dim=dim, ffn=ffn)
    found = run(form, given, np.ones_like(given[0]))
    monkeypatch.setattr(native, "kernels", dict)
    for one, other in zip(*map(jax.tree.leaves, (found, run(form, given, np.ones_like(given[0])))), strict=True):
        np.testing.assert_array_equal(one, other)
