"""Writing files so that a reader finds the old content or the new, never a part of it."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file's content as a whole, on disk when this returns.

    The content goes to a temporary file in the same folder, which then takes the name.

    Raises:
        OSError: No space or no permission; what was at `path` is still there, and nothing new.
    """
    replace_atomically(path, lambda temporary: temporary.write_bytes(content))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write_atomically` for a content that is not in memory as bytes.

    Args:
        path: The file.
        write: Given a temporary file in the same folder, writes the content to it.

    Raises:
        OSError: As `write_atomically`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise _explained(error, path) from error
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        # mkstemp's files are private; the result is as readable as any other file of the user.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        with contextlib.suppress(OSError):
            # Makes the new name itself durable where folders can be synced.
            _sync(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _explained(error: OSError, path: Path) -> OSError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    return OSError(error.errno, f"cannot write {path}: {reason}; what was there before is untouched")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
