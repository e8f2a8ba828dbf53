"""What training does to the representations (DuoRec, Qiu et al., WSDM 2022, Sections 3.2, 5.4), and a collapse watch.

Users are compared by their states at the end of the validation history, on a fixed sample; with fixed keys for dropout
every figure follows from the parameters alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax.data.batches import (
    Batch,
    Examples,
    batch_of,
    history_examples,
    layout_of,
    plan_epoch,
    train_counts,
)
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.evaluate import BLOCK_SCORES, HELD_OUT
from seqrec_jax.losses.contrastive import unit
from seqrec_jax.protocol import ranks_items
from seqrec_jax.sharding import replicate, replicated, split_rows
from seqrec_jax.systems import System, hparams_of

COMPARED = 4096  # at most so many users are compared with one another
WATCHED = 256  # and so many after every validation
ENCODED = 512  # users encoded at a time; fixed, because the dropout masks depend on it
TOP = 10
SAME_COSINE, SAME_SHARE = 0.99, 0.5  # above either, a model says the same of everybody
FEW = 100  # with fewer users or items, equal lists are no sign of a collapse


# Figures --------------------------------------------------------------------------------------------------------------


def alignment(x_NxD: jax.Array, y_NxD: jax.Array) -> jax.Array:
    """Eq. 6: the mean of |x - y|^2 over the positive pairs (x_n, y_n) of unit vectors; 0 to 4."""
    return ((unit(x_NxD) - unit(y_NxD)) ** 2).sum(axis=1).mean()


def target_alignment(x_NxD: jax.Array, target_N: jax.Array) -> jax.Array:
    """Eq. 16 with DuoRec's supervised positives: the mean of |x - y|^2 over all pairs of users with the same target.

    Exact without the pairs: n unit vectors with the sum s are n * n - |s|^2 over all their pairs. NaN: no such pair.
    """
    x_NxD = unit(x_NxD)
    _, group_N = jnp.unique(target_N, return_inverse=True, size=len(target_N))
    sum_of = functools.partial(jax.ops.segment_sum, segment_ids=group_N, num_segments=len(target_N))
    count_G = sum_of(jnp.ones(len(target_N)))
    apart_G = count_G * sum_of((x_NxD**2).sum(axis=1)) - (sum_of(x_NxD) ** 2).sum(axis=1)
    return apart_G.sum() / (count_G * (count_G - 1) / 2).sum()


def uniformity(x_NxD: jax.Array) -> jax.Array:
    """Eq. 7: log of the mean of exp(-2 |x - y|^2) over all pairs of different rows as unit vectors; -8 to 0.

    Never holds more than some rows of the N x N matrix. NaN: fewer than two rows.
    """
    x_NxD, count = unit(x_NxD), len(x_NxD)

    def near(index_and_row):
        index, x_D = index_and_row
        near_N = jnp.exp(4 * jnp.matmul(x_NxD, x_D, precision=jax.lax.Precision.HIGHEST) - 4)
        return jnp.where(jnp.arange(count) == index, 0, near_N).sum()

    near_N = jax.lax.map(near, (jnp.arange(count), x_NxD), batch_size=max(BLOCK_SCORES // count, 1))
    return jnp.log(near_N.sum() / (count * (count - 1)))


def mean_cosine(x_NxD: jax.Array) -> jax.Array:
    """The mean cosine over all pairs of different rows, from the sum of the unit vectors. NaN: fewer than two rows."""
    x_NxD, count = unit(x_NxD), len(x_NxD)
    return ((x_NxD.sum(axis=0) ** 2).sum() - (x_NxD**2).sum()) / (count * (count - 1))


def spectrum(items_VxD: jax.Array) -> jax.Array:
    """Figure 1c: the singular values of the (uncentred) table, falling, the largest being 1."""
    values_D = jnp.linalg.svd(jnp.linalg.qr(items_VxD, mode="r"), compute_uv=False)
    return values_D / values_D[0]


def effective_rank(values_D: jax.Array) -> jax.Array:
    """Roy and Vetterli (EUSIPCO 2007): exp of the entropy of the singular values as shares of their sum; 1 to D."""
    share_D = values_D / values_D.sum()
    return jnp.exp(-jax.scipy.special.xlogy(share_D, share_D).sum())


def user_rank(x_NxD: jax.Array) -> jax.Array:
    """How many dimensions unit vectors differ in: the effective rank around their mean. NaN: they do not differ.

    Of a method without negatives it tells what the spread of projections cannot: that all users lie on one line.
    """
    x_NxD = unit(x_NxD)
    return effective_rank(spectrum(x_NxD - x_NxD.mean(axis=0)))


def project(items_VxD: jax.Array) -> jax.Array:
    """Figure 1a: [V, 2], the rows along the first two singular directions, each turned so that its mean is not < 0."""
    items_VxD = jnp.pad(items_VxD, ((0, 0), (0, max(2 - items_VxD.shape[1], 0))))  # a one-dimensional table is flat
    _, _, directions_DxD = jnp.linalg.svd(jnp.linalg.qr(items_VxD, mode="r"))
    places_Vx2 = jnp.matmul(items_VxD, directions_DxD[:2].T, precision=jax.lax.Precision.HIGHEST)
    return places_Vx2 * jnp.where(places_Vx2.mean(axis=0) < 0, -1, 1)


def top_items(states_NxD: jax.Array, items_VxD: jax.Array, num_items: int, count: int) -> jax.Array:
    """[N, count] the items 1..num_items with the largest dot product, best first, equal ones by lower id."""
    rows = items_VxD.shape[0]
    real_V = (jnp.arange(rows) >= 1) & (jnp.arange(rows) <= num_items)

    def best(state_D):
        scores_V = jnp.matmul(items_VxD, state_D, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(jnp.where(real_V, scores_V, -jnp.inf), count)[1]

    return jax.lax.map(best, states_NxD, batch_size=max(BLOCK_SCORES // rows, 1))


# A run's figures ------------------------------------------------------------------------------------------------------


@struct.dataclass
class Sample:
    """Validation histories of N users, the same ones at every look."""

    batches: Batch  # every leaf with a leading axis of steps
    slot_N: jax.Array  # where each user's state is among those of all steps
    target_N: jax.Array  # the held-out item


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What is looked at in the models of one run besides their metrics. Samples are made at the first look."""

    dataset: SequenceDataset
    config: ConfigDict
    mesh: Mesh

    @property
    def num_items(self) -> int:
        return len(self.dataset.item_ids)

    @functools.cached_property
    def compared(self) -> Sample:
        return make_sample(self.dataset, self.config, COMPARED, self.mesh)

    @functools.cached_property
    def watched(self) -> Sample:
        return make_sample(self.dataset, self.config, WATCHED, self.mesh)

    def figures(self, system: System, params: dict) -> dict[str, float]:
        """The figures above, of the compared users' states and of the item table (items alone, no special rows).

        alignment: of the same history under two dropout masks, at the run's own rates; target_alignment: of users with
        the same validation item. A figure without a pair to measure is left out.
        """
        encode = functools.partial(_encode, system.states, params, self.compared, self.mesh)
        masked = [encode(jax.random.key(seed), hparams_of(self.config)) for seed in (0, 1)]
        return _defined(_figures(encode(), *masked, self.compared.target_N, params, self.num_items, self.mesh))

    def watch(self, system: System, params: dict) -> dict[str, float]:
        """mean_cosine of the watched users' states, and same_top10: the share of these users who get the most frequent
        set of ten best items. Nothing is hidden: other histories would make equal rankings look unlike.
        """
        if not ranks_items(self.config):
            return _defined({"mean_cosine": _mean_cosine(system.states, params, self.watched, self.mesh)})
        top = min(TOP, self.num_items)
        cosine, top_NxK = _watch(system.states, params, self.watched, self.num_items, top, self.mesh)
        _, counts = np.unique(np.sort(jax.device_get(top_NxK), axis=1), axis=0, return_counts=True)
        return _defined({"mean_cosine": cosine, "same_top10": counts.max() / counts.sum()})

    def collapse(self, step: int, seen: dict[str, float]) -> dict | None:
        """`seen` with its step if it is over a bound, else None."""
        lists_tell = min(len(self.watched.slot_N), self.num_items) >= FEW
        same = seen.get("mean_cosine", 0) > SAME_COSINE or (lists_tell and seen.get("same_top10", 0) > SAME_SHARE)
        return {"step": step} | seen if same else None


