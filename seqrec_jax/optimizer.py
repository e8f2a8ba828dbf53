"""Adam or SGD with schedule, decoupled weight decay and clipping. All their numbers are traced."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


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
