"""Checkpoints: damage is found, named and set aside; what is kept and how it is named; what travels inside."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from seqrec_jax import checkpoint, report, systems
from seqrec_jax.config import load
from seqrec_jax.data.prepare import prepare
from seqrec_jax.errors import UserError
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh
from seqrec_jax.train_step import init_state

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.max_epochs": 3, "report.baselines": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and compiled programs, one folder for the whole session."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A workdir with the checkpoints of steps 5 to 15 that are kept; the metric rises, so the newest is the best."""
    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots", lambda *_: None)
        assert main(flags(cache, workdir)) == 0
    return workdir


@pytest.fixture
def workdir(trained, tmp_path, monkeypatch):
    """A copy to be damaged."""
    monkeypatch.setattr(report, "plots", lambda *_: None)
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def fresh(cache):
    """make(**changes) -> (an untrained state, its data set)"""

    @functools.cache
    def make(**changes):
        config, mesh = config_of(cache, **changes), make_mesh(1, 1)
        dataset = prepare(config.data, cache)
        system = systems.build(config, dataset, mesh)
        return init_state(system, config, mesh), dataset

    return make


def settings(cache, changes):
    return TINY | {"data.cache_dir": cache} | {key.replace("__", "."): value for key, value in changes.items()}


def flags(cache, workdir, **changes):
    overrides = [f"--config.{key}={value}" for key, value in settings(cache, changes).items()]
    return [f"--config={ROOT / 'configs' / 'sasrec.py'}", f"--workdir={workdir}", *overrides]


def config_of(cache, **changes):
    overrides = [(key, str(value)) for key, value in settings(cache, changes).items()]
    return load(str(ROOT / "configs" / "sasrec.py"), overrides)


def folder_of(workdir, step):
    return workdir / "checkpoints" / str(step)


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


KINDS = (
    "_CHECKPOINT_METADATA", "manifest.json", "meta/metadata", "params/manifest.ocdbt", "params/_METADATA",
    "params/_sharding", "params/d/*", "params/ocdbt.process_0/d/*", "rest/array_metadatas/*", "rest/manifest.ocdbt",
    "rest/ocdbt.process_0/d/*", "rest/d/*",
)  # fmt: skip


def biggest(folder, kind):
    return max(folder.glob(kind), key=lambda path: path.stat().st_size)


# Damage


def test_every_file_is_in_the_manifest(trained):
    folder = folder_of(trained, 15)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert json.loads((folder / "manifest.json").read_text()).keys() == files - {"manifest.json"}
    assert all(list(folder.glob(kind)) for kind in KINDS)


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink], ids=lambda damage: damage.__name__)
def test_damaged_newest_is_named_and_set_aside_and_the_one_before_it_used(workdir, fresh, caplog, damage):
    like, _ = fresh()
    previous = bits(checkpoint.restore(checkpoint.open_store(workdir, create=False), 10, like)[0])
    whole = shutil.copytree(folder_of(workdir, 15), workdir / "whole")
    aside = workdir / "checkpoints" / "damaged-15"
    for kind in KINDS:
        if (damage, kind) == (Path.unlink, "manifest.json"):
            continue  # then it is no checkpoint: see below
        file = biggest(folder_of(workdir, 15), kind)
        damage(file)
        files = {path.name for path in folder_of(workdir, 15).rglob("*")}
        caplog.clear()
        state, meta = checkpoint.restore_latest(checkpoint.open_store(workdir, create=True), like)
        assert int(state.step) == meta["step"] == 10 and bits(state) == previous
        named = folder_of(workdir, 15) if kind == "manifest.json" else file  # which may now name another
        assert f"checkpoint 15 is damaged ({named}" in caplog.text and "damaged-15" in caplog.text
        assert {path.name for path in aside.rglob("*")} == files
        shutil.rmtree(aside)
        shutil.copytree(whole, folder_of(workdir, 15))


def test_emptied_folder_is_no_checkpoint(workdir, fresh):
    shutil.rmtree(folder_of(workdir, 15))
    folder_of(workdir, 15).mkdir()
    state, _ = checkpoint.restore_latest(checkpoint.open_store(workdir, create=True), fresh()[0])
    assert int(state.step) == 10


