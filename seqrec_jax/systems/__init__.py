"""One file per method."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.tasks import Task
from seqrec_jax.systems import cl4srec, clue, downstream, duorec, pop, s3rec, sasrec
from seqrec_jax.systems.system import System, hparams_of

BUILDERS = {
    "pop": pop.build,
    "sasrec": sasrec.build,
    "sasrec_aug": sasrec.build,
    "cl4srec": cl4srec.build,
    "duorec": duorec.build,
    "s3rec": s3rec.build,
    "clue": clue.build,
    "downstream": downstream.build,
}

__all__ = ["BUILDERS", "System", "build", "hparams_of"]


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh, task: Task | None = None) -> System:
    """The system that `config.system` names; `task`: what it predicts, if not the items of `dataset`."""
    return BUILDERS[config.system](config, dataset, mesh, *filter(None, [task]))
