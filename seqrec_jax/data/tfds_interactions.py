"""The project's own TFDS data set of interactions. Nothing here loads TensorFlow or needs a network."""

import functools
from pathlib import Path

import polars as pl

from seqrec_jax.errors import UserError


def prepare(frame: pl.DataFrame, data_dir: Path) -> Path:
    """Writes `frame` (columns user, item and maybe time, in file order) as a TFDS data set.

    Returns its folder below `data_dir`, for `data.format=tfds data.path=FOLDER`. One example is one interaction with
    the features user_id, item_id and, where `frame` has times, timestamp. Raises UserError if the folder exists.
    """
    builder = _builder_class()(frame=frame, data_dir=str(data_dir), file_format="array_record")
    folder = Path(builder.data_dir)
    if folder.exists():  # TFDS would keep the old rows without a word
        raise UserError(f"{folder} exists: remove it, or write to another folder")
    builder.download_and_prepare()
    _read_back(builder, folder)
    return folder


def read(builder_dir: Path) -> pl.DataFrame:
    """The features of `prepare`'s data set as columns, rows in file order. Raises UserError if any are missing."""
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        builder = tfds.builder_from_directory(str(builder_dir))
    except (OSError, ValueError, ParseError) as error:
        raise UserError(f"{builder_dir} is no folder made by TFDS: {error}") from None
    return _read_back(builder, builder_dir)


def _read_back(builder, folder: Path) -> pl.DataFrame:
    from array_record.python.array_record_module import ArrayRecordReader

    promised = builder.info.splits["train"].num_examples
    try:
        stored = sum(ArrayRecordReader(str(file)).num_records() for file in folder.glob("*.array_record-*"))
        if stored != promised:
            raise UserError(f"{folder} holds {stored} interactions, its metadata promise {promised}. Prepare it again")
        # One call: reading one by one takes three times as long.
        frame = pl.DataFrame(builder.as_data_source(split="train").__getitems__(range(promised)))
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged: {error}. Prepare it again") from None
    return frame.with_columns(pl.selectors.binary().cast(pl.String))


@functools.cache  # TFDS registers a builder by name, once per process
def _builder_class() -> type:
    import numpy as np
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class Interactions(tfds.core.GeneratorBasedBuilder):
        """Interactions of users with items, in file order."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # nothing is downloaded: no checksums beside the code; the search needs an undeclared package

        def __init__(self, *, frame: pl.DataFrame, **kwargs):
            self.frame = frame.select(
                user_id="user", item_id="item", **({"timestamp": "time"} if "time" in frame.columns else {})
            )
            super().__init__(**kwargs)

        def _info(self):
            features = {"user_id": tfds.features.Text(), "item_id": tfds.features.Text()}
            if "timestamp" in self.frame.columns:
                integer = self.frame["timestamp"].dtype.is_integer()
                features["timestamp"] = tfds.features.Scalar(np.int64 if integer else np.float64)
            # Shuffling would lose the file order, which decides between equal times.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(self.frame.iter_rows(named=True))

    return Interactions