def test_run_goes_on_from_the_one_before_and_ends_the_same(workdir, trained, cache, fresh):
    flip(biggest(folder_of(workdir, 15), "params/d/*"))
    (workdir / "results.json").unlink()
    assert main(flags(cache, workdir)) == 0
    old, new = (checkpoint.open_store(path, create=False) for path in (trained, workdir))
    like, _ = fresh()
    assert bits(checkpoint.restore(new, 15, like)[0]) == bits(checkpoint.restore(old, 15, like)[0])
    assert (workdir / "checkpoints" / "damaged-15").is_dir()
    results = [json.loads((path / "results.json").read_text()) for path in (trained, workdir)]
    assert results[0]["test"] == results[1]["test"]


def test_the_same_step_damaged_twice_is_set_aside_twice(workdir, cache):
    for _ in range(2):
        flip(biggest(folder_of(workdir, 15), "meta/metadata"))
        (workdir / "results.json").unlink()
        assert main(flags(cache, workdir)) == 0
    names = {path.name for path in (workdir / "checkpoints").glob("damaged-*")}
    assert names == {"damaged-15", "damaged-15-2"} and 15 in steps_of(workdir)


def test_all_damaged_is_an_error_at_every_start(workdir, cache, capsys):
    for step in steps_of(workdir):
        truncate(biggest(folder_of(workdir, step), "rest/d/*"))
    (workdir / "results.json").unlink()
    for _ in range(2):
        assert main(flags(cache, workdir)) == 2
        said = capsys.readouterr().err
        assert "every checkpoint is damaged (damaged-10, damaged-15" in said and "nothing was deleted" in said
        assert steps_of(workdir) == []


@pytest.mark.parametrize("mode", [("--mode=evaluate",), ("--mode=recommend", "--history=1,2")], ids=lambda m: m[0])
def test_damage_in_the_newest_and_in_the_best_when_reading(workdir, capsys, caplog, mode):
    """Reading leaves all in place; the one before has its own best beside it."""
    command = [f"--workdir={workdir}", *mode]
    flip(biggest(folder_of(workdir, 15), "params/d/*"))
    assert main(command) == 0
    assert "checkpoint 15 is damaged" in caplog.text and 15 in steps_of(workdir)
    for step in steps_of(workdir):
        if step < 15:
            flip(biggest(folder_of(workdir, step), "params/d/*"))
    assert main(command) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def test_damaged_best_is_an_error_that_names_the_file(tmp_path, fresh):
    state, _ = fresh()
    store = checkpoint.open_store(tmp_path, create=True)
    for step in (1, 2):
        checkpoint.save(store, state.replace(step=np.int32(step)), {"best_step": 1})
    file = biggest(folder_of(tmp_path, 1), "params/d/*")
    flip(file)
    for read in (lambda: checkpoint.find(tmp_path), lambda: checkpoint.restore_params(store, 1, make_mesh(1, 1))):
        with pytest.raises(UserError) as error:
            read()
        assert f"{file} differs from its checksum" in str(error.value)


def test_folder_without_manifest_is_ignored_and_removed(workdir, fresh, caplog):
    (folder_of(workdir, 15) / "manifest.json").unlink()
    half = workdir / "checkpoints" / "20.orbax-checkpoint-tmp-7"
    half.mkdir()
    assert checkpoint.find(workdir)[2]["step"] <= 10 and 15 in steps_of(workdir)  # a reader removes nothing
    state, _ = checkpoint.restore_latest(checkpoint.open_store(workdir, create=True), fresh()[0])
    assert int(state.step) == 10 and 15 not in steps_of(workdir) and not half.exists()
    assert "removing checkpoint 15" in caplog.text


