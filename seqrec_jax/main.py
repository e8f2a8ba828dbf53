"""python -m seqrec_jax.main --config=configs/cl4srec.py [--config.key=value ...] [--workdir=FOLDER] [--mode=train]

Exit codes: 0 done; 1 the run failed; 2 bad configuration or data; 75 stopped by a signal after saving, run the same
command to continue.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from seqrec_jax import native
from seqrec_jax.config import cache_dir, parse_arguments
from seqrec_jax.errors import RunFailed, UserError

STOPPED = 75


def main(argv: Sequence[str]) -> int:
    """Runs one mode and returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        return run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


def run(argv: Sequence[str]) -> int:
    """Understands the command line before it loads anything heavy, then dispatches."""
    arguments = parse_arguments(argv, _config_in)
    if arguments.mode == "report":
        from seqrec_jax.compare import compare

        compare(arguments.workdirs, arguments.out, force=arguments.force)
        return 0
    config, workdir = arguments.config, arguments.workdir
    cache = cache_dir(config, workdir)
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str((cache / "programs").absolute())
    if arguments.mode == "train" and "://" not in programs:
        native.start(programs)  # while the rest is loaded

    import jax

    from seqrec_jax import run as runs
    from seqrec_jax.protocol import protocol_of
    from seqrec_jax.recommend import load
    from seqrec_jax.train import Stopped, stop_on_signals
    from seqrec_jax.validate import validate
    from seqrec_jax.workdir import check_trained

    if arguments.mode == "recommend":  # on one device, wherever the run was trained
        with config.unlocked():
            config.mesh.data = config.mesh.model = 1
    if config.mesh.distributed and arguments.mode == "train":
        try:
            jax.distributed.initialize()
        except ValueError as error:  # nothing says who the others are
            raise UserError(
                f"config.mesh.distributed=true finds no other processes ({error}): start them by Cloud TPU, Slurm or "
                "mpirun, or leave it out: one process uses all devices of its machine"
            ) from error
    validate(config, jax.device_count())
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if arguments.mode == "evaluate":
        runs.evaluate(config, workdir)
    elif arguments.mode == "embed":
        from seqrec_jax.embed import embed

        embed(config, workdir, arguments.embed, arguments.histories, cache, arguments.out)
    elif arguments.mode == "recommend":
        hide = protocol_of(config).hide_history == "yes"
        recommender = load(workdir)
        check_trained(config, recommender.model.meta, workdir)
        found = recommender.recommend([arguments.history], arguments.k, hide_history=hide)
        for item, score in zip(found.items[0], found.scores[0], strict=True):
            print(f"{item}\t{score:.6f}")
        if found.unknown[0]:
            print(f"unknown items, left out: {', '.join(found.unknown[0])}", file=sys.stderr)
    else:
        with stop_on_signals() as stop:
            try:
                print(f"workdir {workdir}")
                runs.train_and_evaluate(config, workdir, stop)
            except Stopped as stopped:
                print(stopped, file=sys.stderr)
                return STOPPED
    return 0


def _config_in(workdir: Path) -> dict:
    """The config of the best checkpoint."""
    from seqrec_jax import checkpoint

    return checkpoint.find(workdir)[2]["config"]


if __name__ == "__main__":
    for name in (signal.SIGTERM, signal.SIGINT):  # while nothing is to be saved; training asks for its own way
        signal.signal(name, lambda *_: sys.exit(STOPPED))
    gc.set_threshold(100_000)  # imports and traces make many objects that stay: seldom look for garbage among them
    sys.exit(main(sys.argv[1:]))
