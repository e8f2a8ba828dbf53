"""Transformer over packed rows: a batch → hidden_RxLxD. Causal or bidirectional; published backbones by settings."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from seqrec_jax import native
from seqrec_jax.data.batches import Batch, cells, position_ids
from seqrec_jax.encoders.sublayer import Form, dropout, layer_norm, sublayer

USER_TOKEN = -1  # stands for [UR] among a batch's items
PLACES = 4  # where a block drops out: attention's weights, its output, the feed-forward's output, the filter's


def words_of(keys_K: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """What dropout takes of each key: two numbers apart from the others, so that its program is the same everywhere."""
    data_KxW = jax.random.key_data(keys_K)
    width = data_KxW.shape[1]
    words = split(data_KxW.reshape(-1), [()] * data_KxW.size)
    return list(zip(words[::width], words[width - 1 :: width], strict=True))


def split(vector: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Its parts, of 4 bytes an entry, as arrays. On a CPU a kernel copies them: XLA would compile a loop for each."""
    if jax.default_backend() == "cpu" and (kernel := native.at_hand("split")):
        parts = [jax.ShapeDtypeStruct(shape, vector.dtype) for shape in shapes]
        return jax.ffi.ffi_call(kernel, parts, vmap_method="sequential")(vector)
    parts = jnp.split(vector, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def settled(tree):
    """The same arrays. Where XLA makes them on a CPU, a branch keeps them: it drops optimization barriers and would
    work them out anew for every element of every consumer (for attention's masks, a tenth of an evaluation).
    """
    if jax.default_backend() != "cpu" or native.at_hand("cells"):
        return tree
    always = jax.tree.leaves(tree)[0].ravel()[0] > jnp.iinfo(jnp.int32).min
    return jax.lax.cond(always, lambda tree: tree, lambda tree: jax.tree.map(jnp.zeros_like, tree), tree)


def recent_mean(x_NxD: jax.Array, visible_RxLxL: jax.Array, width: int) -> jax.Array:
    """[N, D]: the mean over the cells within `width` of each, itself among them, that it sees."""
    places_L = jnp.arange(visible_RxLxL.shape[1])
    near_RxLxL = visible_RxLxL & (jnp.abs(places_L[:, None] - places_L) < width)
    weights_RxLxL = near_RxLxL / jnp.maximum(near_RxLxL.sum(axis=2, keepdims=True), 1)
    return (weights_RxLxL.astype(x_NxD.dtype) @ x_NxD.reshape(*visible_RxLxL.shape[:2], -1)).reshape(x_NxD.shape)


class Linear(nn.Module):
    """Kernel and bias of a nn.Dense, without its product."""

    width: int

    @nn.compact
    def __call__(self, inputs: int):
        kernel = self.param("kernel", nn.initializers.zeros, (inputs, self.width))
        return kernel, self.param("bias", nn.initializers.zeros, (self.width,))


class Norm(nn.Module):
    """Scale and bias of a nn.LayerNorm, without its work."""

    @nn.compact
    def __call__(self, width: int):
        return self.param("scale", nn.initializers.ones, (width,)), self.param("bias", nn.initializers.zeros, (width,))


class Block(nn.Module):
    """Self-attention and feed-forward with residuals (post-, pre- or query-norm); `cells_U`: for these cells alone.

    Beside attention, with weight config.filter (alpha there), a filter of frequencies (BSARec, Shin et al., AAAI 2024):
    the low part of the input as it is, the rest times a learned factor a dimension (beta squared). There the low part
    comes from a Fourier transform of the whole history; the mean of recent cells reads no future, so that all targets
    of a row are learned at once.
    """

    config: Any  # config.encoder, frozen

    @nn.compact
    def __call__(self, x_NxD, visible_RxLxL, words, rate, cells_U=None):
        config, dim = self.config, self.config.dim
        of_weights, of_attention, of_ffn, of_filter = words or (None,) * PLACES
        attention = Form(config.norm, config.norm_epsilon, "", config.heads, config.attention == "fused", config.dtype)
        feed_forward = Form(config.norm, config.norm_epsilon, config.activation, dtype=config.dtype)

        before, norm = x_NxD, Norm(name="norm_attention")(dim)
        inner = tuple(Linear(dim, name=name)(dim) for name in ("query", "key", "value"))
        outer = Linear(dim, name="output")(dim)
        x_NxD = sublayer(attention, before, visible_RxLxL, norm, inner, outer, (of_attention, of_weights), rate)
        if config.filter:
            source = before if config.norm == "post" else layer_norm(before, *norm, config.norm_epsilon)
            others, residual = (before, source) if config.norm == "query" else (source, before)
            low = recent_mean(others, visible_RxLxL, config.filter_width)
            high_share = self.param("filter", nn.initializers.normal(1.0), (dim,)) ** 2
            filtered = residual + dropout(of_filter, low + high_share.astype(config.dtype) * (others - low), rate)
            if config.norm == "post":
                filtered = layer_norm(filtered, *Norm(name="norm_filter")(dim), config.norm_epsilon)
            x_NxD = config.filter * filtered + (1 - config.filter) * x_NxD

        if cells_U is not None:  # what follows is cell by cell
            x_NxD = x_NxD[cells_U]
        norm = Norm(name="norm_ffn")(dim)
        inner, outer = (Linear(config.ffn, name="inner")(dim),), Linear(dim, name="outer")(config.ffn)
        return sublayer(feed_forward, x_NxD, None, norm, inner, outer, (of_ffn,), rate)


class Transformer(nn.Module):
    """Embeddings in, states out; the item table lives outside, because the output is tied to it. `init` draws the
    matrices, which are zero here.
    """

    config: Any
    causal: bool = True

    @nn.compact
    def __call__(self, embedded_RxLxD, positions_RxL, segments_RxL, key, embedding_rate, hidden_rate, cells_U=None):
        config = self.config
        norm = lambda name, x: layer_norm(x, *Norm(name=name)(config.dim), config.norm_epsilon)  # noqa: E731
        words = [None] * (1 + config.layers * PLACES)
        if key is not None:
            key_input, *_ = keys = jax.random.split(key, config.layers + 1)
            of_blocks = jax.vmap(lambda key: jax.random.split(key, PLACES))(keys[1:])
            words = words_of(jnp.concatenate([key_input[None], of_blocks.reshape(-1)]))
        places = config.max_length + config.user_token
        positions = self.param("positions", nn.initializers.zeros, (places, config.dim))
        # Flat from here on, so that the same program parts serve as in the blocks.
        x = embedded_RxLxD.reshape(-1, config.dim) * (config.dim**0.5 if config.scale_embedding else 1.0)
        x = x + positions[positions_RxL.reshape(-1)]
        x = norm("norm_input", x) if config.input_norm else x
        x = dropout(words[0], x, embedding_rate).astype(config.dtype)
        visible = (segments_RxL[:, :, None] == segments_RxL[:, None, :]) & (segments_RxL[:, None, :] > 0)
        if self.causal:
            visible &= jnp.tril(jnp.ones((visible.shape[1],) * 2, bool))
        for layer in range(config.layers):
            wanted_U = cells_U if layer == config.layers - 1 else None
            of_block = words[1 + PLACES * layer :][:PLACES]
            x = Block(config, name=f"block_{layer}")(x, visible, of_block, hidden_rate, wanted_U)
        x = norm("norm_output", x) if config.final_norm else x
        return x.astype(jnp.float32).reshape(embedded_RxLxD.shape if cells_U is None else x.shape)


def initializer(config: ConfigDict):
    """Normal or truncated normal (within one `init_scale`) for every kernel and table."""
    if config.init == "normal":
        return jax.nn.initializers.normal(config.init_scale)
    scale = config.init_scale
    return lambda key, shape, dtype=jnp.float32: scale * jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype)


