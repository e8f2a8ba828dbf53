"""Data flows one way: no module imports one that comes later; and nothing that is read is ever executed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "seqrec_jax"

# Every module, without "seqrec_jax.": each may import only those before it.
ORDER = [
    "errors", "protocol", "user_conflicts", "validate", "config", "native",
    "data.dataset", "data.tfds_interactions", "data.files", "data.rows", "data.tables", "data.sources",
    "data.synthetic", "data.attributes", "data.prepare", "data.splits", "data.labels", "data.cold_start",
    "data.histories", "data.vectors", "data.batches", "data.tasks", "data.prefixes", "data.same_target",
    "augment", "cloze", "sharding",
    "encoders.sublayer", "encoders.transformer", "encoders.gru", "encoders",
    "losses.fused", "losses.softmax", "losses.contrastive", "losses.negatives", "losses.next_item", "losses.bootstrap",
    "losses.mutual_information",
    "systems.system", "systems.pop", "systems.sasrec", "systems.cl4srec", "systems.duorec", "systems.s3rec",
    "systems.clue", "systems.downstream", "systems",
    "optimizer", "programs", "train_step",
    "ranking", "evaluate", "judge", "analysis",
    "checkpoint", "transfer", "workdir", "train",
    "recommend", "embed", "report", "compare", "run", "main",
    "",  # the package itself: only a door to the finished product
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(tree: ast.AST) -> set[str]:
    """The package's modules that the code imports, wherever in it; `from package import module` is the module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.removeprefix("seqrec_jax.") in MODULES}
            names |= modules | ({node.module} if inner - modules else set())
    mine = {name for name in names if name.split(".")[0] == "seqrec_jax"}
    return {name.removeprefix("seqrec_jax").removeprefix(".") for name in mine}


def faults_of(tree: ast.AST) -> set[str]:
    """What could execute something that was read from a file or an argument."""
    faults = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            faults |= {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & {
                name.split(".")[0] for name in names
            }
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            faults |= {called} & {"eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load"}
            faults |= {"allow_pickle" for k in node.keywords if k.arg == "allow_pickle" and not is_false(k.value)}
    return faults


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(name for name, path in MODULES.items() if path.read_text().strip())


@pytest.mark.parametrize("name", [name for name in ORDER if name in MODULES])
def test_imports_follow_the_order(name):
    later = {other for other in imports_of(ast.parse(MODULES[name].read_text())) if other in ORDER[ORDER.index(name) :]}
    unknown = imports_of(ast.parse(MODULES[name].read_text())) - MODULES.keys()
    assert not later and not unknown


def test_the_walk_sees_every_kind_of_import():
    code = (
        "import seqrec_jax.train\ndef f():\n    from seqrec_jax import run\n    from seqrec_jax.systems import System"
    )
    assert imports_of(ast.parse(code)) == {"train", "run", "systems"}
    assert imports_of(ast.parse("from seqrec_jax import load\nimport jax")) == {""}


READ = [path for name, path in MODULES.items() if name != "programs"]  # compiled programs are there to be executed


@pytest.mark.parametrize("path", [*READ, *(ROOT / "configs").glob("*.py")], ids=lambda path: path.stem)
def test_nothing_that_is_read_is_executed(path):
    assert faults_of(ast.parse(path.read_text())) == set()


def test_the_walk_sees_what_executes():
    code = (
        "import pickle\neval(x)\nexec(y)\nnp.load(f, allow_pickle=True)\nyaml.load(f)\nnp.load(f, allow_pickle=False)"
    )
    assert faults_of(ast.parse(code)) == {"pickle", "eval", "exec", "allow_pickle", "yaml.load"}


def test_importing_the_package_imports_no_jax_and_its_modules_start_no_device():
    code = """
import importlib, sys
import seqrec_jax
assert "jax" not in sys.modules, "import seqrec_jax imports JAX"
for name in sys.argv[1:]:
    importlib.import_module("seqrec_jax." + name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import starts a device"
"""
    names = [name for name in ORDER if name]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_log_imports_no_pytorch(tmp_path):
    """tensorboardX does wherever it is installed, and that takes seconds."""
    (tmp_path / "torch.py").write_text("raise AssertionError('imported')")
    code = (
        "import sys, pathlib; from seqrec_jax.workdir import Log; log = Log(pathlib.Path(sys.argv[1]), 0, 0); "
        "log.write('train', 1, {'loss': 1.0}); log.close(); assert 'torch' not in sys.modules"
    )
    path = [str(tmp_path), str(ROOT)]
    script = f"import sys; sys.path[:0] = {path}; {code}"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").iterdir())
