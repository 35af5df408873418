"""Text that users bring, as token ids: whatever its words are, none of them becomes a control token.

A tokenizer takes `<|im_end|>` in a string for the token of that name, wherever the string came from. Here a text is
tokenised as it stands, and where a control token comes out of it, the text is cut inside that token's name and its
parts are tokenised apart, until none is left. A text without such names has the ids that the tokenizer gives it. That
works for every kind of tokenizer, for names that are words of the vocabulary too, and leaves the tokenizer's own
settings alone, which other threads may be using.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

_PROBE = "a"
# What a text in the middle of another is tokenised after, by tokenizers that put a space in front of a string.
_CONTEXTS = ("\n", ".", "a", "\u4e2d")
_HEAD = 64
# A text of so many characters takes milliseconds, and is asked about again; a prompt has it with and without its turn.
_LONG, _KEPT = 20_000, 4
_PREFIX_SPACE = "\u2581"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text.

    Args:
        ids: Token ids.
        spans: The first character of each token and the one after its last; `None` where the tokenizer does not tell.
    """

    ids: list[int]
    spans: list[tuple[int, int]] | None

    def starts(self, text: str) -> list[int]:
        """Where each token begins in the text, from 0: what lies between two tokens belongs to the first.

        Of a tokenizer that does not tell, all of the text is the first token's.
        """
        if self.spans is None:
            return [0, *[len(text)] * (len(self.ids) - 1)] if self.ids else []
        return [0, *[start for start, _ in self.spans[1:]]] if self.ids else []

    def texts(self, text: str) -> list[str]:
        """The text of every token; joined they are all of it."""
        starts = self.starts(text)
        return [text[start : max(start, end)] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that a text may not become, by id: special ones, and added ones that the chat template writes.

    Added tokens that are only whitespace, and those that no template writes, are vocabulary for text.
    """
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = "\n".join(template.values())
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    found = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in named or (token.content.strip() and token.content in template)
    }
    found.update(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return found


class TextEncoder:
    """Makes token ids out of texts and out of a chat template's own words; see the module.

    It remembers the latest long texts: who asks about a document again does not wait for its tokens again.
    """

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: A transformers tokenizer of any kind.
        """
        self.tokenizer = tokenizer
        self._controls = control_tokens(tokenizer)
        self._latest: dict[tuple[str, bool, bool], Encoded] = {}

    @cached_property
    def surrounding(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer itself puts before and after a text, such as one that begins it."""
        bare, whole = self.trusted(_PROBE).ids, list(self.tokenizer(_PROBE, verbose=False)["input_ids"])
        for place in range(len(whole) - len(bare) + 1):
            if whole[place : place + len(bare)] == bare:
                return whole[:place], whole[place + len(bare) :]
        return [], []

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a string gets a space in front that it would not have in the middle of a text."""
        return self._plain(f"\n{_PROBE}").ids != [*self._plain("\n").ids, *self._plain(_PROBE).ids]

    def text(self, text: str, *, first: bool = True, more: bool = False) -> Encoded:
        """The tokens of a text, none of which is a control token.

        Args:
            text: Of any words.
            first: Whether it stands at the beginning of a string. Tokenizers of the SentencePiece kind then put a space
                in front of it.
            more: Whether other text follows. Whitespace at the end is then tokenised as in the middle of a text.

        Raises:
            ValueError: A control token comes out of it that cannot be found in it.
        """
        wanted = text, first, more
        encoded = self._latest.pop(wanted, None)
        if encoded is None:
            encoded = self._run(text, first, more)
            cuts = self._cuts(text, encoded)
            encoded = encoded if not cuts else self._apart(text, cuts, first, more)
        if len(text) >= _LONG:
            self._latest[wanted] = encoded
            while len(self._latest) > _KEPT:
                del self._latest[next(iter(self._latest))]
        return encoded

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, each with the tokens that the tokenizer adds to a text by itself.

        Raises:
            ValueError: As `text`.
        """
        before, after = self.surrounding
        batch = self._batch(list(texts))
        found = []
        for text, encoded in zip(texts, batch, strict=True):
            cuts = self._cuts(text, encoded)
            ids = self._apart(text, cuts, True, False).ids if cuts else encoded.ids
            found.append([*before, *ids, *after])
        return found

    def trusted(self, text: str, *, first: bool = True, more: bool = False) -> Encoded:
        """The tokens of words that are not a user's: names of control tokens become those tokens."""
        return self._run(text, first, more)

    def is_first_after(self, before: str) -> bool:
        """Whether a text after these words of a template is tokenised as at the beginning of a string."""
        head, joined = self._plain(before).ids, self._plain(before + _PROBE).ids
        return not before or joined == [*head, *self._plain(_PROBE).ids]

    def _apart(self, text: str, cuts: set[int], first: bool, more: bool) -> Encoded:
        """The tokens of a text that is cut at these places, and wherever else it has to be."""
        bounds = {0, len(text)}
        known: dict[tuple[str, bool, bool], tuple[Encoded, set[int]]] = {}
        while True:
            bounds |= cuts
            cuts = set()
            spots = list(pairwise(sorted(bounds)))
            parts = [(text[begin:end], first and begin == 0, more or end < len(text)) for begin, end in spots]
            new = list(dict.fromkeys(part for part in parts if part not in known))
            for part, encoded in zip(new, self._run_all(new), strict=True):
                known[part] = encoded, self._cuts(part[0], encoded)
            ids: list[int] = []
            spans: list[tuple[int, int]] = []
            for (begin, _), part in zip(spots, parts, strict=True):
                encoded, inside = known[part]
                cuts |= {begin + place for place in inside}
                ids += encoded.ids
                spans += [(begin + start, begin + stop) for start, stop in encoded.spans or ()]
            if not cuts:
                return Encoded(ids, spans if self.tokenizer.is_fast else None)

    def _cuts(self, text: str, encoded: Encoded) -> set[int]:
        """Where a text is to be cut, so that these control tokens do not come out of it: after their first character.

        A token whose name is a single character is that character.
        """
        controls = self._controls
        found = {number for number in encoded.ids if number in controls}
        if not found:
            return set()
        unknown = self.tokenizer.unk_token_id
        if encoded.spans is None:
            return self._cuts_by_name(text, found)
        cuts = set()
        for number, (start, end) in zip(encoded.ids, encoded.spans, strict=True):
            if number not in found:
                continue
            name = controls[number]
            # Characters that a tokenizer does not know are no attempt to write its name.
            if number == unknown and name not in text[start:end]:
                continue
            if end - start > 1:
                place = text.find(name, start, end)
                cuts.add((start if place < 0 else place) + 1)
        return {place for place in cuts if 0 < place < len(text)}

    def _cuts_by_name(self, text: str, found: set[int]) -> set[int]:
        """The same for a tokenizer that does not tell which characters a token stands for."""
        cuts = set()
        for number in found:
            name = self._controls[number]
            places = [match.start() + 1 for match in re.finditer(f"(?={re.escape(name)})", text)]
            if not places and number != self.tokenizer.unk_token_id:
                raise ValueError(
                    f"the tokenizer makes its control token {name!r} out of other characters, and does not tell which; "
                    "this text cannot be read with it"
                )
            if len(name) > 1:
                cuts.update(places)
        return cuts

    def _run_all(self, parts: Sequence[tuple[str, bool, bool]]) -> list[Encoded]:
        """`_run` of each; those that nothing around them matters to in one call."""
        plain = [place for place, part in enumerate(parts) if self._is_plain(*part)]
        made = dict(zip(plain, self._batch([parts[place][0] for place in plain]) if plain else [], strict=True))
        return [made[place] if place in made else self._run(*part) for place, part in enumerate(parts)]

    def _is_plain(self, text: str, first: bool, more: bool) -> bool:
        return bool(text) and (first or not self._adds_space) and not (more and text[-1].isspace())

    def _run(self, text: str, first: bool, more: bool) -> Encoded:
        """One call of the tokenizer, with what stands before and after the text as far as it matters."""
        if not text:
            return Encoded([], [])
        if self._is_plain(text, first, more):
            return self._plain(text)
        before = "" if first or not self._adds_space else self._context(text)
        if more and text[-1].isspace():
            inside = self._between(before, text, _PROBE)
            if inside is not None:
                return inside
        return self._between(before, text, "") or self._plain(text)

    def _context(self, text: str) -> str:
        """What a text in the middle of another is tokenised after: the first of some that it does not grow into."""
        head = text[:_HEAD]
        contexts = reversed(_CONTEXTS) if head[0].isspace() else _CONTEXTS
        possible = []
        for context in contexts:
            inside = self._between(context, head, "")
            if inside is None or not inside.ids:
                continue
            token = self.tokenizer.convert_ids_to_tokens(inside.ids[0])
            if head[0].isspace() or not str(token).startswith(_PREFIX_SPACE):
                return context
            possible.append(context)
        return possible[0] if possible else ""

    def _between(self, before: str, text: str, after: str) -> Encoded | None:
        """The tokens of a text between others; `None` where a token reaches over its ends."""
        whole = self._plain(f"{before}{text}{after}")
        if not before and not after:
            return whole
        if whole.spans is None:
            left, right = self._plain(before).ids, [0] if after else []
            inside = whole.ids[len(left) : len(whole.ids) - len(right)]
            has_left = whole.ids[: len(left)] == left
            has_right = not after or str(self.tokenizer.decode(whole.ids[-1:])).strip() == after
            return Encoded(inside, None) if has_left and has_right else None
        begin, end = len(before), len(before) + len(text)
        if any(start < edge < stop for start, stop in whole.spans for edge in (begin, end)):
            return None
        places = [place for place, (start, _) in enumerate(whole.spans) if begin <= start < end]
        spans = [(whole.spans[place][0] - begin, whole.spans[place][1] - begin) for place in places]
        return Encoded([whole.ids[place] for place in places], spans)

    def _plain(self, text: str) -> Encoded:
        return self._batch([text])[0]

    def _batch(self, texts: list[str]) -> list[Encoded]:
        if not self.tokenizer.is_fast:
            made = self.tokenizer(texts, add_special_tokens=False, verbose=False)
            return [Encoded(list(ids), None) for ids in made["input_ids"]]
        made = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            Encoded(list(ids), list(spans))
            for ids, spans in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]
