"""A sublayer of a Transformer's block: norm, attention or feed-forward, dropout, residual. On a CPU by kernels."""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqrec_jax import native

Map = tuple[jax.Array, jax.Array]  # kernel or scale, and bias
NORMS, CORES = ("post", "pre", "query"), ("", "gelu", "relu")  # by their numbers in kernels/sublayer.h
HIDE = -1e30  # added to attention scores of hidden cells; finite, so that a fully hidden row stays finite
WIDE = 16  # kernels take widths of whole vectors, of any CPU
CELLS = 48  # that a feed-forward's kernel takes at a time


@dataclasses.dataclass(frozen=True)
class Form:
    """What a sublayer computes."""

    norm: str  # post | pre | query, as in configs/base.py
    epsilon: float
    activation: str = ""  # gelu | relu; none: attention
    heads: int = 0
    fused: bool = False  # attention in one kernel of JAX's
    dtype: str = "float32"


def dropout(words: tuple | None, x: jax.Array, rate: jax.Array) -> jax.Array:
    """Zeroes entries with probability `rate` (a traced scalar) and scales the rest; `words` of a key, or None: none."""
    if words is None:
        return x
    kept = (_hash(words, x.size).reshape(x.shape) >> 8).astype(jnp.float32) >= jnp.float32(rate) * 2**24
    return jnp.where(kept, x / (1 - jnp.float32(rate)), 0).astype(x.dtype)


def _hash(words: tuple, count: int) -> jax.Array:
    """[count] uint32, the bits of a mask: each entry's number hashed with both words of a key (lowbias32, twice).

    It fuses with what it masks, where threefry's bits took a twentieth of a training step on a CPU.
    """
    first, last = words

    def mixed(x):
        x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
        x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
        return x ^ (x >> 15)

    return mixed(mixed(jax.lax.iota(jnp.uint32, count) + first) ^ last)


