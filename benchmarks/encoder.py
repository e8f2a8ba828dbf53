"""python -m benchmarks.encoder: where the encoder's part of a packed step goes, beside its useful arithmetic."""

import sys
import tempfile
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks import data, flops, machine
from benchmarks.run import Sizes, config_of
from configs import sasrec
from seqrec_jax import native
from seqrec_jax.data.batches import batch_of, plan_epoch
from seqrec_jax.data.prepare import prepare
from seqrec_jax.encoders import transformer
from seqrec_jax.run import train_layout
from seqrec_jax.sharding import make_mesh
from seqrec_jax.systems import hparams_of

ROUNDS, REPEATS = 7, 8


def main() -> int:
    """Prints milliseconds of nested parts of one encoding with gradients, and the share of the GEMM limit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made_up.txt"
        data.write_lines(data.made_up(Sizes.users, Sizes.items), path)
        config = config_of(sasrec, Sizes(), path)
        dataset = prepare(config.data, Path(folder) / "prepared")
    mesh = make_mesh(1, 1)
    native.ask(mesh)
    layout = train_layout(config, dataset, mesh)
    batch = jax.jit(batch_of)(jnp.asarray(dataset.items_A), layout, jax.jit(plan_epoch)(layout, None), 0)
    encoder, hparams, key = FrozenConfigDict(config.encoder), hparams_of(config), jax.random.key(0)
    params = jax.jit(transformer.init, static_argnums=(1, 2))(key, encoder, len(dataset.item_ids))
    weights_RxLxD = jax.random.normal(key, (*batch.items_RxL.shape, encoder.dim))

    def forward(params, key, layers=encoder.layers):
        fewer = FrozenConfigDict({**encoder.to_dict(), "layers": layers})
        return (transformer.encode(params, batch, fewer, key, hparams) * weights_RxLxD).sum()

    gradients = jax.grad(forward)
    parts = {
        "forward, no dropout": lambda: forward(params, None),
        "forward": lambda: forward(params, key),
        "gradients, no dropout": lambda: gradients(params, None),
        "gradients, no layer": lambda: gradients(params, key, 0),
        "gradients": lambda: gradients(params, key),
    }
    compiled = {name: jax.jit(part) for name, part in parts.items()}
    multiply = machine.gemm()
    limit, seconds = [], {name: [] for name in parts}
    for _ in range(ROUNDS + 1):  # the first one compiles
        limit.append(multiply())
        for name, part in compiled.items():
            seconds[name].append(machine.timed(part, REPEATS))
    lengths = np.asarray(batch.length_U)
    work = flops.TRAINING * flops.encoder_flops(int(lengths.sum()), flops.visible_pairs(lengths), encoder)
    rate = 2 * machine.GEMM**3 / min(limit)
    print(f"{int(lengths.sum()):,} cells in {batch.items_RxL.shape[0]} rows; GEMM {rate / 1e9:.0f} GFLOP/s")
    for name, values in seconds.items():
        print(f"{name:<24}{1e3 * median(values[1:]):8.2f} ms (minimum {1e3 * min(values[1:]):.2f})")
    print(f"{'useful arithmetic':<24}{1e3 * work / rate:8.2f} ms at that rate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
