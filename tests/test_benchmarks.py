"""The benchmarks: the peers compute what ours computes, useful work is counted right, no ratio from a busy machine."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import data, flops, report
from configs import base
from seqrec_jax import native, systems
from seqrec_jax.data.batches import Batch, batch_of, epoch_key, make_layout, plan_epoch, train_examples
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare
from seqrec_jax.encoders import transformer
from seqrec_jax.evaluate import make_evaluator
from seqrec_jax.losses.next_item import full_softmax
from seqrec_jax.sharding import make_mesh
from seqrec_jax.systems import hparams_of

USERS, ITEMS, WIDTH = 60, 90, 12


def small_config():
    config = base.get_config()
    config.encoder.update(dim=8, heads=2, ffn=12, max_length=WIDTH, embedding_dropout=0.0, hidden_dropout=0.0)
    return config


# The peers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """(config, data, our system, our parameters, a torch model with the same)."""
    pytest.importorskip("torch")
    config, dataset = small_config(), data.made_up(USERS, ITEMS)
    from benchmarks import peers

    system = systems.build(config, dataset, make_mesh(1, 1))
    params = large_params(system)
    copy = peers.Sasrec(config.encoder.to_dict(), ITEMS)
    copy.load_state_dict(weights_of(params, ITEMS))
    return config, dataset, system, params, copy


def large_params(system):
    """Parameters of which none is near zero, biases included."""
    generator = np.random.default_rng(0)
    params = jax.jit(system.init)(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * generator.normal(size=x.shape).astype(np.float32), params)


def weights_of(params, items):
    """The state of a torch encoder with our parameters and the first `items` rows after the padding."""
    import torch

    weights = {"items.weight": params["items"][1 : items + 1], "positions.weight": params["encoder"]["positions"]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["encoder"]):
        *parts, kind = (part.key for part in path)
        if parts:
            name = ".".join(parts).replace("block_", "blocks.")
            weights[f"{name}.{'bias' if kind == 'bias' else 'weight'}"] = leaf.T
    return {name: torch.tensor(np.asarray(leaf)) for name, leaf in weights.items()}


def all_users(dataset, packed):
    """One batch of all users' training examples, for us and for the peer."""
    layout = make_layout(train_examples(dataset, "all", WIDTH), USERS, WIDTH, packed=packed)
    assert layout.steps == 1
    batch = batch_of(jnp.asarray(dataset.items_A), layout, plan_epoch(layout, epoch_key(0, 0)), 0)
    return batch, data.ready_batches(dataset, layout, 1)[0]


@pytest.mark.parametrize("packed, everywhere", [(False, False), (True, False), (False, True)])
def test_the_peers_have_our_loss_and_gradient(model, packed, everywhere):
    from benchmarks import peers

    config, dataset, system, params, copy = model
    batch, _ = all_users(dataset, packed=True)
    loss = jax.jit(lambda p: system.loss(p, {}, batch, jax.random.key(0), hparams_of(config), system.data)[0])
    value, gradient = jax.value_and_grad(loss)(params)

    copy.zero_grad()
    found = peers.next_item_loss(copy, peers.tensors(all_users(dataset, packed)[1]), everywhere)
    found.backward()
    assert abs(found.item() - float(value)) < 1e-4
    np.testing.assert_allclose(copy.items.weight.grad.numpy(), gradient["items"][1 : ITEMS + 1], atol=1e-5)


