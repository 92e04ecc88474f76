"""Files that others read at any moment: they see the old one or the new one, never a part."""

import contextlib
import os
import tempfile
from pathlib import Path

from ops.problem import Problem


def write_whole(path: Path, text: str) -> None:
    """Put `text` in the place of what `path` had, readable by everyone.

    Raises:
        Problem: it cannot be written; the old file is still there.
    """
    try:
        if path.exists() and not path.is_file():
            raise Problem(f"{path} is not a file that could be replaced; nothing was written")
        # Not the name of the file with something after it: a collector may read those as well.
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