def layer_norm(x_NxD: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Over the last axis, in float32."""
    norm = nn.LayerNorm(epsilon, dtype=jnp.float32, parent=None)
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x_NxD)


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function, by erf as published: jax.nn.gelu's erfc takes twice the time."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def attention(query_RxLxHxW, key_RxLxHxW, value_RxLxHxW, visible_RxLxL, words, rate) -> jax.Array:
    """[R, L, H, W]: softmax attention, with dropout on its probabilities."""
    width, dtype = query_RxLxHxW.shape[-1], query_RxLxHxW.dtype
    # Keys lie as [W, L], so that the product is a plain one: a third less time on a CPU.
    scores_RxHxLxL = query_RxLxHxW.swapaxes(1, 2) @ key_RxLxHxW.transpose(0, 2, 3, 1)
    scores_RxHxLxL = scores_RxHxLxL.astype(jnp.float32) / width**0.5
    weights = jax.nn.softmax(jnp.where(visible_RxLxL[:, None], scores_RxHxLxL, HIDE)).astype(dtype)
    return (dropout(words, weights, rate) @ value_RxLxHxW.swapaxes(1, 2)).swapaxes(1, 2)


def fused_attention(query_RxLxHxW, key_RxLxHxW, value_RxLxHxW, visible_RxLxL) -> jax.Array:
    """Attention in one kernel: cuDNN's on a GPU in bfloat16, else XLA's. It has no dropout on its probabilities."""
    fast = jax.default_backend() == "gpu" and query_RxLxHxW.dtype == jnp.bfloat16
    return jax.nn.dot_product_attention(
        query_RxLxHxW, key_RxLxHxW, value_RxLxHxW, mask=visible_RxLxL[:, None],
        implementation="cudnn" if fast else "xla",
    )  # fmt: skip


def sublayer(
    form: Form, x_NxD: jax.Array, visible_RxLxL: jax.Array | None, norm: Map, inner: tuple[Map, ...], outer: Map,
    words: Sequence[tuple | None], rate: jax.Array,
) -> jax.Array:  # fmt: skip
    """[N, D]: x + dropout(outer(core(inner(x)))), with a norm before or after.

    `norm` is (scale, bias), `outer` and each of `inner` (kernel, bias): queries, keys and values, or a feed-forward's
    one, which needs no `visible_RxLxL`. `words`: dropout's of the result and of attention's weights.
    """
    if _has_kernel(form, x_NxD, inner):
        numbers = tuple(jnp.uint32(x) for word in words for x in word or (0, 0))
        rate = jnp.float32(0 if words[0] is None else rate)
        return _by_kernel(form, x_NxD, visible_RxLxL, norm, inner, outer, numbers, rate)
    # Cells lie flat, N = R * L: XLA's CPU backend copies a three-dimensional operand of a weight's gradient.
    dtype = jnp.dtype(form.dtype)
    affine = lambda x, kernel, bias: x.astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)  # noqa: E731
    source = x_NxD if form.norm == "post" else layer_norm(x_NxD, *norm, form.epsilon)
    residual = source if form.norm == "query" else x_NxD
    if form.activation:
        core = (jax.nn.relu if form.activation == "relu" else gelu)(affine(source, *inner[0]))
    else:
        inputs = _projected(form, source, x_NxD if form.norm == "query" else source, inner, visible_RxLxL.shape)
        if form.fused:
            core = fused_attention(*inputs, visible_RxLxL)
        else:
            core = attention(*inputs, visible_RxLxL, words[1], rate)
        core = core.reshape(x_NxD.shape)
    x_NxD = residual + dropout(words[0], affine(core, *outer), rate)
    return layer_norm(x_NxD, *norm, form.epsilon) if form.norm == "post" else x_NxD


def _projected(form: Form, source_NxD, others_NxD, inner: tuple[Map, ...], shape: tuple[int, ...]) -> list[jax.Array]:
    """[R, L, H, W] queries, of `source`, keys and values, of `others`; in one product where these are the same."""
    dtype = jnp.dtype(form.dtype)

    def project(x_NxD, maps):
        product = x_NxD.astype(dtype) @ jnp.concatenate([kernel for kernel, _ in maps], axis=-1).astype(dtype)
        # Split, not indexed, so that their gradients are joined, not each padded and all added.
        parts = zip(jnp.split(product, len(maps), axis=-1), maps, strict=True)
        return [(part + bias.astype(dtype)).reshape(*shape[:2], form.heads, -1) for part, (_, bias) in parts]

    if source_NxD is others_NxD:
        return project(source_NxD, inner)
    return project(source_NxD, inner[:1]) + project(others_NxD, inner[1:])


# The kernels (kernels/sublayer*.c) ------------------------------------------------------------------------------------


def _has_kernel(form: Form, x_NxD: jax.Array, inner: tuple[Map, ...]) -> bool:
    """On one CPU, in float32, for widths of whole vectors; in processes that asked for kernels (native.ask)."""
    widths = [x_NxD.shape[1], inner[0][0].shape[1], x_NxD.shape[1] // (form.heads or 1)]
    suits = form.dtype == "float32" == x_NxD.dtype and not form.fused and not any(width % WIDE for width in widths)
    one = jax.default_backend() == "cpu" and jax.device_count() == 1
    return bool(suits and one and native.at_hand("sublayer"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(form: Form, x_NxD, visible_RxLxL, norm, inner, outer, words, rate) -> jax.Array:
    return _forward(form, x_NxD, visible_RxLxL, norm, inner, outer, words, rate)[0]


def _forward(form: Form, x_NxD, visible_RxLxL, norm, inner, outer, words, rate):
    width, shape = inner[0][0].shape[1], x_NxD.shape
    arguments = [x_NxD, *norm, *outer, rate, *words[:2], *jax.tree.leaves(inner)]
    shapes = [shape, (shape[0], len(inner) * width), (shape[0], width), shape]
    length = CELLS
    if form.heads:
        rows, length = visible_RxLxL.shape[:2]
        lanes = -(-length // WIDE) * WIDE
        arguments += [visible_RxLxL, rate, *words[2:]]
        shapes += [(rows, form.heads, length, lanes)] * 2 + [(rows, width // form.heads, lanes)]
    out, *left = _call("sublayer", form, length, shapes, arguments)
    return out, (x_NxD, norm[0], outer[0], [kernel for kernel, _ in inner], words, rate, left[:5], visible_RxLxL)


def _backward(form: Form, saved, d_out_NxD):
    x_NxD, scale, outer, kernels, words, rate, (inner, core, between, *attended), visible_RxLxL = saved
    (cells, dim), width, parts = x_NxD.shape, outer.shape[0], len(kernels)
    vector, length, rows = (dim,), CELLS, -(-cells // CELLS)
    if form.heads:
        rows, _, length, lanes = attended[0].shape
    shapes = [x_NxD.shape, vector, vector, outer.shape, vector, *[(dim, width), (width,)] * parts]
    shapes += [x_NxD.shape, inner.shape, core.shape, x_NxD.shape, (rows, 3 * dim + parts * width)]
    shapes += [(dim, width), (parts * width, dim)]
    arguments = [d_out_NxD, x_NxD, scale, outer, rate, *words[:2], between, inner, core, *kernels]
    if form.heads:
        shapes += [(rows, length + width // form.heads, lanes)]
        arguments += [visible_RxLxL, *attended]
    d_x, d_scale, d_bias, d_outer, d_outer_bias, *rest = _call("sublayer_gradient", form, length, shapes, arguments)
    d_inner = tuple(zip(rest[: 2 * parts : 2], rest[1 : 2 * parts : 2], strict=True))
    return d_x, None, (d_scale, d_bias), d_inner, (d_outer, d_outer_bias), None, None


_by_kernel.defvjp(_forward, _backward)


def _call(name: str, form: Form, cells: int, shapes: list[tuple[int, ...]], arguments: list) -> list[jax.Array]:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call(native.kernel(name), results, vmap_method="sequential")
    return call(
        *arguments, activation=np.int32(CORES.index(form.activation)), cells=np.int32(cells),
        epsilon=np.float32(form.epsilon), heads=np.int32(form.heads), norm=np.int32(NORMS.index(form.norm)),
    )  # fmt: skip
