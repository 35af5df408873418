"""What requests of all kinds say, as the engine takes it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool

from dsa.documents import SourceDocument
from dsa.serve import schemas
from dsa.serve.engine import Engine
from dsa.serve.errors import Refused
from dsa.serve.files import Files, parsed
from dsa.serve.grammar import ANY_OBJECT
from dsa.serve.job import Request
from dsa.serve.prompts import Asked, Message, Prompts

NEW_TOKENS = 1024
"""Tokens of an answer at most, where the client does not say."""

REMEMBERED = 8
"""Documents inside of messages that need not be parsed again with the next message."""

_DATA_URL = re.compile(r"data:[^;,]*;base64,")


class Inputs:
    """Makes prompts and requests of what clients send."""

    def __init__(self, engine: Engine, prompts: Prompts, files: Files) -> None:
        self.engine, self.prompts, self.files = engine, prompts, files
        self._parsed: dict[tuple[str, str, bytes], SourceDocument] = {}

    async def conversation(self, messages: Sequence[Any], http: HttpRequest) -> Asked:
        """The prompt of a conversation, its document first.

        Args:
            messages: Of `dsa.serve.schemas`.
            http: Whose request it is.

        Raises:
            Refused: No template takes it, or its file cannot be read.
        """
        owner = http.state.owner
        said = []
        found: list[schemas.FileOf] = []
        for each in messages:
            role = "system" if each.role == "developer" else each.role
            parts = [each.content] if isinstance(each.content, str) else each.content
            texts = [part if isinstance(part, str) else part.text for part in parts if not _is_file(part)]
            attached = [_file_of(part) for part in parts if _is_file(part)]
            found += attached
            if role != "user" and attached:
                raise Refused("messages: only the user's can have a file", "messages")
            said.append(Message(role, "\n\n".join(texts)))
        distinct = list({each.model_dump_json(exclude={"filename"}): each for each in found}.values())
        if len(distinct) > 1:
            raise Refused(
                f"messages: one file a conversation is read, got {len(distinct)}; put them into one, or ask about each",
                "messages",
            )
        document = await run_in_threadpool(self._document, distinct[0], owner) if distinct else None
        if document is not None and not any(each.text.strip() for each in said if each.role == "user"):
            raise Refused("messages: there is a file and no question; add a text", "messages")
        return await run_in_threadpool(self.prompts.chat, said, document, owner)

    async def completion(self, prompt: str | list[Any]) -> Asked:
        """The prompt of a text, or of token ids. Raises `Refused`."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return await run_in_threadpool(self.prompts.plain, prompt)
        return self.prompts.ids(prompt)

    async def grammar(self, form: Any) -> str | None:
        """What an answer is kept within, of a format of `dsa.serve.schemas`. Raises `Refused` for what is no schema."""
        if form is None or isinstance(form, schemas.PlainFormat):
            return None
        schema = ANY_OBJECT
        if isinstance(form, schemas.SchemaFormat):
            schema = form.json_schema.schema_
        elif isinstance(form, schemas.FlatSchemaFormat):
            schema = form.schema_
        try:
            return await run_in_threadpool(self.engine.grammars.of_schema, schema)
        except ValueError as error:
            raise Refused(f"response_format: {error}", "response_format") from error

    def request(self, asked: Asked, given: Any, new: int | None, http: HttpRequest, **more: Any) -> Request:
        """What the engine is to do.

        Args:
            asked: The prompt.
            given: A `Writing` of `dsa.serve.schemas`, or another request with the same fields.
            new: Tokens of the answer at most, as the client said.
            http: Whose request it is.
            **more: Further fields of `Request`.
        """
        if new is None:
            positions = self.engine.positions
            left = NEW_TOKENS if positions is None else positions - len(asked.prompt.ids)
            new = max(1, min(NEW_TOKENS, left))
        stop = getattr(given, "stop", None) or ()
        return Request(
            prompt=asked.prompt,
            owner=http.state.owner,
            client=http.state.client,
            document=asked.document,
            keep=asked.keep,
            max_new_tokens=new,
            choices=getattr(given, "n", None) or 1,
            temperature=1.0 if given.temperature is None else given.temperature,
            top_p=1.0 if given.top_p is None else given.top_p,
            seed=getattr(given, "seed", None),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            presence_penalty=getattr(given, "presence_penalty", None) or 0.0,
            frequency_penalty=getattr(given, "frequency_penalty", None) or 0.0,
            sources=given.dsa is not None and given.dsa.sources,
            **more,
        )

    def _document(self, file: schemas.FileOf, owner: str) -> SourceDocument:
        if (file.file_id is None) == (file.file_data is None):
            raise Refused("file: expected either file_id or file_data", "messages")
        if file.file_id is not None:
            return self.files.document(owner, file.file_id)
        assert file.file_data is not None
        encoded = file.file_data
        head = _DATA_URL.match(encoded[:200])
        try:
            raw = base64.b64decode(encoded[head.end() if head else 0 :], validate=True)
        except (binascii.Error, ValueError):
            raise Refused(
                "file_data: expected base64, with or without `data:...;base64,` before it", "messages"
            ) from None
        name = file.filename or "document"
        key = owner, name, hashlib.sha256(raw).digest()
        found = self._parsed.get(key) or parsed(raw, name)
        self._parsed[key] = found
        if len(self._parsed) > REMEMBERED:
            self._parsed.pop(next(iter(self._parsed)), None)
        return found


def _is_file(part: Any) -> bool:
    return isinstance(part, (schemas.FilePart, schemas.InputFile))


def _file_of(part: Any) -> schemas.FileOf:
    found = part.file if isinstance(part, schemas.FilePart) else part
    assert isinstance(found, schemas.FileOf)
    return found
