"""Requests side by side are answered as each alone; they take turns, and owners share nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import dsa
from dsa.documents import SourceDocument
from dsa.documents.prompt import make_prompt
from dsa.generation import room
from dsa.generation.prompt import kept_tokens
from dsa.models.loading import LoadedModel
from dsa.serve import engine as engines
from dsa.serve.engine import Engine, Full, Limits, TooLong
from dsa.serve.job import Done, Ended, Event, Failed, Job, Piece, Reading, Request
from dsa.store import ModelStore

NEW = 12
PATIENCE_S = 60.0
PAGES = [
    f"Page {number} tells of the {word}. " * 12 for number, word in enumerate(("sea", "trees", "roads", "hills"), 1)
]
DOCUMENT = SourceDocument.of_pages("four.pdf", PAGES)


class Heard:
    """What a request was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, (Done, Failed)):
            self.ended.set()

    def wait(self) -> Heard:
        assert self.ended.wait(PATIENCE_S)
        return self

    def text(self, choice: int = 0) -> str:
        return "".join(each.text for each in self.events if isinstance(each, Piece) and each.choice == choice)

    def of(self, kind: type) -> list[Any]:
        return [each for each in self.events if isinstance(each, kind)]

    @property
    def done(self) -> Done:
        self.wait()
        assert isinstance(self.events[-1], Done), self.events[-1]
        return self.events[-1]


@pytest.fixture
def ask(loaded: LoadedModel) -> Callable[..., Request]:
    def made(question: str = "Which?", document: SourceDocument = DOCUMENT, **fields: Any) -> Request:
        prompt = make_prompt(loaded.tokenizer, document, question)
        fields = {"max_new_tokens": NEW, "document": document.name, "keep": kept_tokens(prompt), **fields}
        return Request(prompt, **fields)

    return made


def run(engine: Engine, request: Request) -> Heard:
    heard = Heard()
    engine.submit(request, heard)
    return heard.wait()


def expected(loaded: LoadedModel, question: str) -> Any:
    """What `dsa generate` answers."""
    return dsa.open(loaded.model, loaded.tokenizer, DOCUMENT).ask(question, max_new_tokens=NEW)


