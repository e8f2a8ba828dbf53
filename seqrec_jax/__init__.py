"""Sequential recommendation in JAX."""


def load(workdir):
    """The best model of a run, ready to recommend; see seqrec_jax.recommend.Recommender."""
    from seqrec_jax.recommend import load

    return load(workdir)
