"""Writing results: found unwritable before the long run, and complete or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def check_writable(path: str | Path, argument: str = "json") -> Path:
    """Makes sure that a result can be written later on. What is there now stays as it is.

    Args:
        path: The file to write.
        argument: Its name in messages.

    Raises:
        OSError: A directory, no such directory around it, or no permission.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a directory; expected a file to write")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{argument}: there is no directory {file.parent} to write {file.name} in; create it")
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise OSError(
            f"{argument}: cannot write in {file.parent} ({error.strerror or error}); give another path"
        ) from error
    return file


def write_json(path: str | Path, plain: dict[str, Any], argument: str = "json") -> Path:
    """Writes JSON, replacing the file only when all of it is on disk.

    Raises:
        OSError: The file cannot be written; what was there before is still there.
    """
    file = check_writable(path, argument)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as part:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
        # A temporary file is readable by its owner only; a result is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, file)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise OSError(f"{argument}: cannot write {path} ({error.strerror or error}); give another path") from error
    return file
