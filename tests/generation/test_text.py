"""Pieces of text are joined what all tokens are together."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dsa.generation.text import pieces
from dsa.testing.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("text", ["Plain words, and a long_one.", "naïve, 漢字\nand 🙂🙂 at the end 🙂", "\n\n", ""])
def test_bytes(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    got = list(pieces(tokenizer, ids))
    assert "".join(got) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert all(got)
    assert not any("\ufffd" in each for each in got)


def test_half_a_character_at_the_end_is_not_lost() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab🙂")["input_ids"][:-2]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_spaces_belong_to_the_words_after_them() -> None:
    """SentencePiece's spaces: the first of a text is left out, and a token does not know whether it is the first."""
    vocabulary = {"<s>": 0, "▁The": 1, "▁answer": 2, "s": 3, "\n": 4, "▁": 5}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    ids = [0, 1, 2, 3, 4, 2, 0, 2, 5, 3]
    got = list(pieces(tokenizer, ids))
    assert "".join(got) == tokenizer.decode(ids, skip_special_tokens=True)
    assert got[:3] == ["The", " answer", "s"]


def test_pieces_come_as_soon_as_their_tokens() -> None:
    tokenizer = tiny_tokenizer()
    fed: list[int] = []

    def tokens():
        for each in tokenizer("abc")["input_ids"]:
            fed.append(each)
            yield each

    assert [(piece, len(fed)) for piece in pieces(tokenizer, tokens())] == [("a", 1), ("b", 2), ("c", 3)]