def test_side_by_side_as_alone(loaded: LoadedModel, engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    questions = [f"Which {number}?" for number in range(8)]
    answers = [expected(loaded, question) for question in questions]
    running = engine(chunk=64)
    heard = [Heard() for _ in questions]
    for question, each in zip(questions, heard, strict=True):
        # Each client reads for itself.
        running.submit(ask(question, owner=question), each)
    for answer, each in zip(answers, heard, strict=True):
        assert each.done.held == 0
        assert each.text() == answer.text
        assert each.of(Ended)[0].token_ids == tuple(answer.token_ids)
        assert each.of(Ended)[0].reason == "length"
        assert [reading.held for reading in each.of(Reading)][-1] == each.done.read


def test_the_second_question_reads_only_itself(
    loaded: LoadedModel, engine: Callable[..., Engine], ask: Callable[..., Request]
) -> None:
    answers = {question: expected(loaded, question).text for question in ("Which?", "Who?")}
    running = engine(chunk=64)
    first = run(running, ask("Which?"))
    second = run(running, ask("Who?"))
    assert second.done.read - second.done.held < 30
    assert {"Which?": first.text(), "Who?": second.text()} == answers
    # Another owner has nothing of it.
    assert run(running, ask("Who?", owner="other")).done.held == 0


def test_two_at_once_read_a_document_once(engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    running = engine(chunk=64)
    heard = [Heard(), Heard()]
    for question, each in zip(("Which?", "Who?"), heard, strict=True):
        running.submit(ask(question), each)
    first, second = (each.done for each in heard)
    assert first.held == 0
    assert second.held > 1000


def test_what_is_kept_outlives_the_engine_and_belongs_to_its_owner(
    engine: Callable[..., Engine], ask: Callable[..., Request], store: ModelStore
) -> None:
    first = run(engine(store=store, chunk=64), ask(owner="one"))
    again = engine(store=store, chunk=64)
    assert run(again, ask(owner="two")).done.held == 0
    assert run(again, ask()).done.held == 0
    warm = run(again, ask(owner="one"))
    assert warm.done.held > 1000
    assert warm.text() == first.text()
    assert len(store.store.entries()) == 3
    again.forget("one", DOCUMENT.name)
    deadline = time.monotonic() + PATIENCE_S
    while len(store.store.entries()) == 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(store.store.entries()) == 2
    assert run(again, ask(owner="one")).done.held == 0


def test_choices_stops_penalties_and_seeds(
    loaded: LoadedModel, engine: Callable[..., Engine], ask: Callable[..., Request]
) -> None:
    running = engine()
    plain = run(running, ask())
    whole = plain.text()
    # Found across tokens, and not told.
    stopped = run(running, ask(stop=("never there", whole[4:7])))
    assert stopped.text() == whole[: whole.index(whole[4:7])]
    assert stopped.of(Ended)[0].reason == "stop"
    # What only begins like a stop text is told after all.
    assert run(running, ask(stop=(whole[-1] + "\0",))).text() == whole
    several = run(running, ask(choices=3, temperature=1.5, seed=5))
    alone = [run(running, ask(temperature=1.5, seed=5 + number)).text() for number in range(3)]
    assert [several.text(number) for number in range(3)] == alone
    assert len(set(alone)) > 1
    assert several.done.written == 3 * NEW
    apart = run(running, ask(presence_penalty=2.0, frequency_penalty=2.0, max_new_tokens=40))
    counted = [apart.text().count(character) for character in set(apart.text())]
    repeated = run(running, ask(max_new_tokens=40)).text()
    assert max(counted) <= max(repeated.count(character) for character in set(repeated))
    assert apart.text() != repeated


def test_logprobs(engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    heard = run(engine(), ask(logprobs=3))
    told = [each for piece in heard.of(Piece) for each in piece.logprobs]
    assert [each.token for each in told] == list(heard.of(Ended)[0].token_ids)
    for each in told:
        assert each.logprob == pytest.approx(each.top[0][2])
        assert each.top[0][0] == each.token
        assert len(each.top) == 3
        assert each.top[0][2] >= each.top[1][2] >= each.top[2][2]


def test_sources_of_each_sentence(engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    heard = run(engine(), ask(sources=True, max_new_tokens=60))
    [ended] = heard.of(Ended)
    assert ended.sources[0].start == 0
    assert ended.sources[-1].end == len(heard.text())
    assert all(one.end == other.start for one, other in zip(ended.sources, ended.sources[1:]))
    passage = ended.sources[0].passages[0]
    assert " ".join(DOCUMENT.text[passage.start : passage.end].split()) == passage.text
    assert DOCUMENT.page_of(passage.start) == passage.page
    assert sum(page.share for page in ended.sources[0].pages) <= 1.001


def test_cancelling_stops_reading_and_writing(engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    running = engine(chunk=16)
    for kind in (Reading, Piece):
        heard = Heard()
        jobs: list[Job] = []
        begun = threading.Event()

        def listen(event: Event, kind: type = kind, heard: Heard = heard, begun: threading.Event = begun) -> None:
            heard(event)
            if isinstance(event, kind):
                begun.set()

        jobs.append(running.submit(ask(max_new_tokens=1000, owner=kind.__name__), listen))
        assert begun.wait(PATIENCE_S)
        jobs[0].cancel()
        told = len(heard.events)
        # The next one is answered, and nothing more is told to the first.
        run(running, ask(owner="next"))
        assert len(heard.events) <= told + 1
        assert running.figures()["running"] == 0
    # What was read before stays.
    assert run(running, ask(owner="Piece")).done.held > 1000


def test_clients_take_turns(engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    running = engine(limits=Limits(sessions=1))
    order: list[str] = []
    heard = []
    for number, client in enumerate(["many", "many", "many", "few"]):
        each = Heard()
        heard.append(each)

        def listen(event: Event, each: Heard = each, name: str = f"{client} {number}") -> None:
            if isinstance(event, Done):
                order.append(name)
            each(event)

        running.submit(ask(f"{number}?", client=client), listen)
    for each in heard:
        each.wait()
    assert order.index("few 3") <= 1


def test_the_line_is_bounded(engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    running = engine(limits=Limits(sessions=1, queue=2), chunk=16)
    request = ask(max_new_tokens=500)

    def submit_many() -> None:
        for _ in range(6):
            running.submit(request, Heard())

    with pytest.raises(Full) as full:
        submit_many()
    assert full.value.retry_s >= 1


def test_what_is_too_long_and_what_takes_too_long(
    engine: Callable[..., Engine], ask: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(limits=Limits(time_s=0.0))
    with pytest.raises(TooLong, match="4,096 tokens together"):
        running.submit(ask(max_new_tokens=4000), Heard())
    [failed] = run(running, ask()).of(Failed)
    assert failed.kind == "time"
    unlimited = engine()
    run(unlimited, ask())
    monkeypatch.setattr(room, "available_memory", lambda device: 1000)
    [failed] = run(unlimited, ask(owner="another")).of(Failed)
    assert failed.kind == "memory"
    assert unlimited.figures()["sessions"] == 0
    monkeypatch.undo()
    assert run(unlimited, ask()).done.written == NEW


def test_a_mistake_ends_one_request(
    loaded: LoadedModel,
    engine: Callable[..., Engine],
    ask: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = engine()
    with monkeypatch.context() as patch:
        patch.setattr(engines, "Writer", lambda *_: 1 / 0)
        [failed] = run(running, ask("a secret text")).of(Failed)
    assert failed.kind == "internal"
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text
    assert run(running, ask()).text() == expected(loaded, "Which?").text


def test_the_end_is_told(engine: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    running = engine(chunk=16)
    heard = Heard()
    running.submit(ask(max_new_tokens=2000), heard)
    running.close()
    assert [each.kind for each in heard.wait().of(Failed)] == ["stopped"]
    with pytest.raises(Full):
        running.submit(replace(ask(), max_new_tokens=1), Heard())
