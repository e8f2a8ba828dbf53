"""The train state, one step, and many steps in one dispatch."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from seqrec_jax import native
from seqrec_jax.data.batches import Layout, Plan, batch_of, epoch_key, plan_epoch
from seqrec_jax.optimizer import schedule, transform, update
from seqrec_jax.programs import Kept, compiling
from seqrec_jax.sharding import compiler_options, replicate, shardings_of, split_rows
from seqrec_jax.systems import System, hparams_of

NO_STEP = 2**31 - 1  # no step was bad


@struct.dataclass
class TrainState:
    """All that a step changes. Random streams and data order follow from the seed and `step` alone."""

    step: jax.Array  # steps done
    params: Any
    optimizer: Any
    state: Any  # neither trained nor constant, e.g. batch statistics


class Start:
    """The state that a run starts with, to be: shapes without values, and a program that computes the values."""

    def __init__(self, system: System, config: ConfigDict, mesh: Mesh):
        native.ask(mesh)

        def initial_state(seed):
            params = system.init(jax.random.fold_in(jax.random.key(seed), 1))
            return TrainState(
                jnp.int32(0), params, transform(config.train, hparams_of(config), 0.0).init(params), system.state
            )

        self.mesh, self.seed = mesh, jax.device_put(np.int32(config.seed))
        self._initial_state = jax.jit(initial_state)  # traced once for its shapes and for the values

    @functools.cached_property
    def shapes(self) -> TrainState:
        """Of jax.ShapeDtypeStruct, laid out over the mesh."""
        shapes = jax.eval_shape(self._initial_state, self.seed)
        placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(placed, shapes, shardings_of(self.mesh, shapes))

    def compiling(self, kept: Kept | None) -> Future:
        """The program seed → values."""

        def lower():
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
            fast_to_compile = {"xla_backend_optimization_level": 1}  # it runs once, and the values are the same
            function = jax.jit(self._initial_state, out_shardings=shardings, compiler_options=fast_to_compile)
            return function.lower(self.seed)

        return compiling("initial state", lower, (self.seed,), kept)


def init_state(system: System, config: ConfigDict, mesh: Mesh, kept: Kept | None = None) -> TrainState:
    """A fresh state, laid out over the mesh; parameters depend on the seed alone."""
    start = Start(system, config, mesh)
    return start.compiling(kept).result()(start.seed)


def make_train_steps(system: System, config: ConfigDict, mesh: Mesh, total_steps: int):
    """Returns train_steps(state, count, seed, layout, plan, data, hparams) → (state, sums).

    One compiled program for any `count` and `seed`: a loop with a traced bound, so that a run that was stopped and
    resumed computes every step with the same program, bit for bit. `sums`: metrics added over the steps, targets seen,
    and `bad_step`, the first step whose loss or gradient was not finite (a huge number if none).
    """
    return _train_steps(system.loss, FrozenConfigDict(config), mesh, total_steps)


@functools.lru_cache(maxsize=1)  # the folds of a run share it
def _train_steps(loss: Callable, config: FrozenConfigDict, mesh: Mesh, total_steps: int):
    @jax.jit  # traced once for its shapes and for the loop
    def one_step(state: TrainState, key, layout: Layout, plan: Plan, data, hparams):
        batch = split_rows(mesh, batch_of(data["items_A"], layout, plan, state.step % layout.steps))
        key = jax.random.fold_in(key, state.step)
        contrast = schedule(config.contrastive.schedule, state.step, total_steps, 0)
        hparams = hparams | {"contrast_weight": hparams["contrast_weight"] * contrast}
        (value, (extra, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.state, batch, key, hparams, data
        )
        factor = schedule(config.train.schedule, state.step, total_steps, config.train.warmup_steps)
        rate = hparams["learning_rate"] * factor
        params, optimizer, finite = update(config.train, hparams, rate, mesh, gradients, state.optimizer, state.params)
        counts = {
            "loss": value,
            **metrics,
            "targets": (batch.targets_RxL > 0).sum(),
            "bad_step": jnp.where(finite & jnp.isfinite(value), NO_STEP, state.step),
        }
        return TrainState(state.step + 1, params, optimizer, extra), counts

    def train_steps(state, count, seed, *arguments):
        arguments = (jax.random.fold_in(jax.random.key(seed), 2), *arguments)  # each step folds its number into it
        shapes = jax.eval_shape(one_step, state, *arguments)[1]
        sums = {name: jnp.full((), NO_STEP if name == "bad_step" else 0, s.dtype) for name, s in shapes.items()}

        def body(_, carry):
            state, sums = carry
            state, counts = one_step(state, *arguments)
            add = {name: (jnp.minimum if name == "bad_step" else jnp.add)(sums[name], counts[name]) for name in sums}
            return state, add

        return jax.lax.fori_loop(0, count, body, (state, sums))

    def placed(state, *arguments):
        state, sums = train_steps(state, *arguments)
        return jax.lax.with_sharding_constraint(state, shardings_of(mesh, state)), sums

    return jax.jit(placed, donate_argnums=0, compiler_options=compiler_options())


@dataclasses.dataclass
class Program:
    """The compiled steps of a run, with all that they read on the devices."""

    mesh: Mesh
    seed: jax.Array
    layout: Layout
    data: Any
    hparams: dict
    plans: Future  # → compiled: (layout, seed, epoch) → its plan
    steps: Future  # → compiled
    epoch: int = -1
    plan: Plan | None = None

    def wait(self) -> None:
        """Until all is compiled."""
        self.plans.result(), self.steps.result()

    def run(self, state: TrainState, step: int, until: int) -> tuple[TrainState, dict]:
        """Dispatches steps `step` to `until` of one epoch and returns at once, before they are computed."""
        if step // self.layout.steps != self.epoch:
            self.epoch = step // self.layout.steps
            self.plan = self.plans.result()(self.layout, self.seed, replicate(self.mesh, np.int32(self.epoch)))
        count = replicate(self.mesh, np.int32(until - step))
        with jax.transfer_guard("disallow"):  # nothing is copied from or to the host unnoticed
            return self.steps.result()(state, count, self.seed, self.layout, self.plan, self.data, self.hparams)


def compile_program(
    system: System, config: ConfigDict, mesh: Mesh, layout: Layout, total_steps: int, start: Start,
    kept: Kept | None = None,
) -> Program:  # fmt: skip
    """Compiles, or finds among the kept ones, the one program that takes all steps; logs how long that took."""
    hparams = {name: np.float32(value) for name, value in hparams_of(config).items()}
    inputs = (np.int32(config.seed), layout, system.data, hparams, np.int32(0))
    seed, layout, data, hparams, number = (replicate(mesh, tree) for tree in inputs)

    # Whole numbers, once an epoch: nothing is to be gained by optimizing it.
    fast_to_compile = {"xla_backend_optimization_level": 0}

    @functools.partial(jax.jit, out_shardings=number.sharding, compiler_options=fast_to_compile)
    def plan(layout, seed, epoch):
        return plan_epoch(layout, epoch_key(seed, epoch))

    def lower():
        placed = functools.partial(jax.ShapeDtypeStruct, sharding=number.sharding)
        shapes = jax.tree.map(lambda leaf: placed(leaf.shape, leaf.dtype), jax.eval_shape(plan, layout, seed, number))
        steps = make_train_steps(system, config, mesh, total_steps)
        return steps.lower(start.shapes, number, seed, layout, shapes, data, hparams)

    # The shapes of the state are left out: they follow from what kept.source names, and to know them takes a trace.
    steps = compiling("train step", lower, (seed, layout, data, hparams), kept)
    arguments = (layout, seed, number)
    plans = compiling("order of an epoch", lambda: plan.lower(*arguments), arguments, kept)
    return Program(mesh, seed, layout, data, hparams, plans, steps)
