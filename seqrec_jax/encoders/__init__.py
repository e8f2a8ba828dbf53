"""The encoder that config.encoder.kind names, one signature for all: a batch → hidden_RxLxD."""

import jax
from ml_collections import ConfigDict

from seqrec_jax.data.batches import Batch
from seqrec_jax.encoders import gru, transformer
from seqrec_jax.encoders.transformer import append_user_token, table_rows, user_states

ENCODERS = {"transformer": transformer, "gru": gru}

__all__ = ["ENCODERS", "append_user_token", "encode", "init", "table_rows", "user_states"]


def init(key: jax.Array, config: ConfigDict, num_items: int, *, causal: bool = True) -> dict:
    """Parameters {"items": [rows, dim], "encoder": ...} for `config` (config.encoder).

    Raises UserError where the encoder cannot be bidirectional and `causal` is False.
    """
    return ENCODERS[config.kind].init(key, config, num_items, causal=causal)


def encode(
    params: dict, batch: Batch, config: ConfigDict, key: jax.Array | None, hparams: dict, *, causal: bool = True,
    last_only: bool = False,
) -> jax.Array:  # fmt: skip
    """hidden_RxLxD float32; `last_only`: the states at the histories' last items alone, [U, D], which costs less.

    `key` None: no dropout; hparams holds the two dropout rates. UserError as in `init`.
    """
    return ENCODERS[config.kind].encode(params, batch, config, key, hparams, causal=causal, last_only=last_only)
