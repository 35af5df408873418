"""Files that clients upload: a folder for each owner, a folder for each file, named by us alone.

OWNER/ID/content         the bytes as they came
OWNER/ID/document.json   its text and pages
OWNER/ID/about.json      name, size, time; written last, so that half an upload is none
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dsa.documents import SourceDocument
from dsa.runs.files import write_atomically
from dsa.serve.errors import Refused
from dsa.serve.parsing import from_plain, parse, shown_name, to_plain

MOST_FILES = 1000
"""Of one owner."""

_ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True)
class File:
    """What was uploaded.

    Args:
        id: Ours.
        filename: As it is shown.
        bytes: Of the content.
        created_at: Seconds since 1970.
        purpose: As the client said.
    """

    id: str
    filename: str
    bytes: int
    created_at: int
    purpose: str

    @property
    def document(self) -> str:
        """What its document is called in the store."""
        return f"{self.filename} ({self.id})"


class Files:
    """See the module. Any thread may call it."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """
        Args:
            folder: Where; made when something is uploaded.
            most_bytes: Of all of an owner's files together.
        """
        self.folder, self.most_bytes = folder, most_bytes

    def add(self, owner: str, raw: bytes, filename: str, purpose: str) -> File:
        """Keeps a file after it was read.

        Raises:
            Refused: It cannot be read, or the owner has no room for it.
            OSError: It cannot be written.
        """
        held = self.all(owner)
        if len(held) >= MOST_FILES or sum(file.bytes for file in held) + len(raw) > self.most_bytes:
            raise Refused(
                f"file: there is room for {MOST_FILES:,} files and {self.most_bytes >> 20:,} MB in all; delete some",
                "file",
                status=413,
            )
        document = parsed(raw, filename)
        file = File(f"file-{secrets.token_hex(12)}", shown_name(filename), len(raw), int(time.time()), purpose)
        folder = self._folder(owner) / file.id
        for each in (self.folder, folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True, parents=each is self.folder)
        write_atomically(folder / "content", raw, private=True)
        write_atomically(folder / "document.json", json.dumps(to_plain(document)).encode(), private=True)
        write_atomically(folder / "about.json", json.dumps(asdict(file)).encode(), private=True)
        return file

    def all(self, owner: str) -> list[File]:
        """The owner's files, the newest first."""
        folder = self._folder(owner)
        found = [self._about(each) for each in folder.iterdir()] if folder.is_dir() else []
        return sorted((file for file in found if file is not None), key=lambda file: -file.created_at)

    def get(self, owner: str, name: str) -> File:
        """The owner's file. Raises `Refused` where there is none of that name."""
        # Nothing else becomes a path.
        found = self._about(self._folder(owner) / name) if _ID.fullmatch(name) else None
        if found is None:
            raise Refused("file_id: there is no such file", "file_id", status=404)
        return found

    def content(self, owner: str, name: str) -> bytes:
        """The bytes as they came. Raises `Refused` as `get`."""
        return (self._folder(owner) / self.get(owner, name).id / "content").read_bytes()

    def document(self, owner: str, name: str) -> SourceDocument:
        """Its text and pages. Raises `Refused` as `get`."""
        file = self.get(owner, name)
        plain = json.loads((self._folder(owner) / file.id / "document.json").read_text(encoding="utf-8"))
        return from_plain(plain, file.document)

    def remove(self, owner: str, name: str) -> File:
        """Removes a file. Raises `Refused` as `get`."""
        file = self.get(owner, name)
        folder = self._folder(owner) / file.id
        (folder / "about.json").unlink()
        shutil.rmtree(folder, ignore_errors=True)
        return file

    def _folder(self, owner: str) -> Path:
        return self.folder / (owner or "local")

    def _about(self, folder: Path) -> File | None:
        try:
            return File(**json.loads((folder / "about.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def parsed(raw: bytes, filename: str) -> SourceDocument:
    """A document out of a client's bytes. Raises `Refused` where it cannot be read."""
    try:
        return parse(raw, filename)
    except ValueError as error:
        raise Refused(str(error), "file") from error