def test_other_format_is_refused(workdir, fresh, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(UserError, match="has checkpoint format 1, this version reads 2"):
        checkpoint.restore_latest(checkpoint.open_store(workdir, create=True), fresh()[0])
    assert 15 in steps_of(workdir)


# What is kept, and what is inside


@pytest.mark.parametrize(
    ("best_steps", "kept"),
    [
        ([1], [1]),
        ([1, 2, 3, 4, 5], [4, 5]),
        ([1, 1, 1, 1, 1], [1, 4, 5]),
        ([1, 2, 2, 2, 5], [2, 4, 5]),  # if 5 is damaged, 4 is used, and its best is 2
        ([1, 2, 2, 2, 5, 5], [5, 6]),
    ],
)
def test_newest_previous_and_their_best_are_kept(tmp_path, fresh, best_steps, kept):
    state, _ = fresh()
    store = checkpoint.open_store(tmp_path, create=True)
    for step, best in enumerate(best_steps, 1):
        checkpoint.save(store, state.replace(step=np.int32(step)), {"best_step": best})
    assert steps_of(tmp_path) == kept


def test_checkpoints_to_keep_stay_and_can_be_named(tmp_path, fresh):
    state, _ = fresh()
    store = checkpoint.open_store(tmp_path, create=True)
    for step in range(2, 15, 2):
        meta = {"best_step": min(step, 10), "steps_per_epoch": 4}
        checkpoint.save(store, state.replace(step=np.int32(step)), meta, keep={4, 8})
    assert steps_of(tmp_path) == [4, 8, 10, 12, 14]
    names = {"best": 10, "last": 14, "4": 4, "14": 14, "epoch1": 4, "epoch2": 8, "epoch3": 12}
    for name, step in names.items():
        _, found, meta = checkpoint.find(tmp_path, name)
        assert found == meta["step"] == step
    for name in ("6", "epoch4", "epoch14", "newest", "", "-1", "04"):
        with pytest.raises(UserError, match="Known: best, last, 4, 8, 10, 12, 14, epoch1, epoch2, epoch3") as error:
            checkpoint.find(tmp_path, name)
        assert f"{tmp_path}: the checkpoint '{name}'" in str(error.value)


@pytest.mark.parametrize("step", [0, 3])  # stopped before the first step; after some
def test_a_run_without_validation_has_a_last_checkpoint_but_no_best(tmp_path, fresh, step):
    store = checkpoint.open_store(tmp_path, create=True)
    checkpoint.save(store, fresh()[0].replace(step=np.int32(step)), {"best_step": 0, "best_value": None})
    assert checkpoint.find(tmp_path, "last")[1] == step
    with pytest.raises(UserError, match=f"the checkpoint 'best' is not known. Known: last, {step}"):
        checkpoint.find(tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path, fresh):
    state, _ = fresh()
    store = checkpoint.open_store(tmp_path, create=True)
    for step in (9, 10, 100):
        checkpoint.save(store, state.replace(step=np.int32(step)), {"best_step": step})
    assert steps_of(tmp_path) == [10, 100] and checkpoint.latest_step(store) == 100


def test_saving_a_step_again_replaces_what_it_says(tmp_path, fresh):
    state, _ = fresh()
    store = checkpoint.open_store(tmp_path, create=True)
    for best in (0, 0, 7):
        checkpoint.save(store, state.replace(step=np.int32(7)), {"best_step": best})
        assert checkpoint.read_meta(store, 7)["best_step"] == best
    assert steps_of(tmp_path) == [7]
    assert checkpoint.restore_latest(checkpoint.open_store(tmp_path, create=True), state)[1]["best_step"] == 7


def test_failed_save_is_loud_and_the_one_before_stays(tmp_path, fresh, monkeypatch):
    state, _ = fresh()
    store = checkpoint.open_store(tmp_path, create=True)
    checkpoint.save(store, state.replace(step=np.int32(1)), {"best_step": 1})

    def no_space(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoint, "_write_manifest", no_space)
        checkpoint.save(store, state.replace(step=np.int32(2)), {"best_step": 2})
    again = checkpoint.open_store(tmp_path, create=True)
    assert int(checkpoint.restore_latest(again, state)[0].step) == 1
    checkpoint.save(again, state.replace(step=np.int32(2)), {"best_step": 2})
    assert steps_of(tmp_path) == [1, 2]


def test_vocabulary_config_and_protocol_are_inside(trained, cache, fresh):
    _, step, meta = checkpoint.find(trained)
    _, dataset = fresh()
    assert meta["items"] == dataset.item_ids.tolist() and meta["dataset_hash"] == dataset.hash
    said = {"name": "D", "candidates": "all", "hide_history": "yes", "metric": "ndcg@10", "text": ""}
    assert meta["protocol"] == said
    assert meta["config"] == json.loads(json.dumps(config_of(cache).to_dict())) and meta["step"] == step
