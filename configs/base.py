"""Every key that exists, grouped, with its unit or consequence. The other files of this folder hold only differences.

`--config=configs/NAME.py:DATASET,VARIANT,...` calls `get_config("DATASET,VARIANT,...")` of that file. DATASET: a named
set, or `own` for a file of your own (understood where config.data.path is given); without one: the embedded data.
"""

from ml_collections import ConfigDict

from seqrec_jax.data.sources import DATASETS


def get_config(argument: str = "") -> ConfigDict:
    """The defaults: SASRec on the embedded synthetic data."""
    config = ConfigDict()
    config.name = "base"  # names the default workdir
    config.system = "sasrec"  # pop | sasrec | sasrec_aug | cl4srec | duorec | s3rec, clue (pretraining) | downstream
    config.seed = 0  # every random stream of the run
    # Whose parameters this run starts from: a workdir's best checkpoint (RUN; of a pretraining run the last) or another
    # one (RUN@best, RUN@last, RUN@STEP, RUN@epochN, or the checkpoint's folder); "" = from scratch
    config.init_from = ""
    config.task = ""  # of system=downstream: next_item | profile (a label of users) | cold_start (another catalogue)
    config.freeze_encoder = False  # downstream: the new head alone is trained (a linear probe)
    config.split_seed = 0  # profile, cold_start: who trains and who tests, whatever the run's seed

    config.data = data = ConfigDict()
    data.name = ""  # a named data set (set by the argument after the colon); "" = data.path, or synthetic data
    data.dir = ""  # folder that holds the named data sets
    data.path = ""  # a file; overrides the named set's file
    data.format = ""  # lines | csv | tsv | parquet | jsonl | recbole | movielens | tfds; "" = by the file's name
    data.user_column = "user_id"  # names of the columns of tabular files
    data.item_column = "item_id"
    data.time_column = "timestamp"  # "" = rows are already in time order
    data.on_bad_row = "error"  # error | drop: drop counts and reports every rejected row
    data.repeats = "keep"  # keep | drop: drop keeps the first of equal (user, item) pairs
    data.min_user = 0  # k-core: users with fewer actions are removed, repeatedly; 0 = keep all
    data.min_item = 0  # k-core: items with fewer actions are removed, repeatedly; 0 = keep all
    data.attributes = ""  # of items: "" = none | included: those of the named or the embedded data | a file
    data.attribute_columns = ()  # of a tabular file; () = RecBole's token_seq columns, MovieLens' genres
    data.attribute_separator = "|"  # between the attributes of a text column (RecBole: a blank)
    # Share of users who are trained on, the same in every run; a smaller share is part of a larger one. The training
    # actions of the others are neither inputs nor targets, nor counted by pop.counts=train and negatives by popularity.
    # Evaluation is of all users with their whole histories, over all items, as ever.
    data.train_fraction = 1.0
    # system=clue: whether pretraining, too, leaves out each user's last two items, next_item's validation and test.
    # False: it reads whole histories, for profile and cold_start, whose targets are elsewhere
    data.hold_out = True
    data.cache_dir = ""  # prepared data; programs, but for JAX_COMPILATION_CACHE_DIR; "" = .cache beside the workdir
    data.synthetic_users = 4000  # size of the embedded synthetic data
    data.synthetic_items = 2000
    data.synthetic_seed = 0

    config.profile = profile = ConfigDict()
    profile.labels = ""  # of users: "" = none | included: those of the named or the embedded data | a file
    profile.label = "gender"  # the column that is to be predicted (users.dat: gender, age, occupation)
    # A Parquet file of the users' vectors, such as --mode=embed writes: the head alone is trained, on them; no encoder
    profile.vectors = ""
    profile.folds = 5  # runs, each tested on another part of the users; 1: one run, 80/5/15 percent of them (the paper)
    profile.user_column = "user_id"  # of the users' ids in it; users.dat: always its first

    config.cold_start = cold_start = ConfigDict()
    cold_start.targets = ""  # a file of the items that users met in another catalogue; data.path holds their histories
    cold_start.user_column = "user_id"  # names of its columns
    cold_start.item_column = "item_id"

    config.encoder = encoder = ConfigDict()
    # transformer | gru (causal; reads max_length, dim, layers, the dropouts, dtype, and init and init_scale for items)
    encoder.kind = "transformer"
    encoder.max_length = 50  # items of history the encoder sees (the most recent)
    encoder.dim = 64
    encoder.layers = 2
    encoder.heads = 2
    encoder.ffn = 256  # width of the feed-forward layer
    encoder.activation = "gelu"  # gelu (erf form) | relu
    encoder.norm = "post"  # post | pre | query (pre-norm of the attention query alone: the original SASRec)
    # transformer: weight of the recency filter beside attention's (BSARec's alpha: 0.7 on Beauty); 0: attention alone
    encoder.filter = 0.0
    encoder.filter_width = 8  # items that the filter's low part averages
    encoder.input_norm = True  # layer norm on the input embeddings
    encoder.final_norm = False  # layer norm on the output states
    encoder.scale_embedding = False  # item embeddings times sqrt(dim)
    encoder.norm_epsilon = 1e-12
    encoder.positions = "left"  # left: position ids end at max_length - 1 (left padding) | right: they start at 0
    encoder.embedding_dropout = 0.5
    encoder.hidden_dropout = 0.5  # attention probabilities, attention output, feed-forward output; gru: between layers
    encoder.attention = "plain"  # plain | fused: one kernel, cuDNN's on a GPU in bfloat16; no dropout on probabilities
    encoder.user_token = False  # clue: [UR] behind the last item, read both ways; its state is the user's
    encoder.init = "normal"  # normal | truncated_normal (within one init_scale)
    encoder.init_scale = 0.02
    encoder.dtype = "float32"  # float32 | bfloat16: arithmetic; parameters and losses stay float32

    config.loss = loss = ConfigDict()
    loss.next_item = "full"  # full (softmax over all items) | sampled | bce | bpr
    loss.negatives = 512  # sampled: negatives a step, shared by its positions
    # sampled: uniform (each counts once, CL4SRec Eq. 15) | popularity (with logQ correction: each stands for 1 / (K q)
    # items, so that the loss estimates the one over all items)
    loss.negative_distribution = "uniform"
    # sampled: the items of the history so far compete too, each once, beside what is drawn (by popularity they weigh
    # twice, because the draw stands for them as well)
    loss.history_negatives = False

    config.contrastive = contrastive = ConfigDict()
    contrastive.weight = 0.1  # lambda
    contrastive.schedule = "constant"  # of lambda: constant (as published) | linear | cosine (to 0 at the last step)
    contrastive.temperature = 1.0  # tau, divides the similarity
    contrastive.similarity = "dot"  # dot | cosine
    contrastive.pairs = 256  # duorec: targets of a step, drawn at random, whose prefixes are contrasted
    # duorec: what is contrasted with what. unsupervised (the state with a dropout view) | supervised (the state with a
    # same-target history) | both_added (their sum) | duorec (the dropout view with the same-target history) | cl4srec
    contrastive.mode = "duorec"
    contrastive.same_target_negatives = "removed"  # duorec: removed (the paper) | kept (its published code)
    contrastive.directions = "averaged"  # duorec: summed (the paper, Eq. 14: twice the value) | averaged (its code)

    config.s3rec = s3rec = ConfigDict()
    s3rec.aap = 0.2  # weight of associated attribute prediction; an objective whose weight is 0 is not computed
    s3rec.mip = 1.0  # of masked item prediction; pretraining's validation ranks items with its map
    s3rec.map = 1.0  # of masked attribute prediction
    s3rec.sp = 0.5  # of segment prediction
    s3rec.mask = 0.2  # probability that an item is masked; the last one always is
    # Whether each history ends, every time it is read, at an item drawn anew, and not always at its last: what is asked
    # at the masked end is then the next item of any prefix, as where each is read (train.targets=prefix), for less
    s3rec.cut = True
    s3rec.causal = False  # True: each item is read with those before it alone, as in finetuning; a GRU always does
    s3rec.form = "code"  # of the objectives: code (the published one) | paper (its equations)
    s3rec.negatives = 1  # items drawn for each masked one
    s3rec.segment_negatives = "training"  # training | published (of whole histories: held-out items leak in)

    config.clue = clue = ConfigDict()
    clue.pretraining = "clue"  # clue (views of a user agree) | masked_items (PeterRec's objective on the same encoder)
    # What makes the two views differ: dropout alone | mask | crop (drops a window, where CL4SRec keeps one) | permute
    clue.view = "dropout"
    clue.share = 0.2  # of a history that view mask, crop or permute changes; of the items that masked_items predicts
    clue.width = 64  # of the projections (not in the paper)
    clue.bottleneck = 1024  # width inside the predictor (not in the paper; SimSiam: a quarter of the projections')
    clue.stop_gradient = True  # False collapses: the paper's ablation
    clue.predictor = True  # False collapses: the paper's ablation

    config.augment = augment = ConfigDict()
    augment.operators = ("crop", "mask", "reorder")  # the set that views draw from
    augment.choice = "uniform"  # uniform (each view its own draw) | different (two unlike operators) | fixed
    augment.crop = 0.6  # eta: share of the history that crop keeps
    augment.mask = 0.3  # gamma: share of the history that mask replaces
    augment.reorder = 0.6  # beta: share of the history that reorder shuffles

    config.train = train = ConfigDict()
    train.batch_size = 256  # histories per step (targets=prefix: prefixes per step)
    train.targets = "all"  # all (last max_length targets a user) | windows (every target once) | prefix
    train.packed = True  # several short histories share a row, where that saves rows; False: one history a row
    train.max_epochs = 40  # a linear or cosine schedule ends here, or at max_steps if that comes first
    train.max_steps = 0  # 0 = no bound besides max_epochs
    train.max_seconds = 0.0  # training seconds, counted across resumes; 0 = no bound
    train.patience = 10  # validations without improvement before the run stops; 0 = never
    train.optimizer = "adam"  # adam | sgd (its momentum is beta1)
    train.learning_rate = 1e-3
    train.schedule = "linear"  # constant | linear (decay to 0 at the last step) | cosine (to 0)
    train.warmup_steps = 0  # steps over which the learning rate rises linearly from 0
    train.weight_decay = 0.0  # decoupled; not on biases, norms and embeddings
    train.clip_norm = 0.0  # global gradient norm; 0 = no clipping
    train.beta1 = 0.9
    train.beta2 = 0.999
    train.log_every = 32  # steps per dispatch and per line of metrics.jsonl
    train.save_every = 0  # steps between checkpoints; 0 = at every validation
    train.keep_epochs = ()  # epochs, such as 10,20,50, whose last checkpoint is kept, for init_from=RUN@epoch20

    config.eval = evaluation = ConfigDict()
    evaluation.protocol = "D"  # A | B | C | D | custom
    evaluation.every = 0  # steps between validations; 0 = once an epoch
    evaluation.batch_size = 256  # histories ranked at a time; changes memory, never the result
    evaluation.hide_history = ""  # "" = as the protocol says | yes | no (custom only)
    evaluation.candidates = ""  # "" = as the protocol says | all | sampled (custom only)
    evaluation.metric = ""  # "" = as the protocol says | a metric that selects the checkpoint (custom only)
    evaluation.negatives = ""  # file "user item item ..." with each user's negatives; "" = drawn with negatives_seed
    evaluation.num_negatives = 99
    evaluation.negatives_seed = 12345

    config.pop = pop = ConfigDict()
    pop.counts = "train"  # train | all: actions that the popularity baseline counts

    config.report = report = ConfigDict()
    report.baselines = ("pop",)  # systems run beside this one, same loss, data and budget
    report.analysis = False  # alignment, uniformity and item spectrum at every validation, not at the end alone

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices the batch is split over; -1 = all that mesh.model leaves
    mesh.model = 1  # devices the item table is split over
    mesh.distributed = False  # several processes train together, as Cloud TPU, Slurm or mpirun start them
    return config


