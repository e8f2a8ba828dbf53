"""The bytes of a data file, whole or some lines at a time, plain or gzip; and what can be wrong with it, in words."""

import contextlib
import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

from seqrec_jax.errors import UserError

_GZIP = b"\x1f\x8b"


def read_bytes(path: Path) -> bytes:
    """The file's bytes, decompressed where they are gzip. Raises UserError where they cannot be had."""
    with _explained(path):
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
    if not data:
        raise UserError(f"{path} is empty")
    return data


def read_lines(path: Path, count: int) -> Iterator[bytes]:
    """The same bytes, `count` lines at a time."""
    with _explained(path), path.open("rb") as file:
        lines = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(_GZIP) else file
        empty = True
        while block := b"".join(itertools.islice(lines, count)):
            empty = False
            yield block
    if empty:
        raise UserError(f"{path} is empty")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: correct --config.data.path or --config.data.dir") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file (TFDS folders need --config.data.format=tfds)") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short: {error}. Copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