def make_sample(dataset: SequenceDataset, config: ConfigDict, size: int, mesh: Mesh) -> Sample:
    """At most `size` of the evaluated users, drawn with a fixed seed."""
    held_out = HELD_OUT["valid"]
    everyone = history_examples(dataset, held_out, config.encoder.max_length)
    count = len(everyone.user_E)
    chosen = np.sort(np.random.default_rng(0).choice(count, min(size, count), replace=False))
    sample = Examples(everyone.start_E[chosen], everyone.length_E[chosen], everyone.user_E[chosen])
    layout = layout_of(sample, ENCODED, config, mesh)
    batches = _batches(jnp.asarray(dataset.items_A), layout)
    users = np.asarray(batches.users_U).reshape(-1)
    slot_N = np.flatnonzero(users >= 0)
    target_N = dataset.items_A[dataset.offsets_U1[users[slot_N] + 1] - held_out]
    return replicate(mesh, Sample(batches, slot_N, target_N))


@jax.jit
def _batches(items_A, layout):
    plan = plan_epoch(layout, None)
    return jax.vmap(batch_of, (None, None, None, 0))(items_A, layout, plan, jnp.arange(layout.steps))


def arrays(params: dict, dataset: SequenceDataset, mesh: Mesh) -> dict[str, np.ndarray]:
    """What plots need: spectrum_D, projection_Vx2 and train_count_V (how often each item occurs in training)."""
    spectrum_D, projection_Vx2 = jax.device_get(_table(params, len(dataset.item_ids), mesh))
    return {"spectrum_D": spectrum_D, "projection_Vx2": projection_Vx2, "train_count_V": train_counts(dataset)[1:]}


