"""Adam in both its forms, the kernel's and XLA's, is the published one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from seqrec_jax.optimizer import transform, update
from seqrec_jax.sharding import make_mesh

MESH = make_mesh(1, 1)
PLAIN = FrozenConfigDict({"optimizer": "adam", "weight_decay": 0.0, "clip_norm": 0.0})
HPARAMS = {"beta1": 0.9, "beta2": 0.98}
pytestmark = pytest.mark.usefixtures("form")
SHAPES = {"one": (), "few": (7,), "none": (0, 3), "many": (513, 129), "rows": (31, 64)}  # more and less than a task


def drawn(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


def step(params, state, gradients, rate):
    return update(PLAIN, HPARAMS, rate, MESH, gradients, state, params)


def begun(params):
    return transform(PLAIN, HPARAMS, 0.0).init(params)


def test_some_steps_are_those_of_the_paper():
    params, rates = drawn(0), [0.1, 0.01, 0.3]
    expected, first, second = ({k: np.float64(v) * factor for k, v in params.items()} for factor in (1, 0, 0))
    state = begun(params)
    for number, rate in enumerate(rates):
        gradients = drawn(1 + number)
        params, state, finite = jax.jit(step)(params, state, gradients, rate)
        assert finite
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * np.float64(gradient)
            second[name] = 0.98 * second[name] + 0.02 * np.float64(gradient) ** 2
            unbiased = [first[name] / (1 - 0.9 ** (number + 1)), second[name] / (1 - 0.98 ** (number + 1))]
            expected[name] = expected[name] - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    assert state[1].count == len(rates)
    for found, wanted in ((params, expected), (state[1].mu, first), (state[1].nu, second)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [("one", ()), ("many", (512, 128)), ("rows", (0, 0))])
def test_a_gradient_that_is_not_finite_is_told(value, place):
    params, gradients = drawn(0), drawn(1)
    gradients[place[0]][place[1]] = value
    assert not jax.jit(step)(params, begun(params), gradients, 0.1)[2]
    gradients = jax.tree.map(lambda g: np.float32(1e30) * np.sign(g), gradients | {place[0]: drawn(1)[place[0]]})
    assert jax.jit(step)(params, begun(params), gradients, 0.1)[2]


def test_runs_side_by_side_are_as_alone():
    many = [drawn(seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    rates = jnp.float32([0.1, 0.2])
    found = jax.jit(jax.vmap(step))(stacked, jax.vmap(begun)(stacked), stacked, rates)
    for number, params in enumerate(many):
        alone = jax.jit(step)(params, begun(params), params, rates[number])
        mine = jax.tree.map(lambda leaf: leaf[number], found)  # noqa: B023
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), mine, alone)


def test_the_kernel_works_in_place(form):
    if form == "XLA":
        pytest.skip("of the kernel")
    params = {"many": np.ones((4096, 64), np.float32)}
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, begun(params), params, 0.1).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["many"].nbytes / 4
