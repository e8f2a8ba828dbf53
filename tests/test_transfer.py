"""Transfer: which checkpoint, which parameters, which items; and what the new run says of it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqrec_jax import checkpoint, report, run, systems
from seqrec_jax.config import config_hash, load
from seqrec_jax.data.prepare import prepare
from seqrec_jax.errors import UserError
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh
from seqrec_jax.train import _begin, identity
from seqrec_jax.train_step import init_state
from seqrec_jax.transfer import held_out, transfer

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "encoder.max_length": 8, "encoder.dim": 8, "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24,
    "train.max_epochs": 2, "report.baselines": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and compiled programs, one folder for the whole session."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def make(cache, tmp_path_factory):
    """make(shift, **changes) -> (config, dataset, system): 40 users over items shift + 1 .. shift + 20."""
    folder = tmp_path_factory.mktemp("data")

    def make(shift=0, **changes):
        path = folder / f"{shift}.txt"
        rows = ((user, (str((user + step * 3) % 20 + 1 + shift) for step in range(5))) for user in range(1, 41))
        path.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in rows))
        values = TINY | {"data.path": path, "data.cache_dir": cache}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        config = load(str(ROOT / "configs" / "sasrec.py"), [(key, str(value)) for key, value in values.items()])
        dataset = prepare(config.data, cache)
        return config, dataset, systems.build(config, dataset, make_mesh(1, 1))

    return make


@pytest.fixture(scope="module")
def child(make):
    """The untrained state of a run over items 3 .. 22, so that a tenth of items 1 .. 20 is new and a tenth missing."""
    config, dataset, system = make(2)
    return init_state(system, config, make_mesh(1, 1)), dataset


@pytest.fixture(scope="module")
def parent(make, child, tmp_path_factory):
    """A pretraining over items 1 .. 20 with steps 4, 8 (the best) and 12; every parameter tells its step."""
    config, dataset, _ = make(0, seed=1)
    state, store = child[0], checkpoint.open_store(tmp_path_factory.mktemp("parent"), create=True)
    meta = identity(config, dataset) | {"best_step": 8, "steps_per_epoch": 4}
    for step in (4, 8, 12):
        params = jax.tree.map(lambda leaf, step=step: leaf + step, state.params)
        params["attributes"] = jnp.ones((3, 8))
        checkpoint.save(store, state.replace(step=np.int32(step), params=params), meta, keep={4})
    return store.directory.parent


def moved(child, make, init_from, **changes):
    """(parameters, report) of a transfer to `child`."""
    state, dataset = child
    return transfer(state.params, dataset.item_ids, make(2, init_from=init_from, **changes)[0], make_mesh(1, 1))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Which checkpoint


@pytest.mark.parametrize(
    ("name", "step"),
    [("", 8), ("@best", 8), ("@last", 12), ("@4", 4), ("@epoch1", 4), ("@epoch3", 12), ("/checkpoints/4", 4)],
)
def test_a_workdir_a_name_or_a_folder_says_which_checkpoint(parent, child, make, name, step):
    params, told = moved(child, make, f"{parent}{name}")
    assert told["step"] == step and told["from"] == f"{parent}{name}"
    np.testing.assert_array_equal(
        params["encoder"]["norm_input"]["bias"], child[0].params["encoder"]["norm_input"]["bias"] + step
    )


def test_a_folder_may_be_called_like_a_checkpoint(parent, child, make, tmp_path):
    shutil.copytree(parent, tmp_path / "run@last")
    assert moved(child, make, f"{tmp_path}/run@last")[1]["step"] == 8
    assert moved(child, make, f"{tmp_path}/run@last@epoch1")[1]["step"] == 4


def test_a_pretraining_run_hands_on_its_last_checkpoint(parent, child, make, monkeypatch):
    monkeypatch.setattr("seqrec_jax.transfer.PRETRAINING", ("sasrec",))
    assert [moved(child, make, f"{parent}{name}")[1]["step"] for name in ("", "@best")] == [12, 8]


def test_what_is_not_there_is_an_error(parent, child, make, tmp_path):
    (tmp_path / "run").mkdir()
    for init_from, said in {
        f"{tmp_path}/none": "none: no such workdir or checkpoint (config.init_from); nothing was started from scratch",
        f"{tmp_path}/none@last": "none: no such workdir",
        f"{tmp_path}/run": "no checkpoints here",
        f"{parent}@epoch2x": f"{parent}: the checkpoint 'epoch2x' is not known. Did you mean 'epoch2'?",
        f"{parent}/checkpoints/5": "no such workdir or checkpoint",
    }.items():
        with pytest.raises(UserError) as error:
            moved(child, make, init_from)
        assert said in str(error.value)


def test_a_damaged_checkpoint_is_an_error(parent, child, make, tmp_path):
    copy = Path(shutil.copytree(parent, tmp_path / "copy"))
    file = max((copy / "checkpoints" / "4").glob("params/d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="differs from its checksum"):
        moved(child, make, f"{copy}@4")


# Which parameters, which items


def test_items_are_matched_by_their_own_ids(parent, child, make):
    params, told = moved(child, make, parent)
    state, dataset = child
    store, step, meta = checkpoint.find(parent)
    old, new = (np.asarray(table) for table in (checkpoint.restore_params(store, step, make_mesh(1, 1))["items"],
                                                params["items"]))  # fmt: skip
    row_of = {item: row for row, item in enumerate(meta["items"], 1)}
    assert row_of != {item: row for row, item in enumerate(dataset.item_ids.tolist(), 1)}
    for row, item in enumerate(dataset.item_ids.tolist(), 1):
        there = old[row_of[item]] if item in row_of else np.asarray(state.params["items"])[row]
        assert new[row].tolist() == there.tolist()
    assert new[21].tolist() == old[21].tolist() and new[0].tolist() == old[0].tolist()  # mask token, padding
    assert (told["items_kept"], told["items_new"], told["items_dropped"]) == (18, 2, 2)


def test_a_mask_token_keeps_its_meaning_among_more_items(parent, make):
    """Items 1 .. 20 there; 40 here, so the mask token is in another row."""
    config, _, _ = make(0, init_from=parent)
    ids = np.array([f"new {number}" for number in range(20)] + [str(number) for number in range(1, 21)])
    fresh = {"items": jnp.zeros((64, 8))}
    params, told = transfer(fresh, ids, config, make_mesh(1, 1))
    store, step, meta = checkpoint.find(parent)
    old = np.asarray(checkpoint.restore_params(store, step, make_mesh(1, 1))["items"])
    assert params["items"][41].tolist() == old[21].tolist() and not params["items"][21 - 1].any()
    assert params["items"][40].tolist() == old[meta["items"].index("20") + 1].tolist()
    assert (told["items_kept"], told["items_new"], told["items_dropped"]) == (20, 20, 0)


def test_rows_of_the_attribute_table_are_matched_by_name(child, make, tmp_path):
    """There: red, green, blue; here blue, white, red."""
    config, dataset, _ = make(0, init_from=tmp_path)
    state, store = child[0], checkpoint.open_store(tmp_path, create=True)
    old = state.params | {"attributes": jnp.arange(24.0).reshape(3, 8)}
    meta = identity(config, dataset) | {"best_step": 0, "attributes": ["red", "green", "blue"]}
    checkpoint.save(store, state.replace(params=old), meta)
    fresh = state.params | {"attributes": jnp.full((3, 8), -1.0)}
    names = np.array(["blue", "white", "red"])
    params, _ = transfer(fresh, dataset.item_ids, config, make_mesh(1, 1), names)
    assert params["attributes"][:, 0].tolist() == [16.0, -1.0, 0.0]
    with pytest.raises(UserError, match="no attribute of this data is in that checkpoint"):
        transfer(fresh, dataset.item_ids, config, make_mesh(1, 1), np.array(["x", "y", "z"]))


def test_what_was_trained_on_the_test_items_is_refused(child, make, tmp_path):
    config, dataset, _ = make(0, init_from=tmp_path)
    store, meta = checkpoint.open_store(tmp_path, create=True), identity(config, dataset) | {"best_step": 0}
    meta["config"]["data"]["hold_out"] = False
    checkpoint.save(store, child[0], meta)
    with pytest.raises(UserError, match="trained with data.hold_out=False.*--config.data.hold_out=true"):
        transfer(child[0].params, dataset.item_ids, config, make_mesh(1, 1))
    with config.unlocked():
        config.system, config.task = "downstream", "profile"  # labels are no items
    _, parent = transfer(child[0].params, dataset.item_ids, config, make_mesh(1, 1))
    assert parent["held_out"] is False


@pytest.mark.parametrize(
    ("own", "parent", "kept"),
    [
        ({}, {}, True),
        ({"task": "profile"}, {}, False),  # it reads whole histories
        ({"task": "profile", "freeze_encoder": True}, {}, True),
        ({}, {"held_out": False}, False),  # what a grandparent has seen stays in the parameters
        ({"task": "cold_start", "freeze_encoder": True}, {"held_out": False}, False),
    ],
)
def test_what_a_run_has_read_is_known_to_those_that_begin_from_it(own, parent, kept):
    config = {"data": {"hold_out": True}, "task": "next_item", "freeze_encoder": False} | own
    assert held_out({"config": config, "parent": parent}) is kept


def test_groups_of_one_side_alone_are_left_out_or_fresh_and_told(parent, child, make, caplog):
    (state, dataset), config = child, make(2, init_from=parent)[0]
    head = {"kernel": jnp.full((8, 3), 7.0)}
    with caplog.at_level("INFO"):
        params, told = transfer(state.params | {"head": head}, dataset.item_ids, config, make_mesh(1, 1))
    assert params.keys() == {"items", "encoder", "head"} and bits(params["head"]) == bits(head)
    assert (told["left_out"], told["fresh"]) == (["attributes"], ["head"])
    said = f"parameters from {parent}, step 8: items 18 kept, 2 new, 2 dropped; left out: attributes; fresh: head"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder__dim": 16}, ["items (any, 16) (any, 8)", "encoder/positions (8, 16) (8, 8)"]),
        ({"encoder__layers": 2}, ["encoder/block_1/query/kernel (8, 8) missing"]),
        ({"encoder__max_length": 20}, ["encoder/positions (20, 8) (8, 8)"]),
        ({"encoder__input_norm": False}, ["encoder/norm_input/scale missing (8)"]),
        ({"encoder__kind": "gru"}, ["encoder/layer_0/in/bias (8) missing", "encoder/positions missing (8, 8)"]),
    ],
    ids=["dim", "more layers", "length", "fewer parameters", "kind"],
)
def test_parameters_that_do_not_fit_are_listed_with_both_shapes(parent, make, changes, said):
    config, dataset, system = make(2, init_from=parent, **changes)
    params = jax.eval_shape(system.init, jax.random.key(0))
    with pytest.raises(UserError, match="parameters do not fit") as error:
        transfer(params, dataset.item_ids, config, make_mesh(1, 1))
    lines = [" ".join(line.split()) for line in str(error.value).splitlines()]
    assert lines[1] == "parameter here there" and set(said) <= set(lines)


@pytest.mark.parametrize(
    ("key", "there", "here"),
    [("heads", 2, 1), ("activation", "gelu", "relu"), ("norm", "post", "pre"), ("filter", 0.0, 0.5)],
)
def test_another_architecture_of_equal_shapes_is_refused(parent, child, make, key, there, here):
    moved(child, make, parent, encoder__hidden_dropout=0.1)  # not of the architecture
    with pytest.raises(UserError, match=f"encoder.{key}={there}.*set --config.encoder.{key}={there}, not {here}"):
        moved(child, make, parent, **{f"encoder__{key}": here})


def test_no_common_item_is_an_error(parent, child, make):
    config, dataset, _ = make(100, init_from=parent)
    with pytest.raises(UserError, match="no item of this data set is in that checkpoint"):
        transfer(child[0].params, dataset.item_ids, config, make_mesh(1, 1))


# The new run


def test_a_run_starts_at_step_0_with_a_fresh_optimiser_and_its_parents_name(parent, child, make, tmp_path):
    config, dataset, system = make(2, init_from=parent)
    store = checkpoint.open_store(tmp_path, create=True)
    mesh = make_mesh(1, 1)
    begun, progress, told = _begin(config, dataset, init_state(system, config, mesh), store, mesh)
    assert int(begun.step) == 0 and bits(begun.optimizer) == bits(child[0].optimizer)
    assert bits(begun.params) != bits(child[0].params) and progress.best_value is None
    old_config, old_dataset, _ = make(0, seed=1)
    assert (told["config_hash"], told["data_hash"]) == (config_hash(old_config), old_dataset.hash)
    assert len(told["manifest"]) == 64 and old_dataset.hash != dataset.hash


@pytest.fixture(scope="module")
def train_in(make):
    """train_in(workdir, init_from) -> exit code of a whole run over items 3 .. 22."""
    config = make(2)[0]
    values = TINY | {"data.path": config.data.path, "data.cache_dir": config.data.cache_dir}
    flags = [f"--config={ROOT / 'configs' / 'sasrec.py'}", *(f"--config.{key}={v}" for key, v in values.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots", lambda *_: None)
        yield lambda workdir, init_from="": main([*flags, f"--workdir={workdir}", f"--config.init_from={init_from}"])


def test_finetuning_on_a_catalogue_that_changed(parent, train_in, tmp_path, caplog):
    """A tenth of the items is new and a tenth is gone. Once begun, the run needs its parent no more."""
    copy = shutil.copytree(parent, tmp_path / "parent")
    with caplog.at_level("INFO"):
        assert train_in(tmp_path / "run", f"{copy}@epoch1") == 0
    shutil.rmtree(copy)
    assert train_in(tmp_path / "run", f"{copy}@epoch1") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    told = results["parent"]
    assert (told["step"], told["items_kept"], told["items_new"], told["items_dropped"]) == (4, 18, 2, 2)
    assert "step 4: items 18 kept, 2 new, 2 dropped; left out: attributes" in caplog.text
    assert results["steps"] == 4 and results["test"]["hr@20"] == 1  # 20 items


def test_a_missing_parent_is_told_before_the_data_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("the data were read"))
    assert main([f"--config={ROOT / 'configs' / 's3rec_finetune.py'}", f"--workdir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "the workdir of a pretraining run: no such workdir" in said and "--config.init_from=RUN" in said
    assert not (tmp_path / "run" / "config.json").exists()  # so that the same workdir takes the right one


@pytest.mark.slow
def test_runs_with_and_without_a_parent_are_on_one_page(parent, train_in, tmp_path):
    tuned, scratch = tmp_path / "tuned", tmp_path / "scratch"
    assert train_in(tuned, parent) == train_in(scratch) == 0
    assert json.loads((scratch / "results.json").read_text())["parent"] == {}
    first = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (tuned, scratch)]
    assert first[0]["loss"] != first[1]["loss"]
    assert main(["--mode=report", f"--workdirs={tuned},{scratch}", f"--out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert str(tuned) in page and str(scratch) in page and "next-item loss and validation ndcg@10" in page
