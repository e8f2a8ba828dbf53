"""The command line, the files of configs/, and config.json. What each key may be is in validate.py."""

import csv
import difflib
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from seqrec_jax.errors import UserError, unknown
from seqrec_jax.validate import RANGES, allowed, flatten

ROOT = Path(__file__).resolve().parents[1]
USAGE = """\
python -m seqrec_jax.main --config=configs/NAME.py[:DATASET,VARIANT] [--config.key=value ...]
    --config=FILE        a file of configs/, or the config.json of a run (default: the one in --workdir)
    --config.key=value   overrides one key; configs/base.py lists and explains them all
    --workdir=FOLDER     where the run lives; the same command resumes it (default: runs/NAME-HASH)
    --mode=MODE          train (default), evaluate, recommend, embed, report
    --history=ID,ID,...  recommend: the items a user has met, oldest first; an id with a comma in double quotes
    --k=10               recommend: how many items to name
    --embed=users        embed: vectors of users or of items
    --histories=FILE     embed: the users and their items (default: those of the run's data)
    --workdirs=A,B,...   report: finished runs to set side by side; no --config is needed
    --out=FILE           report: the page to write (report.html); embed: the vectors (users.parquet, items.parquet)
    --force              report: also runs of different data or protocols"""
FLAGS = {  # name: default
    "config": "", "workdir": "", "mode": "train", "history": "", "k": "10", "embed": "users", "histories": "",
    "workdirs": "", "out": "",
}  # fmt: skip
SWITCHES = ("force",)  # flags without a value
MODES = ("train", "evaluate", "recommend", "embed", "report")
MODE_FLAGS = {  # they belong to these modes alone
    "recommend": ("history", "k"), "embed": ("embed", "histories", "out"), "report": ("workdirs", "out", "force"),
}  # fmt: skip
EMBEDDED = ("users", "items")


class Arguments(NamedTuple):
    """The command line, understood."""

    config: ConfigDict | None  # None: --mode=report, which reads those of the runs
    workdir: Path | None
    mode: str
    history: tuple[str, ...]
    k: int
    embed: str
    histories: Path | None
    workdirs: tuple[Path, ...]
    out: Path
    force: bool


# Command line ---------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str], config_in: Callable[[Path], Mapping[str, Any]] | None = None) -> Arguments:
    """Reads the command line (without the program's name) and loads the configuration; `validate` comes after it.

    `config_in` gives the config inside a workdir's checkpoints, for a workdir that has nothing else.
    """
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        raise SystemExit(0)
    given = _flags(argv)
    flags = FLAGS | {name: text for name, text in given.items() if name in FLAGS}
    overrides = [(name.removeprefix("config."), text) for name, text in given.items() if name.startswith("config.")]
    _check_mode(flags, given)

    workdir = Path(flags["workdir"]).expanduser() if flags["workdir"] else None
    default_out = "report.html" if flags["mode"] == "report" else f"{flags['embed']}.parquet"
    arguments = Arguments(
        config=None,
        workdir=workdir,
        mode=flags["mode"],
        history=_history(flags["history"]),
        k=int(flags["k"]),
        embed=flags["embed"],
        histories=Path(flags["histories"]).expanduser() if flags["histories"] else None,
        workdirs=tuple(Path(folder).expanduser() for folder in _listed(flags["workdirs"])),
        out=Path(flags["out"] or default_out).expanduser(),
        force="force" in given,
    )
    if arguments.mode == "report":
        return arguments
    source = flags["config"]
    if not source and workdir and (workdir / "config.json").is_file():
        source = str(workdir / "config.json")
    if not source and config_in and workdir and flags["mode"] != "train":
        return arguments._replace(config=_overridden(from_dict(config_in(workdir)), overrides))
    if not source:
        raise UserError(
            "--config is missing, as in --config=configs/cl4srec.py, or the --workdir of a run (--help: all flags)"
        )
    config = load(source, overrides)
    return arguments._replace(config=config, workdir=workdir or default_workdir(config))


def _check_mode(flags: Mapping[str, str], given: Iterable[str]) -> None:
    """Refuses an unknown mode, flags of another mode, and a mode without what it needs."""
    mode = flags["mode"]
    if mode not in MODES:
        raise unknown("--mode", mode, MODES)
    for name in given:
        owners = [owner for owner, names in MODE_FLAGS.items() if name in names]
        if owners and mode not in owners:
            raise UserError(f"--{name} belongs to --mode={' and --mode='.join(owners)}, but the mode is {mode}")
    foreign = [name for name in given if name not in ("mode", *MODE_FLAGS["report"])]
    if mode == "report" and foreign:
        raise UserError(f"--{foreign[0]} has no meaning with --mode=report: it reads the configs of --workdirs=A,B,...")
    if mode == "report" and not _listed(flags["workdirs"]):
        raise UserError("--mode=report needs --workdirs=A,B,... (the folders of finished runs)")
    if mode == "recommend" and not _history(flags["history"]):
        raise UserError("--mode=recommend needs --history=ID,ID,... (the items a user has met, oldest first)")
    if flags["embed"] not in EMBEDDED:
        raise unknown("--embed", flags["embed"], EMBEDDED)
    if flags["embed"] == "items" and flags["histories"]:
        raise UserError("--histories has no meaning with --embed=items: leave one of them out")
    if mode == "embed" and flags["out"] and not flags["out"].endswith(".parquet"):
        raise UserError(f"--out={flags['out']}: vectors are written as Parquet; allowed: a name that ends in .parquet")
    if not flags["k"].isdecimal() or int(flags["k"]) < 1:
        raise UserError(f"--k={flags['k']} is out of range; allowed: a whole number in [1, inf)")


