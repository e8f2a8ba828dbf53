"""Pop: every user gets the most popular items. Nothing is trained; the floor that a method has to clear.

Beauty, training counts, test HR@10 / NDCG@10: 0.0115 / 0.0055 under protocol D, 0.0114 / 0.0053 under B (as in CL4SRec,
Table 2), in seconds.

    python -m seqrec_jax.main --config=configs/pop.py
    python -m seqrec_jax.main --config=configs/pop.py:beauty --config.data.dir=DATA
"""

from ml_collections import ConfigDict

from configs import base


def smoke(config: ConfigDict) -> None:
    """`smoke` without a baseline: this system is the baseline."""
    base.smoke(config)
    config.report.baselines = ()


VARIANTS = {"smoke": smoke}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "pop"
    config.system = "pop"
    config.report.baselines = ()
    return base.select(config, argument, VARIANTS)
