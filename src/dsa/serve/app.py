"""The application: which path is answered by what."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, UploadFile
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.params import File as FileField
from fastapi.params import Form as FormField
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from dsa.models.loading import LoadedModel
from dsa.serve import schemas, stream
from dsa.serve.asking import Asking
from dsa.serve.chat import Chat, Completion, Form
from dsa.serve.door import Door, Rules
from dsa.serve.engine import Engine, Limits
from dsa.serve.errors import Refused, body
from dsa.serve.files import File, Files
from dsa.serve.inputs import Inputs
from dsa.serve.keys import Keys
from dsa.serve.metrics import Metrics
from dsa.serve.prompts import Prompts
from dsa.serve.responses import Response as OpenAIResponse
from dsa.store import ModelStore

PURPOSES = ("assistants", "user_data")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a server is run.

    Args:
        keys: The clients'; none lets everybody in who reaches the server.
        hosts: Names that a `Host` header may have, next to `localhost` and addresses in numbers.
        limits: What is taken on.
        most_upload: Bytes of one upload, and of any other body.
        most_files: Bytes of all uploads of one key.
    """

    keys: Keys = field(default_factory=Keys)
    hosts: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    most_upload: int = 64 << 20
    most_files: int = 1 << 30


def create_app(loaded: LoadedModel, *, store: ModelStore | None = None, options: Options | None = None) -> FastAPI:
    """An ASGI application that serves one model as OpenAI's API.

        app = create_app(load_model("default"))

    Its inference thread runs from here on until the application is shut down (ASGI's lifespan).

    Args:
        loaded: The model, attached, accelerated or plain, with its tokenizer. Nobody else may use it meanwhile.
        store: Where documents that were read are kept; uploads lie next to them. Without one, both end with the server.
        options: How it is run.
    """
    options = options or Options()
    engine = Engine(loaded, store=store, limits=options.limits)
    temporary = tempfile.TemporaryDirectory(prefix="dsa-files-") if store is None else None
    folder = Path(temporary.name) if store is None and temporary is not None else None
    files = Files(folder or store.store.folder / "files", options.most_files)  # type: ignore[union-attr]
    metrics = Metrics(engine)
    prompts = Prompts(loaded.tokenizer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(engine.close)
            if temporary is not None:
                temporary.cleanup()

    app = FastAPI(title="dsa", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_middleware(Door, rules=Rules(options.keys, options.hosts, 2 * options.most_upload), metrics=metrics)
    app.add_exception_handler(HTTPException, _error)
    app.add_exception_handler(RequestValidationError, _invalid)
    name = Path(loaded.name).resolve().name if Path(loaded.name).is_dir() else loaded.name
    app.state.engine, app.state.name = engine, name
    _add_answers(app, name, Inputs(engine, prompts, files), Asking(engine, prompts, metrics))
    _add_files(app, files, engine, options.most_upload)
    _add_others(app, name, engine, metrics)
    return app


def _add_answers(app: FastAPI, name: str, inputs: Inputs, asking: Asking) -> None:
    async def answer(form: Form, request: Any, given: schemas.Writing, http: HttpRequest) -> Response:
        answering = asking.submit(request, http)
        if not given.stream:
            return JSONResponse(form.whole(await answering.collected()))
        with_usage = given.stream_options is not None and given.stream_options.include_usage
        parts = stream.with_errors(form.parts(answering, with_usage=with_usage))
        return stream.EventStream(parts, answering.job.cancel)

    @app.post("/v1/chat/completions")
    async def chat(given: schemas.ChatRequest, http: HttpRequest) -> Response:
        _check_model(given.model, name)
        if given.top_logprobs is not None and not given.logprobs:
            raise Refused("top_logprobs: expected `logprobs: true` with it", "top_logprobs")
        asked = await inputs.conversation(given.messages, http)
        grammar = await inputs.grammar(given.response_format)
        logprobs = (given.top_logprobs or 0) if given.logprobs else None
        new = given.max_tokens if given.max_completion_tokens is None else given.max_completion_tokens
        request = inputs.request(asked, given, new, http, logprobs=logprobs, grammar=grammar)
        return await answer(Chat(given.model, logprobs, asked.skipped), request, given, http)

    @app.post("/v1/completions")
    async def completions(given: schemas.CompletionRequest, http: HttpRequest) -> Response:
        _check_model(given.model, name)
        asked = await inputs.completion(given.prompt)
        # OpenAI's default.
        new = 16 if given.max_tokens is None else given.max_tokens
        request = inputs.request(asked, given, new, http, logprobs=given.logprobs)
        return await answer(Completion(given.model, given.logprobs), request, given, http)

    @app.post("/v1/responses")
    async def responses(given: schemas.ResponseRequest, http: HttpRequest) -> Response:
        _check_model(given.model, name)
        messages: list[Any] = []
        if given.instructions is not None:
            messages.append(schemas.SystemMessage(role="system", content=given.instructions))
        if isinstance(given.input, str):
            messages.append(schemas.UserMessage(role="user", content=given.input))
        else:
            messages += given.input
        asked = await inputs.conversation(messages, http)
        grammar = await inputs.grammar(None if given.text is None else given.text.format)
        request = inputs.request(asked, given, given.max_output_tokens, http, grammar=grammar)
        answering = asking.submit(request, http)
        response = OpenAIResponse(given, asked.skipped)
        if not given.stream:
            return JSONResponse(response.whole(await answering.collected()))
        return stream.EventStream(stream.with_errors(response.parts(answering), "error"), answering.job.cancel)

    @app.post("/tokenize")
    async def tokenize(given: schemas.TokenizeRequest, http: HttpRequest) -> dict[str, Any]:
        if (given.prompt is None) == (given.messages is None):
            raise Refused("expected either prompt or messages", "prompt")
        if given.prompt is not None:
            asked = await inputs.completion(given.prompt)
        else:
            asked = await inputs.conversation(given.messages or (), http)
        ids = asked.prompt.ids
        return {"count": len(ids), "max_model_len": inputs.engine.positions, "tokens": ids}


def _add_files(app: FastAPI, files: Files, engine: Engine, most: int) -> None:
    def plain(file: File) -> dict[str, Any]:
        fields = {"id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created_at}
        return {**fields, "filename": file.filename, "purpose": file.purpose, "status": "processed"}

    @app.post("/v1/files")
    async def upload(
        http: HttpRequest, file: Annotated[UploadFile, FileField()], purpose: Annotated[str, FormField()] = "user_data"
    ) -> dict[str, Any]:
        unknown = sorted({*(await http.form())} - {"file", "purpose"})
        if unknown:
            raise Refused(f"{unknown[0][:50]}: this server has no such field; leave it out", unknown[0][:50])
        if purpose not in PURPOSES:
            raise Refused(f"purpose: expected one of {', '.join(PURPOSES)}, got {purpose[:50]!r}", "purpose")
        raw = await file.read(most + 1)
        if len(raw) > most:
            raise Refused(
                f"file: it is larger than {most >> 20:,} MB, which is the most that is taken", "file", status=413
            )
        return plain(await run_in_threadpool(files.add, http.state.owner, raw, file.filename or "document", purpose))

    @app.get("/v1/files")
    async def listed(http: HttpRequest) -> dict[str, Any]:
        found = await run_in_threadpool(files.all, http.state.owner)
        return {"object": "list", "data": [plain(each) for each in found], "has_more": False}

    @app.get("/v1/files/{file_id}")
    async def about(file_id: str, http: HttpRequest) -> dict[str, Any]:
        return plain(await run_in_threadpool(files.get, http.state.owner, file_id))

    @app.get("/v1/files/{file_id}/content")
    async def content(file_id: str, http: HttpRequest) -> Response:
        raw = await run_in_threadpool(files.content, http.state.owner, file_id)
        return Response(raw, media_type="application/octet-stream", headers={"content-disposition": "attachment"})

    @app.delete("/v1/files/{file_id}")
    async def remove(file_id: str, http: HttpRequest) -> dict[str, Any]:
        file = await run_in_threadpool(files.remove, http.state.owner, file_id)
        engine.forget(http.state.owner, file.document)
        return {"id": file_id, "object": "file", "deleted": True}


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise Refused(f"model: this server has {name!r} only", "model", status=404, code="model_not_found")


def _add_others(app: FastAPI, name: str, engine: Engine, metrics: Metrics) -> None:
    model = {"id": name, "object": "model", "created": 0, "owned_by": "dsa", "max_model_len": engine.positions}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        _check_model(asked, name)
        return model

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


async def _error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, Refused):
        words = {404: "there is no such path", 405: "this path does not take this method"}
        message = words.get(error.status_code, str(error.detail))
        error = Refused(message, status=error.status_code, headers=error.headers)
    return JSONResponse(body(error), error.status_code, error.headers)


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(each) for each in first["loc"] if each != "body"]
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        message = f"{name}: this server has no such field, and does not ignore what it does not know; leave it out"
    elif first["type"] == "json_invalid":
        name, message = "", "the body is not JSON"
    else:
        message = f"{name or 'body'}: {first['msg']}"
    return JSONResponse(body(Refused(message, name or None)), 400)


__all__ = ["Options", "create_app"]