@pytest.mark.parametrize("negatives", [0, 40])
def test_the_compiled_peers_loss_has_fixed_shapes_and_the_same_value(model, negatives):
    """Cells that fill up the batch count for nothing; sampled: an oracle with the negatives that torch's seed draws."""
    import torch

    from benchmarks import peers

    *_, copy = model
    batch = all_users(model[1], packed=True)[1]
    place_M = np.flatnonzero(batch["targets"])
    filled = batch | {"place": np.pad(place_M, (0, 7)), "target": np.pad(batch["targets"].ravel()[place_M], (0, 7))}
    torch.manual_seed(5)
    found = peers.softmax_at(copy, peers.tensors(filled), negatives).item()
    plain = peers.tensors(batch)
    if not negatives:
        assert found == pytest.approx(peers.next_item_loss(copy, plain).item(), rel=1e-6)
        return
    torch.manual_seed(5)
    drawn = torch.randint(ITEMS, (negatives,)).numpy()
    table = copy.items.weight.detach().double().numpy()
    states_MxD = copy(plain).flatten(0, 1).detach().double().numpy()[place_M]
    losses = []
    for state, target in zip(states_MxD, batch["targets"].ravel()[place_M] - 1, strict=True):
        scores = [state @ table[target], *(state @ table[item] for item in drawn if item != target)]
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_peer_has_duorecs_loss_and_gradient(model):
    """Users 2k and 2k + 1 train on the same items in opposite orders, so that a target has exactly one partner."""
    from benchmarks import peers

    *_, copy = model
    config = small_config()
    config.system, config.train.targets, config.train.batch_size = "duorec", "prefix", 1000
    config.contrastive.update(similarity="dot", same_target_negatives="kept", weight=0.1, pairs=1000)
    items_UxL = np.arange(1, ITEMS + 1, dtype=np.int32).reshape(9, 10)
    ends = [items_UxL[:, :1], items_UxL[:, 7:]]
    histories_UxL = np.concatenate([items_UxL, np.concatenate([ends[0], items_UxL[:, 6:0:-1], ends[1]], axis=1)])
    names = [np.arange(count).astype(str) for count in (ITEMS, len(histories_UxL))]
    dataset = SequenceDataset(histories_UxL.reshape(-1), np.arange(0, 181, 10), *names, "", {})
    system = systems.build(config, dataset, make_mesh(1, 1))
    params = large_params(system)
    layout = make_layout(train_examples(dataset, "prefix", WIDTH), 1000, WIDTH, packed=False, last_target_only=True)
    batch = batch_of(jnp.asarray(dataset.items_A), layout, plan_epoch(layout, epoch_key(0, 0)), 0)

    on_device = jax.tree.map(jnp.asarray, system.data)

    def loss(p):
        value, (_, metrics) = system.loss(p, {}, batch, jax.random.key(0), hparams_of(config), on_device)
        return value, metrics["pairs"]

    (value, pairs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert pairs == len(layout.class_E)
    copy.load_state_dict(weights_of(params, ITEMS))
    copy.zero_grad()
    ready = data.ready_batches(dataset, layout, 1) + data.same_target_batches(dataset, layout, 1)
    prefixes, same_target = map(peers.tensors, ready)
    assert (prefixes["targets"].max(1).values == same_target["targets"].max(1).values).all()
    found = peers.duorec_loss(copy, prefixes, same_target)
    found.backward()
    assert found.item() == pytest.approx(float(value), abs=1e-4)
    np.testing.assert_allclose(copy.items.weight.grad.numpy(), gradient["items"][1 : ITEMS + 1], atol=1e-5)


def test_the_peer_has_s3recs_loss_and_gradient():
    torch = pytest.importorskip("torch")
    from benchmarks import peers

    config, dataset = small_config(), data.with_attributes(data.made_up(USERS, ITEMS), count=20)
    config.system, config.s3rec.cut = "s3rec", False  # as published: prefixes, whole
    system = systems.build(config, dataset, make_mesh(1, 1))
    params = large_params(system)
    layout = make_layout(train_examples(dataset, "prefix", WIDTH, whole=True), 40, WIDTH, packed=False)
    batch = batch_of(jnp.asarray(dataset.items_A), layout, plan_epoch(layout, epoch_key(0, 0)), 0)
    on_device = jax.tree.map(jnp.asarray, system.data)
    loss = lambda p: system.loss(p, {}, batch, jax.random.key(0), hparams_of(config), on_device)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)

    copy = peers.S3rec(config.encoder.to_dict(), data.multi_hot(dataset))
    copy.encoder.load_state_dict(weights_of(params, ITEMS + 1))
    copy.attributes.weight.data = torch.tensor(np.asarray(params["attributes"]))
    for name, linear in copy.maps.items():
        linear.weight.data, linear.bias.data = (torch.tensor(np.asarray(params["maps"][name][part]).T)
                                                for part in ("kernel", "bias"))  # fmt: skip
    (ready,) = data.cloze_batches(dataset, layout, 1, config)
    found = peers.s3rec_loss(copy, peers.tensors(ready))
    found.backward()
    assert found.item() == pytest.approx(float(value), rel=1e-5)
    for ours, theirs in (
        (gradient["items"][1 : ITEMS + 2], copy.encoder.items),
        (gradient["attributes"], copy.attributes),
    ):
        np.testing.assert_allclose(theirs.weight.grad.numpy(), ours, rtol=1e-3, atol=1e-3)


