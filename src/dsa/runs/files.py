"""Writing files: a place that cannot be written is found before the long run, and a reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_PART = ".part"
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


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


def check_folder_writable(path: str | Path, argument: str = "out") -> Path:
    """Makes sure that a folder can be written later on, whether it is there or has to be made. Nothing is made now.

    Args:
        path: The folder.
        argument: Its name in messages.

    Raises:
        OSError: A file is in its place, or no permission.
    """
    folder = Path(path).expanduser()
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{argument}: {there} is a file; expected a folder to write to")
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=f".{folder.name}."):
            pass
    except OSError as error:
        raise OSError(f"{argument}: cannot write {folder} ({error.strerror or error}); give another folder") from error
    return folder


def check_new_folder(path: str | Path, argument: str = "out") -> Path:
    """Makes sure that a folder can be written later on, and that nothing is in it but what a killed writer left.

    Args:
        path: The folder.
        argument: Its name in messages.

    Raises:
        OSError: As `check_folder_writable`, or there is something in it.
    """
    folder = check_folder_writable(path, argument)
    if folder.exists() and any(each.name != _PART for each in folder.iterdir()):
        raise FileExistsError(f"{argument}: {path} is there already and not an empty folder; name another one")
    return folder


def write_json(path: str | Path, plain: dict[str, Any], argument: str = "json") -> Path:
    """Writes JSON, replacing the file only when all of it is on disk.

    Raises:
        OSError: The file cannot be written; what was there before is still there.
    """
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    file = check_writable(path, argument)
    write_atomically(file, text.encode(), argument)
    return file


def write_atomically(path: Path, content: bytes, argument: str | None = None, *, private: bool = False) -> None:
    """Replaces a file's content as a whole, on disk when this returns.

    Args:
        path: The file.
        content: All of it.
        argument: What the user called the file, for messages.
        private: Only the user may read it.

    Raises:
        OSError: No space or no permission; what was at `path` is still there, and nothing new.
    """
    replace_atomically(path, lambda part: part.write_bytes(content), argument, private=private)


def replace_atomically(
    path: Path, write: Callable[[Path], object], argument: str | None = None, *, private: bool = False
) -> None:
    """`write_atomically` for a content that is not in memory as bytes.

    The content goes to a temporary file in the same folder, `.NAME.*.part`, which then takes the name. Folders that are
    missing are made. The file gets the permissions of any other new file of the user.

    Args:
        path: The file.
        write: Given the temporary file, writes the content to it.
        argument: What the user called the file, for messages.
        private: Only the user may read it.

    Raises:
        OSError: As `write_atomically`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise _explained(error, path, argument) from error
    part = Path(name)
    try:
        with _full_disks_as_os_errors():
            write(part)
        _sync(part)
        # mkstemp's files can be read by their owner only; not every `write` leaves that as it is.
        part.chmod(0o600 if private else 0o666 & ~_umask())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _explained(error, path, argument) from error
    finally:
        part.unlink(missing_ok=True)


def replace_folder(path: Path, write: Callable[[Path], object], argument: str | None = None) -> None:
    """`replace_atomically` for a folder with everything in it. Only one process may write it at a time.

    A folder cannot replace another in one step: for a moment, between two renames, there is none. The next writer puts
    the old one back where that moment was the last, and removes what else a killed writer left.

    Args:
        path: The folder.
        write: Given the empty folder `.NAME.part` next to it, writes the content into it.
        argument: What the user called the folder, for messages.

    Raises:
        OSError: No space or no permission; what was at `path` is still there.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    try:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        _write_part(part, write)
        if path.exists():
            path.rename(old)
        try:
            part.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _explained(error, path, argument) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fill_folder(path: Path, write: Callable[[Path], object], argument: str | None = None) -> None:
    """Writes files into a folder that is there, such as one that is mounted, or is made. Others in it stay.

    They are written to `.part` in it first and take their places when all are on disk, `config.json` last: without it a
    model's folder is none.

    Args:
        path: The folder.
        write: Given the empty folder `.part`, writes files into it.
        argument: What the user called the folder, for messages.

    Raises:
        OSError: No space or no permission; nothing new is in the folder.
    """
    part, is_new = path / _PART, not path.exists()
    try:
        shutil.rmtree(part, ignore_errors=True)
        _write_part(part, write)
        for file in sorted(part.iterdir(), key=lambda each: (each.name == "config.json", each.name)):
            file.replace(path / file.name)
        _sync_folder(path)
    except OSError as error:
        raise _explained(error, path, argument) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if is_new:
            # Goes only where it is empty.
            with contextlib.suppress(OSError):
                path.rmdir()


def _write_part(part: Path, write: Callable[[Path], object]) -> None:
    """Makes a folder and lets it be filled, on disk when this returns."""
    part.mkdir(parents=True)
    with _full_disks_as_os_errors():
        write(part)
    for file in part.rglob("*"):
        if file.is_file():
            _sync(file)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, private: bool = False) -> None:
    """Writes a safetensors file as `write_atomically` writes bytes. Tensors must be contiguous and share no memory.

    Raises:
        OSError: As `write_atomically`.
    """
    from safetensors.torch import save_file

    replace_atomically(path, lambda part: save_file(tensors, part, metadata=metadata), private=private)


@contextlib.contextmanager
def _full_disks_as_os_errors() -> Iterator[None]:
    """What safetensors and tokenizers raise when a file cannot be written, as the system's own error."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        # They give the system's reason as text only.
        found = _SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _explained(error: OSError, path: Path, argument: str | None) -> OSError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    name = "" if argument is None else f"{argument}: "
    kept = "what was there before is untouched; free some space or give another path"
    explained = OSError(f"{name}cannot write {path}: {reason}; {kept}")
    # Given to the constructor, it would stand in front of the message.
    explained.errno = error.errno
    return explained


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


def _sync_folder(folder: Path) -> None:
    """Makes a new name itself durable, where folders can be synced."""
    with contextlib.suppress(OSError):
        _sync(folder)
