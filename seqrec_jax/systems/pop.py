"""Popularity: every user gets the most frequent items."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax.data.batches import train_counts
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.encoders.transformer import table_rows
from seqrec_jax.systems.system import System


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh) -> System:
    """`pop.counts`: actions of the training part, or all. Equal counts: the item seen first in the file comes first."""
    scores_Vx1 = popularity_scores(dataset, config.pop.counts)
    return System(
        init=lambda key: {"items": scores_Vx1},
        states=lambda params, batch: jnp.ones((batch.users_U.shape[0], 1)),
    )


def popularity_scores(dataset: SequenceDataset, counts: str) -> np.ndarray:
    """[table rows, 1] float32: the number of items less popular than each, so no two scores are equal."""
    items = len(dataset.item_ids)
    count_V = train_counts(dataset) if counts == "train" else np.bincount(dataset.items_A, minlength=items + 1)
    best_first = np.argsort(-count_V[1:], kind="stable") + 1  # dense ids follow first appearance
    scores_Vx1 = np.zeros((table_rows(items), 1), np.float32)
    scores_Vx1[best_first, 0] = np.arange(items, 0, -1)
    return scores_Vx1