def drawn(key: jax.Array, params: dict, config: ConfigDict) -> dict:
    """`params` with new matrices, all from one vector: a draw for each takes twice as long to compile."""
    leaves, structure = jax.tree.flatten(params)
    places = [place for place, leaf in enumerate(leaves) if leaf.ndim == 2]
    shapes = [leaves[place].shape for place in places]
    vector = initializer(config)(key, (sum(map(math.prod, shapes)),))
    for place, part in zip(places, split(vector, shapes), strict=True):
        leaves[place] = part
    return jax.tree.unflatten(structure, leaves)


def table_rows(num_items: int) -> int:
    """Rows of the item table: padding, items, the mask token, filled up so that any mesh of up to 64 divides them."""
    return -(-(num_items + 2) // 64) * 64


def init(key: jax.Array, config: ConfigDict, num_items: int, *, causal: bool = True) -> dict:
    """Parameters {"items": [rows, dim], "encoder": ...}."""
    key_items, key_encoder = jax.random.split(key)
    items_VxD = initializer(config)(key_items, (table_rows(num_items), config.dim))
    zeros = jnp.zeros((1, config.max_length), jnp.int32)
    embedded = jnp.zeros((1, config.max_length, config.dim))
    encoder = Transformer(config, causal).init(key_encoder, embedded, zeros, zeros, None, 0.0, 0.0)["params"]
    encoder = drawn(jax.random.fold_in(key_encoder, 1), encoder, config)
    if config.user_token:
        encoder |= {"user_token": initializer(config)(jax.random.fold_in(key_encoder, 0), (config.dim,))}
    return {"items": items_VxD, "encoder": encoder}


def encode(
    params: dict, batch: Batch, config: ConfigDict, key: jax.Array | None, hparams: dict, *, causal: bool = True,
    last_only: bool = False,
) -> jax.Array:  # fmt: skip
    """hidden_RxLxD float32; `last_only`: the last_states alone, [U, D], and the last layer ends with these cells.

    `key` None: no dropout; hparams holds the two dropout rates.
    """
    items_RxL, segments_RxL, positions_RxL = settled((batch.items_RxL, batch.segments_RxL, batch.positions_RxL))
    embedded_RxLxD = params["items"][items_RxL]
    if config.user_token:
        is_token_RxLx1 = (items_RxL == USER_TOKEN)[..., None]
        embedded_RxLxD = jnp.where(is_token_RxLx1, params["encoder"]["user_token"], embedded_RxLxD)
    return Transformer(config, causal).apply(
        {"params": params["encoder"]}, embedded_RxLxD, positions_RxL, segments_RxL, key,
        hparams["embedding_dropout"], hparams["hidden_dropout"], batch.last_U if last_only else None,
    )  # fmt: skip


def append_user_token(batch: Batch, positions: str) -> Batch:
    """[UR] in the free cell behind every history, as its last item, at position L + 1 (CLUE, Section IV-C)."""
    rows, width = batch.items_RxL.shape
    length_U = jnp.where(batch.length_U > 0, batch.length_U + 1, 0)
    segments_RxL, offset_RxL, length_RxL = cells(batch.row_U, batch.column_U, length_U, rows, width)
    is_token_RxL = (segments_RxL > 0) & (offset_RxL == length_RxL - 1)
    return batch.replace(
        items_RxL=jnp.where(is_token_RxL, USER_TOKEN, batch.items_RxL),
        segments_RxL=segments_RxL,
        positions_RxL=position_ids(offset_RxL, length_RxL, width, positions),
        length_U=length_U,
    )


def user_states(params: dict, batch: Batch, config: ConfigDict, key: jax.Array | None, hparams: dict) -> jax.Array:
    """[U, D]: each history's state at the [UR] token behind it, which reads all of it (config.user_token)."""
    batch = append_user_token(batch, config.positions)
    return encode(params, batch, config, key, hparams, causal=False, last_only=True)


def last_states(hidden_RxLxD: jax.Array, batch: Batch) -> jax.Array:
    """The state at each history's last item: [U, D]."""
    return hidden_RxLxD.reshape(-1, hidden_RxLxD.shape[-1])[batch.last_U]
