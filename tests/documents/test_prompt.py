"""The prompt out of a document and a question: which token stands where."""

import pytest

from dsa.documents import SourceDocument
from dsa.documents.prompt import Turn, make_conversation, make_prompt
from dsa.testing.tiny_tokenizer import tiny_tokenizer

PAGES = ("  One page.", "", "The third.")
TEMPLATE = "{% for turn in messages %}<bos>{{ turn.role }}: {{ turn.content }}<eos>{% endfor %}A:"


@pytest.fixture
def document() -> SourceDocument:
    return SourceDocument.of_pages("a.pdf", PAGES)


def with_template(template: str = TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("chat", [None, False])
def test_a_question_without_a_template(document: SourceDocument, chat: bool | None) -> None:
    prompt = make_prompt(tiny_tokenizer(), document, " Why? ", chat=chat)
    assert "".join(prompt.texts) == "  One page.\n\nThe third.\n\nQuestion: Why?\nAnswer:"
    asked = [text for text, part in zip(prompt.texts, prompt.parts, strict=True) if part == "question"]
    assert "".join(asked).strip() == "Question: Why?\nAnswer:"


def test_a_question_takes_the_template(document: SourceDocument) -> None:
    prompt = make_prompt(with_template(), document, "Why?")
    assert "".join(prompt.texts) == "<bos>user: One page.\n\nThe third.\n\nWhy?<eos>A:"
    assert prompt.ids.count(1) == prompt.ids.count(2) == 1
    assert prompt.parts[0] == "before"


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), with_template()], ids=["plain", "template"])
def test_pages_of_tokens(document: SourceDocument, tokenizer: object) -> None:
    prompt = make_prompt(tokenizer, document, "Why?")
    for number, text in ((1, "One page."), (3, "The third.")):
        found = [each for each, page in zip(prompt.texts, prompt.pages, strict=True) if page == number]
        assert "".join(found).strip() == text
    outside = {page for page, part in zip(prompt.pages, prompt.parts, strict=True) if part != "document"}
    assert outside == {None}


def test_a_cut_document(document: SourceDocument) -> None:
    prompt = make_prompt(tiny_tokenizer(), document, "Why?", tokens=5)
    assert "".join(prompt.texts).startswith("  One\n\nQuestion:")
    assert (prompt.is_cut, prompt.document_tokens) == (True, len(document.text))
    assert not make_prompt(tiny_tokenizer(), document, tokens=len(document.text)).is_cut


def test_what_follows_and_how_the_answer_begins(document: SourceDocument) -> None:
    followed = make_prompt(tiny_tokenizer(), document, follow=" So, ")
    assert "".join(followed.texts) == document.text + " So, "
    followed = make_prompt(with_template(), document, follow=" So, ", chat=True)
    assert "".join(followed.texts).endswith("The third.\n\n So, <eos>A:")
    begun = make_prompt(tiny_tokenizer(), document, "Why?", begin="Because ")
    assert "".join(begun.texts).endswith("Answer: Because")


def test_what_cannot_be_made(document: SourceDocument) -> None:
    with pytest.raises(ValueError, match="has no chat template; leave --chat out"):
        make_prompt(tiny_tokenizer(), document, chat=True)
    with pytest.raises(ValueError, match="rewrites what it is given"):
        make_prompt(with_template("{{ messages[0].content | upper }}"), document, "Why?")
    with pytest.raises(ValueError, match=r"file: a has 1 token\(s\); at least 2"):
        make_prompt(tiny_tokenizer(), SourceDocument("x", "a"))


def test_a_question_goes_into_the_template_unless_told_otherwise(document: SourceDocument) -> None:
    assert make_prompt(with_template(), document, "Why?").ids != make_prompt(tiny_tokenizer(), document, "Why?").ids
    plain = make_prompt(with_template(), document, "Why?", chat=False)
    assert plain.ids == make_prompt(tiny_tokenizer(), document, "Why?").ids


def test_a_long_text_is_tokenised_as_far_as_it_is_wanted() -> None:
    tokenizer = tiny_tokenizer()
    lengths = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def __call__(self, texts: str | list[str], **options: object) -> object:
            lengths.extend(map(len, [texts] if isinstance(texts, str) else texts))
            return tokenizer(texts, **options)

    text = "some words " * 20_000
    whole = make_prompt(tokenizer, SourceDocument(text, "a.txt"), "Why?")
    prompt = make_prompt(Counting(), SourceDocument(text, "a.txt"), "Why?", tokens=30)
    assert prompt.parts.count("document") == 30
    assert prompt.ids[:29] == whole.ids[:29]
    assert prompt.is_cut
    assert prompt.document_tokens is None
    assert max(lengths) < 4000


def test_a_longer_conversation_begins_with_the_shorter(document: SourceDocument) -> None:
    turns = [Turn("One?", [70, 71, 2]), Turn("Two?", [72]), Turn("Three?")]
    for tokenizer in (tiny_tokenizer(), with_template()):
        made = [make_conversation(tokenizer, document, [*turns[:k], Turn(turns[k].ask)]) for k in range(3)]
        for shorter, longer, turn in zip(made, made[1:], turns, strict=False):
            begin = [*shorter.ids, *turn.answer]
            assert longer.ids[: len(begin)] == begin
        assert made[0].ids == make_prompt(tokenizer, document, "One?").ids
        assert len(made[2].ids) == len(made[2].texts) == len(made[2].parts)
        assert made[2].parts.count("answer") == 4
    # The end of its turn that an answer wrote is not written again, and that of another is.
    whole = (
        "<bos>user: One page.\n\nThe third.\n\nOne?<eos>A:de<eos><bos>user: Two?<eos>A:f<eos><bos>user: Three?<eos>A:"
    )
    assert "".join(made[2].texts) == whole
    with pytest.raises(ValueError, match="an answer in all but the last"):
        make_conversation(tokenizer, document, [Turn("One?"), Turn("Two?")])


def test_a_conversation_without_a_document() -> None:
    made = make_conversation(
        with_template(), None, [Turn("One?", "Yes <eos>"), Turn("Two?")], system=" Be <bos> brief. "
    )
    assert "".join(made.texts) == (
        "<bos>system: Be <bos> brief.<eos><bos>user: One?<eos>A:Yes <eos><eos><bos>user: Two?<eos>A:"
    )
    assert (made.ids.count(1), made.ids.count(2)) == (3, 4)
