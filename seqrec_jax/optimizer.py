"""Adam or SGD with schedule, decoupled weight decay and clipping. All their numbers are traced."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import native


def schedule(name: str, step: jax.Array, total_steps: int, warmup_steps: int) -> jax.Array:
    """Factor on a learning rate or a loss's weight: a linear warm-up, then constant, linear or cosine (1 → 0)."""
    warm = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0) if warmup_steps else 1.0
    progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress))}[name]
    return warm * falling


def transform(train: ConfigDict, hparams: dict, rate: jax.Array) -> optax.GradientTransformation:
    """Adam (AdamW where `config.train` decays weights) or SGD (its momentum is hparams["beta1"]) at the learning rate
    `rate`, on gradients clipped to hparams["clip_norm"] where it clips.
    """
    momentum = optax.trace(decay=hparams["beta1"])
    return optax.chain(
        optax.clip_by_global_norm(hparams["clip_norm"]) if train.clip_norm else optax.identity(),
        momentum if train.optimizer == "sgd" else optax.scale_by_adam(b1=hparams["beta1"], b2=hparams["beta2"]),
        optax.add_decayed_weights(hparams["weight_decay"], mask=decayed) if train.weight_decay else optax.identity(),
        optax.scale(-rate),
    )


def decayed(params) -> dict:
    """True for the kernels of linear maps; biases, norms, positions and the item table are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", params)


def update(train: ConfigDict, hparams: dict, rate: jax.Array, mesh: Mesh, gradients, state, params) -> tuple[Any, ...]:
    """(params, state of `transform`, whether all gradients are finite) after one step.

    On one CPU a kernel does plain Adam (kernels/adam.c): one pass for all arrays, where XLA makes three for each, which
    are a fifth of what it compiles for a training step.
    """
    plain = train.optimizer == "adam" and not train.clip_norm and not train.weight_decay
    plain &= all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    if plain and mesh.size == 1 and jax.default_backend() == "cpu" and (kernel := native.kernel("adam")):
        return _in_one_pass(kernel, hparams, rate, gradients, state, params)
    updates, state = transform(train, hparams, rate).update(gradients, state, params)
    finite = jnp.isfinite(sum(jnp.sum(g) for g in jax.tree.leaves(gradients)))
    return jax.tree.map(jnp.add, params, updates), state, finite


def _in_one_pass(kernel, hparams, rate, gradients, state, params):
    clip, adam, *rest = state
    count = optax.safe_increment(adam.count)
    old, structure = jax.tree.flatten((params, adam.mu, adam.nu))
    numbers = [jnp.float32(x) for x in (rate, hparams["beta1"], hparams["beta2"])] + [count]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old]
    places = {len(numbers) + place: place for place in range(len(old))}
    call = jax.ffi.ffi_call(
        kernel, (*shapes, jax.ShapeDtypeStruct((), bool)), input_output_aliases=places, vmap_method="sequential"
    )
    *new, finite = call(*numbers, *old, *jax.tree.leaves(gradients))
    params, mu, nu = jax.tree.unflatten(structure, new)
    return params, (clip, adam._replace(count=count, mu=mu, nu=nu), *rest), finite
