"""The API through OpenAI's own client: answers are those of `dsa generate`, mistakes are said in OpenAI's shape."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2 as httpx
import openai
import pytest
import uvicorn
from openai import OpenAI
from pydantic import BaseModel, Field

import dsa
from dsa.models.loading import LoadedModel
from dsa.serve import create_app
from dsa.serve.app import Options
from dsa.serve.engine import Limits
from dsa.serve.keys import Keys
from dsa.store import ModelStore, Store

NEW = 12
KEYS = ("first-key-of-sixteen", "second-key-of-sixteen")
TEXT = "\n\n".join(
    f"Part {number} tells of the {word}. " * 16 for number, word in enumerate(("sea", "trees", "roads"), 1)
)
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_completion_tokens": NEW}


class Serving(uvicorn.Server):
    """A server in a thread, as it is in a process."""

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))
        self.app = app
        self._thread = threading.Thread(target=self.run)

    def __enter__(self) -> Serving:
        self._thread.start()
        while not self.started:
            time.sleep(0.01)
        self.address = f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        self.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def server(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    kept = ModelStore(Store(tmp_path_factory.mktemp("store")), loaded.model, "tiny")
    options = Options(keys=Keys(KEYS), limits=Limits(sessions=8), most_upload=1 << 20, most_files=2 << 20)
    with Serving(create_app(loaded, store=kept, options=options)) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(server: Serving) -> OpenAI:
    return OpenAI(base_url=f"{server.address}/v1", api_key=KEYS[0], max_retries=0)


@pytest.fixture(scope="module")
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=60) as made:
        yield made


def expected(loaded: LoadedModel, question: str, text: str = TEXT) -> str:
    """What `dsa generate --file --ask` answers."""
    return dsa.open(loaded.model, loaded.tokenizer, text).ask(question, max_new_tokens=NEW).text


def about(file: str, question: str) -> list[Any]:
    parts = [{"type": "file", "file": {"file_id": file}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_answers_are_those_of_the_command(loaded: LoadedModel, client: OpenAI) -> None:
    questions = [f"Which {number}?" for number in range(8)]
    text = TEXT.replace("sea", "shore")
    answers = [expected(loaded, question, text) for question in questions]
    file = client.files.create(file=("part.txt", text.encode()), purpose="user_data")
    cold = client.chat.completions.create(messages=about(file.id, questions[0]), **GREEDY)
    assert cold.choices[0].message.content == answers[0]
    assert cold.choices[0].finish_reason == "length"
    assert cold.usage is not None
    assert cold.usage.prompt_tokens_details is not None
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert cold.usage.completion_tokens == NEW

    def one(question: str) -> str:
        made = client.chat.completions.create(messages=about(file.id, question), **GREEDY)
        assert made.usage is not None
        assert made.usage.prompt_tokens_details is not None
        assert made.usage.prompt_tokens_details.cached_tokens > 1000
        return made.choices[0].message.content or ""

    def streamed(question: str) -> str:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(messages=about(file.id, question), **GREEDY, **options))
        assert chunks[-1].usage.completion_tokens == NEW
        assert chunks[-1].choices == []
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "length"
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])

    assert [one(question) for question in questions[:2]] == answers[:2]
    assert [streamed(question) for question in questions[:2]] == answers[:2]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, questions)) == answers
        assert list(pool.map(streamed, questions)) == answers
    # The same document inside of the message.
    data = "data:text/plain;base64," + base64.b64encode(text.encode()).decode()
    parts = [{"type": "text", "text": questions[1]}, {"type": "file", "file": {"file_data": data, "filename": "a.txt"}}]
    inline = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **GREEDY)  # type: ignore
    assert inline.choices[0].message.content == answers[1]
    # Another key knows neither the file nor what was read of it.
    other = client.with_options(api_key=KEYS[1])
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.create(messages=about(file.id, "Which?"), **GREEDY)
    theirs = other.files.create(file=("part.txt", text.encode()), purpose="user_data")
    made = other.chat.completions.create(messages=about(theirs.id, questions[0]), **GREEDY)
    assert made.usage.prompt_tokens_details.cached_tokens == 0
    assert made.choices[0].message.content == answers[0]


def test_a_conversation_reads_only_what_is_new(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Say it."}, {"role": "user", "content": "Tell me more. " * 20}]
    for turn in range(3):
        made = client.chat.completions.create(messages=messages, **GREEDY)
        assert made.usage.prompt_tokens - made.usage.prompt_tokens_details.cached_tokens < (400 if turn == 0 else 40)
        messages.append({"role": "assistant", "content": made.choices[0].message.content})
        messages.append({"role": "user", "content": f"And {turn}?"})


def test_sources_and_comments_while_reading(http: httpx.Client, client: OpenAI) -> None:
    text = TEXT.replace("sea", "lake")
    file = client.files.create(file=("lake.md", text.encode()), purpose="assistants")
    asked = {**GREEDY, "messages": about(file.id, "Which?"), "stream": True, "dsa": {"sources": True}}
    with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    read = [re.fullmatch(r": read (\d+) of (\d+)", line) for line in lines if line.startswith(":")]
    assert len(read) > 1
    assert read[-1][1] == read[-1][2]
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))["choices"][0]
    [sentence, *_] = last["dsa"]["sources"]
    passage = sentence["passages"][0]
    assert " ".join(text[passage["start"] : passage["end"]].split()) == passage["text"]


def test_completions_and_logprobs(loaded: LoadedModel, client: OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="The sea", temperature=0, max_tokens=NEW, logprobs=2)
    by_ids = client.completions.create(
        model="tiny", prompt=loaded.tokenizer("The sea")["input_ids"], temperature=0, max_tokens=NEW
    )
    assert by_ids.choices[0].text == made.choices[0].text
    assert made.choices[0].logprobs is not None
    assert len(made.choices[0].logprobs.tokens) == NEW
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hello"}], n=2, logprobs=True, top_logprobs=2, **GREEDY
    )
    assert len(chat.choices) == 2
    assert chat.choices[0].message.content == chat.choices[1].message.content
    told = chat.choices[0].logprobs.content
    assert len(told) == NEW
    assert len(told[0].top_logprobs) == 2
    stopped = client.completions.create(
        model="tiny", prompt="The sea", temperature=0, max_tokens=NEW, stop=made.choices[0].text[3:5]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert len(stopped.choices[0].text) <= 3


def test_responses(loaded: LoadedModel, client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": NEW}
    file = client.files.create(file=("part.txt", TEXT.encode()), purpose="user_data")
    content = [{"type": "input_file", "file_id": file.id}, {"type": "input_text", "text": "Which 0?"}]
    made = client.responses.create(input=[{"role": "user", "content": content}], **options)
    assert made.output_text == expected(loaded, "Which 0?")
    assert made.status == "incomplete"
    assert made.usage.output_tokens == NEW
    whole = client.responses.create(input="Hello", instructions="Say it.", **options)
    events = list(client.responses.create(input="Hello", instructions="Say it.", stream=True, **options))
    assert [event.type for event in events][:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_files(client: OpenAI, server: Serving) -> None:
    file = client.files.create(file=("../../etc/passwd.txt", b"Some text of it."), purpose="user_data")
    assert file.filename == "passwd.txt"
    assert file.id in [each.id for each in client.files.list()]
    assert client.files.retrieve(file.id).bytes == 16
    assert client.files.content(file.id).read() == b"Some text of it."
    other = client.with_options(api_key=KEYS[1])
    assert file.id not in [each.id for each in other.files.list()]
    for name in (file.id, "file-0", "x%2f..%2f" + file.id):
        with pytest.raises(openai.NotFoundError):
            other.files.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        other.files.delete(file.id)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_other_paths(http: httpx.Client, client: OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert http.post("/tokenize", json={"prompt": "sea"}).json()["count"] == 3
    messages: list[Any] = [{"role": "user", "content": "sea"}]
    assert http.post("/tokenize", json={"messages": messages}).json()["count"] == len("<user>sea\n<assistant>")
    assert http.get("/health", headers={"authorization": ""}).json() == {"status": "ok"}
    client.chat.completions.create(messages=messages, **GREEDY)
    figures = http.get("/metrics").text
    assert 'dsa_tokens_total{what="written"}' in figures
    assert 'dsa_requests_total{path="/v1/chat/completions",status="200"}' in figures
    answer = http.get("/health", headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "http://else"}).headers


class Person(BaseModel):
    name: Annotated[str, Field(max_length=10)]
    age: Annotated[int, Field(ge=0, le=150)]
    kind: Literal["clerk", "cook"]


def test_answers_in_a_format(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Who?"}]
    options: dict[str, Any] = {**GREEDY, "max_completion_tokens": 300}
    made = client.chat.completions.parse(messages=messages, response_format=Person, **options)
    assert isinstance(made.choices[0].message.parsed, Person)
    assert made.choices[0].finish_reason == "stop"
    sampled = client.chat.completions.parse(messages=messages, response_format=Person, n=2, seed=1, **options)
    assert all(isinstance(choice.message.parsed, Person) for choice in sampled.choices)
    response = client.responses.parse(
        model="tiny", input="Who?", text_format=Person, temperature=0, max_output_tokens=300
    )
    assert response.output_parsed == made.choices[0].message.parsed
    # Nothing of it is left for the next answer.
    free = client.chat.completions.create(messages=messages, **GREEDY)
    begun = client.chat.completions.create(messages=messages, response_format={"type": "json_object"}, **GREEDY)
    assert begun.choices[0].message.content.startswith("{")
    assert not free.choices[0].message.content.startswith("{")


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "expected"),
    [
        ("chat/completions", {**HELLO, "model": "gpt"}, 404, "this server has 'tiny' only"),
        ("chat/completions", {**HELLO, "mood": 1}, 400, "mood: this server has no such field"),
        ("chat/completions", {**HELLO, "tools": [{"type": "function"}]}, 400, "tools: "),
        ("chat/completions", {**HELLO, "response_format": {"type": "xml"}}, 400, "response_format"),
        ("chat/completions", {**HELLO, "response_format": schema_of({"type": "thing"})}, 400, "response_format: "),
        ("chat/completions", {**HELLO, "response_format": schema_of({"not": {}, "if": 5})}, 400, "response_format: "),
        ("chat/completions", {**HELLO, "temperature": 9}, 400, "temperature: "),
        ("chat/completions", {**HELLO, "temperature": "hot"}, 400, "temperature: "),
        ("chat/completions", {**HELLO, "max_tokens": 0}, 400, "max_tokens: "),
        ("chat/completions", {**HELLO, "max_tokens": 10**6}, 400, "4,096 tokens together"),
        ("chat/completions", {**HELLO, "n": 99}, 400, "n: "),
        ("chat/completions", {**HELLO, "stop": ""}, 400, "stop"),
        ("chat/completions", {**HELLO, "top_logprobs": 3}, 400, "logprobs: true"),
        ("chat/completions", {**HELLO, "logit_bias": {"5": 1}}, 400, "logit_bias: "),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages: "),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "cook", "content": "a"}]}, 400, "messages.0"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a\0"}]}, 400, "binary"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]}, 400, "user's"),
        ("chat/completions", [1], 400, "body: "),
        ("chat/completions", {**HELLO, "messages": about("file-0", "a")}, 404, "no such file"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "expected a text"),
        ("completions", {"model": "tiny", "prompt": ["a", "b"]}, 400, "prompt"),
        ("completions", {"model": "tiny", "prompt": [10**9]}, 400, "ids of tokens"),
        ("completions", {"model": "tiny", "prompt": "a", "echo": True}, 400, "echo: "),
        ("responses", {"model": "tiny", "input": "a", "previous_response_id": "b"}, 400, "previous_response_id: "),
        ("responses", {"model": "tiny", "input": "a", "store": True}, 400, "store: "),
    ],
)
def test_mistakes(http: httpx.Client, path: str, body: Any, status: int, expected: str) -> None:
    answer = http.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert expected in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_bodies_that_are_no_json_and_paths_that_are_none(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the body is not JSON")
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.post("/v1/chat/completions", content=b"\xff\xfe").status_code == 400
    deep = b"[" * 200_000
    assert http.post("/v1/completions", content=deep, headers={"content-type": "application/json"}).status_code == 400


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pdf", b"%PDF-1.7 nothing", "the PDF the file"),
        ("a.pdf", b"plain words", "is called PDF"),
        ("a.txt", b"a\0b", "binary"),
        ("a.zip", b"PK\x03\x04", "zip archive"),
        ("a.html", b"<html><script>alert(1)</script></html>", "no visible text"),
        ("a.txt", b"", "is empty"),
    ],
)
def test_uploads_that_cannot_be_read(http: httpx.Client, name: str, content: bytes, expected: str) -> None:
    answer = http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "user_data"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert expected in message
    assert "/tmp" not in message


def test_uploads_are_bounded(http: httpx.Client) -> None:
    answer = http.post("/v1/files", files={"file": ("a.txt", b"a" * (1 << 20) + b"b")}, data={"purpose": "user_data"})
    assert answer.status_code == 413
    # Told by its length, before it is sent.
    answer = http.post("/v1/files", content=b"a" * (3 << 20))
    assert answer.status_code == 413
    form = {"content-type": "multipart/form-data; boundary=x"}
    begins = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    chunks = iter([begins, *[b"a" * (1 << 20)] * 3])
    assert http.post("/v1/files", content=chunks, headers=form).status_code == 413
    answer = http.post("/v1/files", files={"file": ("a.txt", b"word")}, data={"purpose": "batch"})
    assert "purpose: expected one of" in answer.json()["error"]["message"]
    assert http.post("/v1/files", data={"purpose": "user_data"}).status_code == 400
    answer = http.post("/v1/files", files={"file": ("a.txt", b"word")}, data={"expires_after": "1"})
    assert answer.json()["error"]["message"].startswith("expires_after: this server has no such field")
    assert http.get("/v1/files?limit=1").json()["error"]["message"].startswith("query: ")


def test_keys_and_hosts(http: httpx.Client, server: Serving) -> None:
    for given in ("", "Bearer", "Bearer wrong", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x"):
        answer = http.get("/v1/models", headers={"authorization": given})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert http.get("/v1/models", headers={"host": f"localhost:{server.address.rpartition(':')[2]}"}).status_code == 200
    for key in ("short", "with a space in it somewhere"):
        with pytest.raises(ValueError, match="api-key-file: expected keys of at least 16"):
            Keys([key])


def test_a_client_that_goes_stops_its_work(http: httpx.Client, server: Serving) -> None:
    engine = server.app.state.engine
    long = {**HELLO, "max_tokens": 3000, "temperature": 0}
    with http.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert engine.figures()["running"] == 1
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=long, timeout=0.3)
    deadline = time.monotonic() + 30
    while engine.figures()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.figures()["running"] == 0


def test_mixed_requests_of_many_clients(loaded: LoadedModel, http: httpx.Client, client: OpenAI) -> None:
    """A tenth is malformed, a tenth is cut off: the others are answered as ever, and nothing is a mistake of ours."""
    questions = [f"Which {number}?" for number in range(3)]
    answers = [expected(loaded, question) for question in questions]
    file = client.files.create(file=("mixed.txt", TEXT.encode()), purpose="user_data")

    def one(number: int) -> tuple[int, bool]:
        question = number % 3
        asked = {**GREEDY, "messages": about(file.id, questions[question])}
        if number % 10 == 3:
            return http.post("/v1/chat/completions", json={**asked, "stop": 5}).status_code, True
        if number % 10 == 7:
            with http.stream("POST", "/v1/chat/completions", json={**asked, "max_tokens": 500, "stream": True}) as cut:
                return cut.status_code, True
        if number % 2:
            made = http.post("/v1/chat/completions", json=asked)
            return made.status_code, made.json()["choices"][0]["message"]["content"] == answers[question]
        with http.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as streamed:
            lines = [json.loads(line[6:]) for line in streamed.iter_lines() if line.startswith("data: {")]
        said = "".join(line["choices"][0]["delta"].get("content", "") for line in lines)
        return streamed.status_code, said == answers[question]

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(one, range(60)))
    assert [status for status, _ in found] == [400 if number % 10 == 3 else 200 for number in range(60)]
    assert all(right for _, right in found)


def test_too_many_wait(loaded: LoadedModel, tmp_path: Path) -> None:
    options = Options(limits=Limits(sessions=1, queue=1))
    with Serving(create_app(loaded, options=options)) as serving, httpx.Client(base_url=serving.address) as http:
        long = {**HELLO, "max_tokens": 3000, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=long) as one:
            lines = one.iter_lines()
            next(lines)
            with http.stream("POST", "/v1/chat/completions", json=long):
                answer = http.post("/v1/chat/completions", json=long)
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