def user_projection(system: System, params: dict, looks: Analysis) -> np.ndarray:
    """[N, 2]: the compared users' unit states along their two principal directions (CLUE, Figure 7)."""
    states_NxD = unit(_encode(system.states, params, looks.compared, looks.mesh))
    return np.asarray(project(states_NxD - states_NxD.mean(axis=0)))


def _items(params, num_items):
    return params["items"][1 : num_items + 1].astype(jnp.float32)


def _defined(figures) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(figures).items() if not np.isnan(value)}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(states, params, sample, mesh, *dropout):
    """[N, D] states of the sample; `dropout`: (key, hparams)."""

    def step(index_and_batch):
        index, batch = index_and_batch
        masks = [jax.random.fold_in(key, index) for key in dropout[:1]]
        return states(params, split_rows(mesh, batch), *masks, *dropout[1:])

    states_TxUxD = jax.lax.map(step, (jnp.arange(len(sample.batches.users_U)), sample.batches))
    return replicated(mesh, states_TxUxD.reshape(-1, states_TxUxD.shape[-1])[sample.slot_N])


@functools.partial(jax.jit, static_argnames=("num_items", "mesh"))
def _table(params, num_items, mesh):
    items_VxD = _items(params, num_items)
    return replicated(mesh, (spectrum(items_VxD), project(items_VxD)))


@functools.partial(jax.jit, static_argnames=("num_items", "mesh"))
def _figures(plain_NxD, masked_NxD, masked_again_NxD, target_N, params, num_items, mesh):
    items_VxD = _items(params, num_items)
    figures = {
        "alignment": alignment(masked_NxD, masked_again_NxD),
        "target_alignment": target_alignment(plain_NxD, target_N),
        "uniformity": uniformity(plain_NxD),
        "user_rank": user_rank(plain_NxD),
        "item_cosine": mean_cosine(items_VxD),
        "effective_rank": effective_rank(spectrum(items_VxD)),
    }
    return replicated(mesh, figures)


@functools.partial(jax.jit, static_argnames=("states", "mesh"))
def _mean_cosine(states, params, sample, mesh):
    return replicated(mesh, mean_cosine(_encode(states, params, sample, mesh)))


@functools.partial(jax.jit, static_argnames=("states", "num_items", "top", "mesh"))
def _watch(states, params, sample, num_items, top, mesh):
    states_NxD = _encode(states, params, sample, mesh)
    return replicated(mesh, (mean_cosine(states_NxD), top_items(states_NxD, params["items"], num_items, top)))