def _history(text: str) -> tuple[str, ...]:
    """Ids as fields of a CSV line."""
    try:
        (fields,) = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise UserError(f"--history={text} cannot be read: {error}") from None
    return tuple(field.strip() for field in fields if field.strip())


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """`--name=text` and `--name text` as {name: text}; refuses what is unknown, repeated or has no dashes."""
    known = [*FLAGS, *SWITCHES, *(f"config.{key}" for key in flatten(_base()))]
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            hint = _nearest(name, known, "--")
            raise UserError(f"'{word}' is not a flag: overrides start with --config. (two dashes).{hint}")
        if name not in known:
            hint = _nearest(name, known, "--")
            raise UserError(f"--{name} is unknown.{hint} --help shows the flags, configs/base.py every key")
        if name in SWITCHES and equals:
            raise UserError(f"--{name} takes no value")
        if name not in SWITCHES and not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise UserError(f"--{name} needs a value, as in --{name}=VALUE")
        if name in given:
            raise UserError(f"--{name} is given twice: {given[name]} and {text}")
        given[name] = text
    return given


# Loading and saving ---------------------------------------------------------------------------------------------------


def load(path_and_argument: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The locked config of `configs/NAME.py:ARGUMENT` or of a run's config.json, with overrides (dotted key, text)."""
    name, colon, argument = path_and_argument.partition(":")
    if Path(path_and_argument).expanduser().is_file():  # its folder's name may hold a colon
        name, colon, argument = path_and_argument, "", ""
    overrides = list(overrides)
    if any(key in ("data.path", "data.name") and text for key, text in overrides) and not name.endswith(".json"):
        argument = ",".join(filter(None, (argument, "own")))
    path = Path(name).expanduser()
    if not path.is_file():
        raise unknown("the configuration file", name, sorted(map(str, path.parent.glob("*.py"))))
    if colon and path.suffix == ".json":
        raise UserError(f"{path}: a config.json takes no argument after the colon, got '{argument}'")
    try:
        is_json = path.suffix == ".json"
        config = from_json(path.read_text()) if is_json else from_dict(_import(path).get_config(argument))
    # What a configuration file can get wrong, in Python's or ConfigDict's words.
    except (UserError, ValueError, TypeError, AttributeError, KeyError, ImportError, NameError, SyntaxError) as error:
        raise UserError(f"{path}: {error}") from error
    config = _overridden(config, overrides)
    if "own" in map(str.strip, argument.split(",")) and not config.data.path and not config.data.name:
        raise UserError(f"{path}:{argument}: `own` reads a file of yours: set --config.data.path=FILE")
    return config


def _overridden(config: ConfigDict, overrides: Iterable[tuple[str, str]]) -> ConfigDict:
    values = flatten(config)
    for key, text in overrides:
        _check_key(key, values)
        values[key] = _parse(key, values[key], text)
    return from_dict(values)


def to_json(config: ConfigDict) -> str:
    """Sorted, indented JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The locked config `to_json` wrote. A key that is newer than the file takes its default of configs/base.py."""
    return from_dict(json.loads(text))


def config_hash(config: ConfigDict) -> str:
    """64 hexadecimal digits; equal configs, equal hashes."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def default_workdir(config: ConfigDict) -> Path:
    """runs/NAME[-DATASET]-HASH"""
    return Path("runs", "-".join(filter(None, (config.name, config.data.name, config_hash(config)[:8]))))


def cache_dir(config: ConfigDict, workdir: Path) -> Path:
    """Where prepared data and, unless JAX_COMPILATION_CACHE_DIR names another place, compiled programs are kept."""
    return Path(config.data.cache_dir).expanduser() if config.data.cache_dir else workdir.parent / ".cache"


def _import(path: Path) -> ModuleType:
    """Runs a configuration file; wherever it lies, `from configs import base` finds ours."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT))
    return module


def _base() -> ConfigDict:
    return _import(ROOT / "configs" / "base.py").get_config()


def from_dict(values: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The locked base config with `values` (nested, or with dotted keys), each of its default's type."""
    config = _base()
    defaults = flatten(config)
    for key, value in flatten(values).items():
        _check_key(key, defaults)
        default = defaults[key]
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        elements = value if isinstance(value, tuple) else ()
        if type(value) is not type(default) or any(type(element) is not _element(key) for element in elements):
            raise UserError(f"{key}={value} has the wrong type; allowed: {allowed(key, default)}")
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    return config.lock()


def _parse(key: str, default: Any, text: str) -> Any:
    """`text` as a value of the default's type."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(_element(key)(part.strip()) for part in text.split(",")) if text.strip() else ()
        return type(default)(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{key}={text} has the wrong type; allowed: {allowed(key, default)}") from error


def _element(key: str) -> type:
    """What a tuple under `key` holds."""
    return int if key in RANGES else str


def _check_key(key: str, known: Iterable[str]) -> None:
    if key not in known:
        raise UserError(f"unknown key {key}.{_nearest(key, known)} configs/base.py lists every key")


def _nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """ " Did you mean ...?" with the known words whose last part is most like that of `word`; "" where none is."""
    last = {name: name.rpartition(".")[2] for name in known}
    tails = difflib.get_close_matches(word.rpartition(".")[2], last.values(), n=1, cutoff=0.7)
    words = [name for name in last if last[name] in tails] or difflib.get_close_matches(word, last, n=1)
    words = [word] if word in last else words
    return f" Did you mean {' or '.join(prefix + name for name in words)}?" if words else ""
