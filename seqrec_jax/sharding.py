"""The devices: their mesh, which parameter lies where on it, and what the compiler is to know of them."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(data: int, model: int) -> Mesh:
    """Mesh ("data", "model") over the first data * model devices."""
    grid = np.asarray(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def compiler_options() -> dict:
    """Of the programs that do the work: XLA halves the vectors of a CPU that has 512 bits unless it is told not to."""
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def spec_of(path: tuple) -> PartitionSpec:
    """Item tables (and their optimiser moments) are split by items over "model"; all else is on every device."""
    return PartitionSpec("model") if any(getattr(part, "key", None) == "items" for part in path) else PartitionSpec()


def shardings_of(mesh: Mesh, tree):
    """A NamedSharding for every leaf of `tree`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path) if getattr(leaf, "ndim", 0) else PartitionSpec()), tree
    )


def replicate(mesh: Mesh, tree):
    """Puts every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def replicated(mesh: Mesh, tree):
    """The same inside a compiled program."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def split_rows(mesh: Mesh, batch):
    """Splits the rows of a batch (its [R, L] leaves) over "data"; the rest is whole on every device."""
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows if x.ndim == 2 else whole), batch)
