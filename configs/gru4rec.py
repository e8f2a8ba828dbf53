"""GRU4Rec: Session-based Recommendations with Recurrent Neural Networks (Hidasi et al., ICLR 2016).

Its model, one GRU layer, trained as SASRec is here: on whole histories, with the softmax over all items, whose weights
are the item embeddings. The paper instead trains on sessions in parallel mini-batches, with ranking losses on the
batch's own items. Dropout is ours. Not measured on the published data yet.

    python -m seqrec_jax.main --config=configs/gru4rec.py
    python -m seqrec_jax.main --config=configs/gru4rec.py:beauty --config.data.dir=DATA
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = {"smoke": base.smoke}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "gru4rec"
    config.system = "sasrec"
    config.encoder.update(kind="gru", layers=1, embedding_dropout=0.3)
    return base.select(config, argument, VARIANTS)
