"""Useful floating-point operations of a training step by formula: products of matrices, real cells only."""

import numpy as np
from ml_collections import ConfigDict

TRAINING = 3  # forward once; backward twice, for the inputs and for the weights (or the other factor)


def loss_flops(targets: int, dim: int, items: int) -> int:
    """Full softmax with both gradients: three products [targets, dim] x [dim, items], 6 M d N."""
    return TRAINING * 2 * targets * dim * items


def encoder_flops(cells: int, pairs: int, config: ConfigDict) -> int:
    """One forward pass over `cells` real cells; `pairs`: (query, visible key) pairs of cells, see visible_pairs.

    A cell and layer: four projections d x d and two feed-forward products d x ffn; a pair and layer: score and mix.
    """
    cell = 2 * (4 * config.dim**2 + 2 * config.dim * config.ffn)
    return config.layers * (cells * cell + pairs * 2 * 2 * config.dim)


def visible_pairs(lengths_E: np.ndarray) -> int:
    """Pairs that causal attention needs: n (n + 1) / 2 a history; what is hidden is not useful work."""
    lengths_E = lengths_E.astype(np.int64)
    return int((lengths_E * (lengths_E + 1) // 2).sum())


def step_flops(lengths_E: np.ndarray, steps: int, config: ConfigDict, items: int) -> float:
    """Mean over the `steps` of an epoch of SASRec's training step over examples of these lengths, all targets."""
    cells = int(lengths_E.sum())
    encoder = TRAINING * encoder_flops(cells, visible_pairs(lengths_E), config)
    return (loss_flops(cells, config.dim, items) + encoder) / steps
