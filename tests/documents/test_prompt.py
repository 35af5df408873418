"""The prompt out of a document and a question: which token stands where."""

import pytest

from dsa.documents import SourceDocument
from dsa.documents.prompt import make_prompt, word_prompt
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


def test_words_for_any_tokenizer() -> None:
    class Slow:
        is_fast = False
        chat_template = None

    assert word_prompt(Slow(), "Text.", "Why?").text == "Text.\n\nQuestion: Why?\nAnswer:"
    with pytest.raises(ValueError, match="no fast version"):
        make_prompt(Slow(), SourceDocument("Text.", "a"))


def test_a_question_goes_into_the_template_unless_told_otherwise(document: SourceDocument) -> None:
    assert make_prompt(with_template(), document, "Why?").ids != make_prompt(tiny_tokenizer(), document, "Why?").ids
    plain = make_prompt(with_template(), document, "Why?", chat=False)
    assert plain.ids == make_prompt(tiny_tokenizer(), document, "Why?").ids


def test_a_long_text_is_tokenised_as_far_as_it_is_wanted() -> None:
    tokenizer = tiny_tokenizer()
    lengths = []

    class Counting:
        is_fast, chat_template = True, None

        def __call__(self, text: str, **options: object) -> object:
            lengths.append(len(text))
            return tokenizer(text, **options)

    text = "some words " * 20_000
    whole = make_prompt(tokenizer, SourceDocument(text, "a.txt"), "Why?")
    prompt = make_prompt(Counting(), SourceDocument(text, "a.txt"), "Why?", tokens=30)
    assert prompt.parts.count("document") == 30
    assert prompt.ids[:29] == whole.ids[:29]
    assert prompt.is_cut
    assert prompt.document_tokens is None
    assert max(lengths) < 4000
