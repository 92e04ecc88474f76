"""Replaces files atomically: a reader sees the old file or the new one, never a part."""

import contextlib
import os
import tempfile
from pathlib import Path

from ops.problem import Problem


def write_whole(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`; everyone may read the file.

    Raises:
        Problem: it cannot be written; the old file is still there.
    """
    try:
        if path.exists() and not path.is_file():
            raise Problem(f"{path} is not a file that could be replaced; nothing was written")
        # The temporary name does not begin with the file's: a collector might read it, too.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    except OSError as error:
        raise Problem(f"{path} cannot be written: {error.strerror}") from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        os.replace(name, path)
    except OSError as error:
        raise Problem(f"{path} cannot be written: {error.strerror}; it is as it was") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
