"""SASRec_aug: SASRec trained on augmented histories, without the contrast (the ablation of CL4SRec, Table 3).

The settings are those of configs/cl4srec.py, so that the contrast is the only difference.

    python -m seqrec_jax.main --config=configs/sasrec_aug.py
    python -m seqrec_jax.main --config=configs/sasrec_aug.py:sports,paper --config.data.dir=DATA
"""

from ml_collections import ConfigDict

from configs import base, cl4srec

VARIANTS = {"smoke": base.smoke, "paper": cl4srec.paper}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "sasrec_aug"
    config.system = "sasrec_aug"
    config.report.baselines = ("pop", "sasrec")
    return base.select(config, argument, VARIANTS)
