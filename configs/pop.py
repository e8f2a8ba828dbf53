"""Pop: every user gets the most popular items. Nothing is trained; the floor that a method has to clear.

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
