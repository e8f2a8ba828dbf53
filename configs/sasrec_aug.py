"""SASRec_aug: SASRec trained on augmented histories, without the contrast (the ablation of CL4SRec, Table 3).

The settings are those of configs/cl4srec.py, so that the contrast is the only difference.

    python -m seqrec_jax.main --config=configs/sasrec_aug.py
    python -m seqrec_jax.main --config=configs/sasrec_aug.py:sports,paper --config.data.dir=DATA
"""

from ml_collections import ConfigDict

from configs import cl4srec

VARIANTS = cl4srec.VARIANTS


def get_config(argument: str = "") -> ConfigDict:
    config = cl4srec.get_config(argument)
    config.name = "sasrec_aug"
    config.system = "sasrec_aug"
    return config
