"""Files that are either complete or untouched."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

#: Errors of writing that carry no file name of their own.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`, with the same suffix; it takes the place of `path` when the block ends well.

    If the block fails, a full disk included, `path` is as it was before and the temporary file is gone. Missing folders are made.

    Raises:
        OSError: carries the name of `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        ours = error.filename is not None and Path(os.fsdecode(error.filename)) == temporary
        if ours or (error.filename is None and error.errno in _FULL):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
