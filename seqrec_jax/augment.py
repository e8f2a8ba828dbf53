"""Crop, mask and reorder (CL4SRec, Section 3.3) as one formula over ranks: no sort, no branch, one history at a time.

All functions take one history [length] padded to [L] and are meant for `jax.vmap`; ratios are traced scalars. Nothing
is written into the input.
"""

import jax
import jax.numpy as jnp

OPERATORS = ("crop", "mask", "reorder")


def augment(
    key: jax.Array, items_L: jax.Array, length: jax.Array, operator: jax.Array, ratio: jax.Array, mask_item: int
) -> tuple[jax.Array, jax.Array]:
    """Applies OPERATORS[operator] with its `ratio`; returns (items_L, length) of the view.

    crop (Eq. 3) keeps a window of max(1, floor(ratio * n)) items; mask (Eq. 4) replaces floor(ratio * n) places by
    `mask_item`; reorder (Eq. 5) shuffles a window of floor(ratio * n) items. Windows start uniformly over the
    n - window + 1 places. The floors are those of the float32 product.
    """
    crops, masks, reorders = (operator == index for index in range(3))
    key_start, key_rank = jax.random.split(key)
    places_L = jnp.arange(items_L.shape[0])
    span = jnp.floor(jnp.float32(ratio) * length).astype(jnp.int32)
    span = jnp.where(crops, jnp.maximum(span, 1), span)
    starts = jnp.maximum(length - span + 1, 1)
    start = jnp.minimum((jax.random.uniform(key_start) * starts).astype(jnp.int32), starts - 1)

    in_window_L = (places_L >= start) & (places_L < start + span)
    shuffled_L = jnp.where(masks, places_L < length, in_window_L)  # the places that receive a random rank
    noise_L = jax.random.bits(key_rank, items_L.shape)
    before_LxL = (noise_L[None] < noise_L[:, None]) | (
        (noise_L[None] == noise_L[:, None]) & (places_L[None] < places_L[:, None])
    )
    rank_L = (before_LxL & shuffled_L[None]).sum(axis=1)

    source_L = jnp.where(reorders & in_window_L, start + rank_L, places_L + jnp.where(crops, start, 0))
    view_L = items_L[jnp.minimum(source_L, items_L.shape[0] - 1)]
    view_L = jnp.where(masks & (rank_L < span), mask_item, view_L)
    view_length = jnp.where(length > 0, jnp.where(crops, span, length), 0)
    return jnp.where(places_L < view_length, view_L, 0), view_length


def crop(key, items_L, length, ratio):
    """Item crop, Eq. 3."""
    return augment(key, items_L, length, 0, ratio, 0)


def mask(key, items_L, length, ratio, mask_item):
    """Item mask, Eq. 4."""
    return augment(key, items_L, length, 1, ratio, mask_item)


def reorder(key, items_L, length, ratio):
    """Item reorder, Eq. 5."""
    return augment(key, items_L, length, 2, ratio, 0)


def drop(key, items_L, length, ratio):
    """CLUE's item cropping (Section IV-B): a window of min(floor(ratio * n), n - 1) items is left out."""
    places_L = jnp.arange(items_L.shape[0])
    span = jnp.clip(jnp.floor(jnp.float32(ratio) * length).astype(jnp.int32), 0, jnp.maximum(length - 1, 0))
    start = jax.random.randint(key, (), 0, length - span + 1)
    view_L = items_L[jnp.minimum(places_L + jnp.where(places_L >= start, span, 0), items_L.shape[0] - 1)]
    return jnp.where(places_L < length - span, view_L, 0), length - span


def draw_operators(key: jax.Array, users: int, operators: tuple[str, ...], choice: str) -> tuple[jax.Array, jax.Array]:
    """Which operator each of the two views of each user gets, as indices into OPERATORS [users].

    fixed: the first (and the last) of `operators`; uniform: each view draws its own; different: two unlike ones.
    """
    index_O = jnp.asarray([OPERATORS.index(name) for name in operators])
    if choice == "fixed":
        return jnp.full(users, index_O[0]), jnp.full(users, index_O[-1])
    key_a, key_b = jax.random.split(key)
    a_U = jax.random.randint(key_a, (users,), 0, len(operators))
    if choice == "different":
        b_U = (a_U + jax.random.randint(key_b, (users,), 1, len(operators))) % len(operators)
    else:
        b_U = jax.random.randint(key_b, (users,), 0, len(operators))
    return index_O[a_U], index_O[b_U]


def augment_all(
    key: jax.Array, items_UxL: jax.Array, length_U: jax.Array, operator_U: jax.Array, hparams: dict, mask_item: int
) -> tuple[jax.Array, jax.Array]:
    """One view of every history, (items_UxL, length_U); `hparams` holds the ratios by operator name."""
    ratios = jnp.stack([jnp.float32(hparams[name]) for name in OPERATORS])
    keys_U = jax.random.split(key, items_UxL.shape[0])
    return jax.vmap(augment, (0, 0, 0, 0, 0, None))(
        keys_U, items_UxL, length_U, operator_U, ratios[operator_U], mask_item
    )