def test_the_peer_evaluates_as_we_do(model):
    from benchmarks import peers

    config, dataset, system, params, copy = model
    batches = [peers.tensors(batch) for batch in data.evaluation_batches(dataset, 25, WIDTH)]
    hr, ndcg = peers.evaluate(copy, batches)
    wanted = make_evaluator(dataset, config, "test", make_mesh(1, 1))(system, params)
    assert (hr, ndcg) == pytest.approx((wanted["hr@10"], wanted["ndcg@10"]), abs=1e-6)
    assert hr > 0


# Useful work ----------------------------------------------------------------------------------------------------------


def flops_of(function, *arguments):
    """What XLA counts in one pass through every loop body, before it replaces products by calls it cannot see into."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_loss_flops_are_those_of_one_loop_body(monkeypatch):
    rows, dim, items = 64, 64, 1022  # one chunk of rows; with padding and mask the table has 1,024
    generator = np.random.default_rng(0)
    hidden, table = (jnp.asarray(generator.normal(size=(n, dim)), jnp.float32) for n in (rows, items + 2))
    loss = lambda h, e: full_softmax(h, jnp.ones(rows, jnp.int32), e, items, make_mesh(1, 1))  # noqa: E731
    expected, three_products = flops.loss_flops(rows, dim, items + 2), jax.value_and_grad(loss, (0, 1))
    monkeypatch.setattr(native, "kernels", dict)  # XLA cannot count what a kernel does
    with monkeypatch.context() as patch:  # without the branch, seldom taken, that seeks the maximum of the logits
        patch.setattr(jax.lax, "cond", lambda _, shift, maximum: shift())
        assert flops_of(three_products, hidden, table) == pytest.approx(expected, rel=0.1)
    with_branch = flops_of(jax.value_and_grad(lambda h, e: loss(h, e), (0, 1)), hidden, table)
    assert with_branch == pytest.approx(4 / 3 * expected, rel=0.1)


def test_encoder_flops_are_those_of_the_forward_pass(monkeypatch):
    monkeypatch.setattr(native, "kernels", dict)  # XLA counts what it does itself
    rows, width = 4, 50
    config = base.get_config()
    config.encoder.update(dim=128, ffn=512, max_length=width)
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config.encoder, 100))
    cells, slots = jnp.ones((rows, width), jnp.int32), jnp.zeros(rows, jnp.int32)
    batch = Batch(cells, cells, cells, cells, slots, slots, slots, slots, slots)
    counted = flops_of(lambda p: transformer.encode(p, batch, config.encoder, None, hparams_of(config)), params)
    pairs = rows * width**2  # a whole row, hidden pairs too, is what a product over it costs
    assert counted == pytest.approx(flops.encoder_flops(rows * width, pairs, config.encoder), rel=0.1)


def test_visible_pairs_by_counting():
    lengths = [1, 4, 7]
    assert flops.visible_pairs(np.array(lengths)) == sum(k <= q for n in lengths for q in range(n) for k in range(n))


# Data -----------------------------------------------------------------------------------------------------------------


def test_made_up_data_have_the_shape_of_beauty(tmp_path):
    dataset = data.made_up(22_363, 12_101)
    lengths = np.diff(dataset.offsets_U1)
    assert lengths.mean() == pytest.approx(8.88, rel=0.02) and lengths.min() == 5
    assert np.percentile(lengths, [50, 90, 99]) == pytest.approx([6, 14, 43], abs=2.5)
    assert (lengths - 3).mean() == pytest.approx(131_413 / 22_363, rel=0.02)  # training targets a user
    data.write_lines(dataset, tmp_path / "made_up.txt")
    config = base.get_config()
    config.data.path = str(tmp_path / "made_up.txt")
    read = prepare(config.data, tmp_path)
    assert (len(read.user_ids), len(read.item_ids)) == (22_363, 12_101)
    assert (read.offsets_U1 == dataset.offsets_U1).all()


# The report -----------------------------------------------------------------------------------------------------------

KEYS = {*report.RATIOS, *(reference for reference, _ in report.RATIOS.values()), "gemm.ours_ms", "evaluate.ours_ms"}
FACTS = {"targets": 1500, "users": 20_000, "step_flops": 8e9, "loss_flops": 7e9, "step_temp_mib": 48.0}
MACHINE = {"processor": "a", "usable_cores": 2, "jax": "0", "torch": "0", "data": "b"}


def figures(**changes):
    """Three rounds of every figure: 0.1 s of ours, 0.4 s of torch."""
    return {key: [0.1, 0.11, 0.1] if "ours" in key else [0.4, 0.44, 0.4] for key in KEYS} | changes


def test_a_quiet_machine_gives_ratios():
    result = report.summary(figures(**{"gemm.ours_ms": [0.11, 0.08, 0.1]}), FACTS, [0.02, 0.14], MACHINE)
    step = result["train_step"]
    assert not result["busy"] and step["torch_real_ratio"] == pytest.approx(4)
    assert (step["ours_ms"], step["minima"]["torch_all_ms"]) == pytest.approx((100, 400))
    assert step["gemm_gflops"] == pytest.approx(2 * 2048**3 / 0.1e9)
    assert step["useful_gflops"] == pytest.approx(80)
    assert step["useful_share"] == pytest.approx(80 / (2 * 2048**3 / 0.1e9))
    assert result["evaluate"]["ours_users_per_s"] == pytest.approx(200_000)
    assert result["duorec"]["torch_targets_per_s"] == pytest.approx(2.5) and result["s3rec"]["sequence_ratio"] == 4
    assert "4 x train_step ours" in report.table(result) and json.dumps(result)


@pytest.mark.parametrize(
    "seconds, others, reason",
    [
        (figures(), [0.0, 0.2], "others used 20% of the cores"),
        (figures(**{"loss.torch_ms": [0.1, 0.14, 0.15]}), [0.0], "loss.torch_ms: the median is 1.40 times the minimum"),
    ],
)
def test_a_busy_machine_gives_none(seconds, others, reason):
    result = report.summary(seconds, FACTS, others, MACHINE)
    names = {name for part in result.values() if isinstance(part, dict) for name in part}
    assert result["busy"] and not any(word in name for name in names - {"others_share"} for word in ("ratio", "share"))
    text = report.table(result)
    assert f"machine busy: no ratios ({reason})" in text and " x " not in text


# Everything, tiny -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smoke_run_writes_every_section(tmp_path):
    pytest.importorskip("torch")
    from benchmarks.run import main

    assert main(["--smoke", f"--out={tmp_path / 'bench.json'}"]) == 0
    sections = set(json.loads((tmp_path / "bench.json").read_text()))
    assert sections >= {"machine", "train_step", "loss", "contrastive_step", "augmentation", "evaluate", "startup",
                        "memory", "prefix", "duorec", "s3rec", "clue"}  # fmt: skip


@pytest.mark.slow
def test_the_accelerator_smoke_run_writes_a_row_a_case(tmp_path):
    pytest.importorskip("torch")
    from benchmarks.accelerator import SMOKE, main

    assert main(["--smoke", f"--out={tmp_path / 'accelerator.json'}"]) == 0
    rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
    assert len(rows) == len(SMOKE)
    assert all(row["ours_ms"] > 0 and row["torch_ms"] > 0 and row["targets_per_s"] > 0 for row in rows)


@pytest.mark.slow
def test_the_scaling_smoke_run_writes_table_and_plot(tmp_path):
    from benchmarks.scaling import main

    assert main(["--smoke", f"--folder={tmp_path}"]) == 0
    assert len(json.loads((tmp_path / "scaling.json").read_text())["softmax"]) == 2
    assert (tmp_path / "scaling.png").stat().st_size > 1000
