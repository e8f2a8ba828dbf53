"""The project's own work, each ready to be timed: a function that runs a unit of it and returns its seconds."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from benchmarks.machine import timed
from seqrec_jax import encoders, systems
from seqrec_jax.data.batches import batch_of, epoch_key, plan_epoch
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.encoders import transformer
from seqrec_jax.evaluate import make_evaluator
from seqrec_jax.losses.next_item import full_softmax
from seqrec_jax.run import train_layout
from seqrec_jax.sharding import compiler_options, make_mesh, replicate
from seqrec_jax.systems import cl4srec, hparams_of
from seqrec_jax.train_step import init_state, make_train_steps

REPEATS = 8  # of short work, in one measurement


class Training(NamedTuple):
    """A compiled training step and what it needs in memory besides its arguments."""

    seconds: Callable[[], float]  # of one step
    temp_bytes: int


def _compiled(function: Callable) -> Callable:
    """As a run compiles what it trains."""
    return jax.jit(function, compiler_options=compiler_options())


def training(config: ConfigDict, dataset: SequenceDataset, steps: int) -> Training:
    """Steps as a run takes them, batches gathered on the device, `steps` a dispatch; without the epoch's plan."""
    mesh, hparams = make_mesh(1, 1), hparams_of(config)
    system = systems.build(config, dataset, mesh)
    layout, data = replicate(mesh, (train_layout(config, dataset, mesh), system.data))
    state = init_state(system, config, mesh)
    arguments = (jnp.int32(steps), jnp.int32(0), layout, jax.jit(plan_epoch)(layout, epoch_key(0, 0)), data, hparams)
    compiled = make_train_steps(system, config, mesh, layout.steps).lower(state, *arguments).compile()

    def seconds() -> float:
        nonlocal state
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, *arguments))
        return (time.perf_counter() - began) / steps

    return Training(seconds, compiled.memory_analysis().temp_size_in_bytes)


def evaluation(config: ConfigDict, dataset: SequenceDataset) -> Callable[[], float]:
    """Metrics of all users' test items under protocol D."""
    mesh = make_mesh(1, 1)
    system, evaluate = systems.build(config, dataset, mesh), make_evaluator(dataset, config, "test", mesh)
    params = replicate(mesh, jax.jit(system.init)(jax.random.key(0)))
    return lambda: timed(lambda: evaluate(system, params), 1)


def loss(targets_N: np.ndarray, dim: int, num_items: int, repeats: int = REPEATS) -> Callable[[], float]:
    """The exact softmax and its gradients for random states of these targets (all real), and a random table."""
    mesh = make_mesh(1, 1)
    key_hidden, key_items = jax.random.split(jax.random.key(0))
    hidden_NxD = jax.random.normal(key_hidden, (len(targets_N), dim))
    items_VxD = 0.02 * jax.random.normal(key_items, (transformer.table_rows(num_items), dim))
    gradients = _compiled(jax.value_and_grad(lambda h, e: full_softmax(h, targets_N, e, num_items, mesh), (0, 1)))
    return lambda: timed(lambda: gradients(hidden_NxD, items_VxD), repeats)


def user_views(config: ConfigDict, dataset: SequenceDataset) -> tuple[Callable[[], float], Callable[[], float]]:
    """(CLUE's loss of a batch, two views, projector and predictor included; one causal pass of it), with gradients."""
    mesh, hparams, encoder = make_mesh(1, 1), hparams_of(config), FrozenConfigDict(config.encoder)
    system, layout = systems.build(config, dataset, mesh), train_layout(config, dataset, mesh)
    params, data = jax.jit(system.init)(jax.random.key(0)), replicate(mesh, system.data)
    batch = jax.jit(batch_of)(data["items_A"], layout, jax.jit(plan_epoch)(layout, None), 0)

    def two_views(params, key):
        return system.loss(params, system.state, batch, key, hparams, data)[0]

    def causal_pass(params, key):
        return (encoders.encode(params, batch, encoder, key, hparams, causal=True) ** 2).mean()

    key, reads = jax.random.key(0), {name: params[name] for name in ("items", "encoder")}
    views, once = _compiled(jax.value_and_grad(two_views)), _compiled(jax.value_and_grad(causal_pass))
    return lambda: timed(lambda: views(params, key), REPEATS), lambda: timed(lambda: once(reads, key), REPEATS)


def two_views(config: ConfigDict, dataset: SequenceDataset) -> Callable[[], float]:
    """The two augmented views of a batch, as CL4SRec draws them, placed in the batch's rows."""
    layout = train_layout(config, dataset, make_mesh(1, 1))
    items_A, hparams, mask_item = jnp.asarray(dataset.items_A), hparams_of(config), len(dataset.item_ids) + 1
    batch = jax.jit(batch_of)(items_A, layout, jax.jit(plan_epoch)(layout, None), 0)

    @_compiled
    def views(key, batch):
        return cl4srec.two_views(key, batch, items_A, config, hparams, mask_item)

    key = jax.random.key(0)
    return lambda: timed(lambda: views(key, batch), 32 * REPEATS)  # a millisecond each
