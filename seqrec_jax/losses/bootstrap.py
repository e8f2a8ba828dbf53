"""Learning without negatives (CLUE, Section IV-A; SimSiam): projector, predictor, negative cosine, stop-gradient.

Arrays [V, U, D] hold U users in V views. Batch statistics are those of each view over the real users of the global
batch, on any number of devices; their running means are kept for those who project users one by one.
"""

import jax
import jax.numpy as jnp

from seqrec_jax.losses.contrastive import unit

EPSILON = 1e-5  # of batch normalisation
MOMENTUM = 0.9  # of the running statistics


def init_heads(key: jax.Array, dim: int, width: int, bottleneck: int) -> dict:
    """{"projector": 3 normalised layers, `dim` to `width`; "predictor": a normalised one to `bottleneck`, a linear one
    back}. The paper normalises each layer of the projector and gives no widths.
    """
    keys = jax.random.split(key, 5)
    kernel = jax.nn.initializers.lecun_normal()

    def normalised(key, inputs, outputs):
        return {"kernel": kernel(key, (inputs, outputs)), "scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)}

    return {
        "projector": {f"layer_{layer}": normalised(keys[layer], width if layer else dim, width) for layer in range(3)},
        "predictor": {
            "layer_0": normalised(keys[3], width, bottleneck),
            "output": {"kernel": kernel(keys[4], (bottleneck, width)), "bias": jnp.zeros(width)},
        },
    }


def init_statistics(width: int, bottleneck: int) -> dict:
    """Running statistics of every normalised layer, before the first step."""
    layer = lambda width: {"mean": jnp.zeros(width), "variance": jnp.ones(width)}  # noqa: E731
    return {
        "projector": {f"layer_{layer_}": layer(width) for layer_ in range(3)},
        "predictor": {"layer_0": layer(bottleneck)},
    }


def project(users_VxUxD, valid_U, params: dict, statistics: dict) -> tuple[jax.Array, dict]:
    """z = f(x): three normalised layers, ReLU after the first two. Returns (z [V, U, D], the new statistics)."""
    x, new = users_VxUxD, {}
    for name in sorted(params):
        x = jax.nn.relu(x) if new else x
        x, new[name] = batch_norm(x @ params[name]["kernel"], valid_U, params[name], statistics[name])
    return x, new


def predict(z_VxUxD, valid_U, params: dict, statistics: dict) -> tuple[jax.Array, dict]:
    """p = h(z): a normalised layer with ReLU, then a linear one. Returns (p [V, U, D], the new statistics)."""
    first, output = params["layer_0"], params["output"]
    x, new = batch_norm(z_VxUxD @ first["kernel"], valid_U, first, statistics["layer_0"])
    return jax.nn.relu(x) @ output["kernel"] + output["bias"], {"layer_0": new}


def batch_norm(x_VxUxD, valid_U, params: dict, running: dict) -> tuple[jax.Array, dict]:
    """Each view's columns with mean 0 and variance 1 over the valid users, scaled and shifted; the new statistics."""
    weight_Ux1 = (valid_U / jnp.maximum(valid_U.sum(), 1))[:, None]
    mean_Vx1xD = (weight_Ux1 * x_VxUxD).sum(axis=1, keepdims=True)
    variance_Vx1xD = (weight_Ux1 * (x_VxUxD - mean_Vx1xD) ** 2).sum(axis=1, keepdims=True)
    y_VxUxD = (x_VxUxD - mean_Vx1xD) * jax.lax.rsqrt(variance_Vx1xD + EPSILON) * params["scale"] + params["bias"]
    seen = {"mean": mean_Vx1xD.mean(axis=(0, 1)), "variance": variance_Vx1xD.mean(axis=(0, 1))}
    return y_VxUxD, {name: MOMENTUM * running[name] + (1 - MOMENTUM) * seen[name] for name in seen}


def symmetrised_loss(p_2xUxD, z_2xUxD, valid_U, *, stop_gradient: bool = True) -> jax.Array:
    """Eq. 7: the mean over users of D(p1, sg(z2)) / 2 + D(p2, sg(z1)) / 2, D the negative cosine (Eq. 4); −1 to 1.

    Without `stop_gradient`: Eq. 5, which collapses.
    """
    target_2xUxD = jax.lax.stop_gradient(z_2xUxD) if stop_gradient else z_2xUxD
    cosine_U = (unit(p_2xUxD) * unit(target_2xUxD[::-1])).sum(axis=-1).mean(axis=0)
    return -jnp.where(valid_U, cosine_U, 0).sum() / jnp.maximum(valid_U.sum(), 1)


def spread(z_2xUxD, valid_U) -> jax.Array:
    """The standard deviation of the normalised projections, mean over dimensions: 1/sqrt(D) at best, 0 collapsed."""
    weight_Ux1 = (valid_U / jnp.maximum(valid_U.sum(), 1))[:, None]
    z_2xUxD = unit(z_2xUxD)
    mean_2x1xD = (weight_Ux1 * z_2xUxD).sum(axis=1, keepdims=True)
    return jnp.sqrt((weight_Ux1 * (z_2xUxD - mean_2x1xD) ** 2).sum(axis=1)).mean()