def select(config: ConfigDict, argument: str, variants: dict) -> ConfigDict:
    """Applies the argument after the colon: a data set name, then variants, each a function that edits the config."""
    words = [word for word in map(str.strip, argument.split(",")) if word]
    named = [word for word in words if word in DATASETS]
    if len(named) > 1:
        raise ValueError(
            f"'{argument}' after the colon names {len(named)} data sets: {', '.join(named)}; a run has one"
        )
    for word in sorted(words, key=lambda word: word not in DATASETS):  # variants may look at the data set
        if word in DATASETS:
            config.data.name = word
            long_histories(config)
        elif word == "own":  # a file of the user's own, named by data.path: the recipe for real data
            continue
        elif word in variants:
            variants[word](config)
        else:
            known = ", ".join([*DATASETS, "own", *variants])
            raise ValueError(f"'{word}' after the colon is no data set and no variant of {config.name}; known: {known}")
    return config


def data_named(argument: str) -> set[str]:
    """The data set that the argument after the colon names, or `own`; empty: the embedded data."""
    return {*DATASETS, "own"} & set(map(str.strip, argument.split(",")))


def long_histories(config: ConfigDict) -> None:
    """Where most targets are older than max_length, windows keep them; on ml1m the dropout of sparse data hurts."""
    if config.data.name in ("lastfm", "ml1m"):
        config.train.targets = "windows"
    if config.data.name == "ml1m":
        config.encoder.update(embedding_dropout=0.1, hidden_dropout=0.1)


def embedded_encoder(config: ConfigDict) -> None:
    """For the embedded data: a small encoder that learns in a minute."""
    config.encoder.update(dim=32, ffn=64, layers=1, embedding_dropout=0.2, hidden_dropout=0.2)
    config.train.learning_rate = 3e-3


def smoke(config: ConfigDict) -> None:
    """Variant `smoke`: seconds, to see that everything runs."""
    config.data.synthetic_users, config.data.synthetic_items = 300, 120
    config.encoder.dim, config.encoder.ffn, config.encoder.layers = 16, 32, 1
    config.train.max_epochs, config.train.batch_size, config.train.log_every = 2, 64, 4
    config.report.baselines = ("pop",)


def original_backbone(config: ConfigDict) -> None:
    """The original SASRec's encoder (Kang and McAuley, ICDM 2018); the defaults are the one S3-Rec and DuoRec share."""
    config.encoder.update(
        dim=50,
        heads=1,
        ffn=50,
        activation="relu",
        norm="query",
        input_norm=False,
        final_norm=True,
        scale_embedding=True,
        norm_epsilon=1e-8,
    )
