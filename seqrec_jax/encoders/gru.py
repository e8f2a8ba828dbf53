"""GRU over packed rows: a batch → hidden_RxLxD (GRU4Rec, Hidasi et al., ICLR 2016; the cell of Cho et al., 2014)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from seqrec_jax.data.batches import Batch
from seqrec_jax.encoders.sublayer import dropout
from seqrec_jax.encoders.transformer import initializer, last_states, table_rows, words_of
from seqrec_jax.errors import UserError


class GRU(nn.Module):
    """Layers of flax's GRUCell, each from column to column; every history begins with a state of zeros."""

    config: Any  # config.encoder, frozen

    @nn.compact
    def __call__(self, embedded_RxLxD, segments_RxL, key, embedding_rate, hidden_rate):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        words = [None] * config.layers if key is None else words_of(jax.random.split(key, config.layers))
        begins_RxL = jnp.diff(segments_RxL, axis=1, prepend=0) != 0
        scan = nn.scan(_advance, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        x = embedded_RxLxD
        for layer in range(config.layers):
            x = dropout(words[layer], x, hidden_rate if layer else embedding_rate).astype(dtype)
            cell = nn.GRUCell(config.dim, dtype=dtype, name=f"layer_{layer}")
            _, x = scan(cell, jnp.zeros_like(x[:, 0]), (x, begins_RxL))
        return x.astype(jnp.float32)


def _advance(cell, state_RxD, column):
    x_RxD, begins_R = column
    return cell(jnp.where(begins_R[:, None], 0, state_RxD), x_RxD)


def init(key: jax.Array, config: ConfigDict, num_items: int, *, causal: bool = True) -> dict:
    """Parameters {"items": [rows, dim], "encoder": ...}: the table as config.init says, the cells as flax begins them.

    Raises UserError where `causal` is False.
    """
    _check_direction(causal)
    key_items, key_encoder = jax.random.split(key)
    items_VxD = initializer(config)(key_items, (table_rows(num_items), config.dim))
    one_cell = jnp.zeros((1, 1, config.dim)), jnp.zeros((1, 1), jnp.int32)
    return {"items": items_VxD, "encoder": GRU(config).init(key_encoder, *one_cell, None, 0.0, 0.0)["params"]}


def encode(
    params: dict, batch: Batch, config: ConfigDict, key: jax.Array | None, hparams: dict, *, causal: bool = True,
    last_only: bool = False,
) -> jax.Array:  # fmt: skip
    """hidden_RxLxD float32; `last_only`: the last_states alone, [U, D]. `key` None: no dropout; hparams holds the two
    dropout rates. No positions are read.

    Raises UserError where `causal` is False.
    """
    _check_direction(causal)
    hidden_RxLxD = GRU(config).apply(
        {"params": params["encoder"]}, params["items"][batch.items_RxL], batch.segments_RxL, key,
        hparams["embedding_dropout"], hparams["hidden_dropout"],
    )  # fmt: skip
    return last_states(hidden_RxLxD, batch) if last_only else hidden_RxLxD


def _check_direction(causal: bool) -> None:
    if not causal:
        raise UserError(
            "encoder.kind=gru reads a history from its first item to its last and cannot be bidirectional, as is asked "
            "here; allowed: encoder.kind=transformer"
        )
