"""S3-Rec (Zhou et al., CIKM 2020), the finetuning stage: SASRec from the parameters of configs/s3rec_pretrain.py.

Binary cross-entropy with one negative a position, constant learning rate, patience 10, as published. config.init_from
has to name the pretraining run, whose last checkpoint it takes, else the run ends with an error; configs/sasrec.py
trains from scratch. Encoder and data set have to be those of the pretraining run.

The published figures, HR@10 / NDCG@10: with 99 negatives (protocol C) Beauty 0.5506 / 0.3732, LastFM 0.5835 / 0.3583;
all items, history hidden (A) Beauty 0.0647 / 0.0327, LastFM 0.0743 / 0.0427. Here, seed 0 after 450 epochs of
pretraining, Beauty has 0.5553 / 0.3642 (C) and 0.0616 / 0.0305 (A), LastFM after 100 epochs 0.6092 / 0.3588 (C, three
seeds): docs/results.md.

    python -m seqrec_jax.main --config=configs/s3rec_finetune.py:beauty --config.data.dir=DATA \
        --config.init_from=PRETRAINED --config.eval.protocol=A
    python -m seqrec_jax.main --config=configs/s3rec_finetune.py:lastfm --config.data.dir=DATA \
        --config.init_from=PRETRAINED --config.eval.protocol=C --config.eval.negatives=DATA/LastFM_sample.txt.gz
"""

from ml_collections import ConfigDict

from configs import base
from configs.s3rec_pretrain import embedded

VARIANTS = {"smoke": base.smoke}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "s3rec_finetune"
    config.system = "sasrec"
    config.init_from = "the workdir of a pretraining run"  # to be named; no folder has this name
    config.loss.next_item = "bce"
    config.train.update(schedule="constant", max_epochs=200, patience=10)
    if not base.data_named(argument):  # both stages alike, whatever their variants
        embedded(config)
    return base.select(config, argument, VARIANTS)
