"""What a PDF's packed streams unpack to, looked at before PDFium unpacks them: it knows no bound."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Callable, Iterator

MOST_UNPACKED = 64 << 20
"""Bytes of one stream that is no picture: the drawing of a page, a font."""

# A page's drawing packs to a third or a tenth. PDFium takes 260 bytes of memory for a character: what a small file
# unpacks to costs up to 110 MB for each of these.
_UNSUSPECTED = 1 << 19
_MOST_RATIO = 50
# zlib makes at most 1,032 bytes of one, LZW 2,730 of three.
_HARMLESS = _UNSUSPECTED // 1032
_STREAM = re.compile(rb">>\s{0,8}stream\r?\n")
_FILTER = re.compile(
    rb"/(?:(FlateDecode|Fl)|(LZWDecode|LZW)|(ASCII85Decode|A85)|(ASCIIHexDecode|AHx)|(RunLengthDecode|RL))\b"
)
_LATE = re.compile(rb"/EarlyChange\s+0\b")
_PICTURE = re.compile(rb"/Subtype\s*/Image\b")
# What draws: a stream may be called a picture and be a page's drawing all the same. PDFium reads 32 KiB of a string at
# most, so that much text takes many of these.
_DRAWS = re.compile(rb"[)\]>\d]\s*(?:T[jJ]|re|Do|sh)\s")
_DRAWS_EVERY = 1 << 16
_DICTIONARY_WITHIN = 2048
_CLEAR, _END, _WIDEST = 256, 257, 12


def _streams(raw: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Of each stream its dictionary, and where it begins and ends."""
    for begins in _STREAM.finditer(raw):
        dictionary = raw[max(0, begins.start() - _DICTIONARY_WITHIN) : begins.start()].rpartition(b" obj")[2]
        end = raw.find(b"endstream", begins.end())
        yield dictionary, begins.end(), len(raw) if end < 0 else end


def drawing_bytes(raw: bytes) -> int:
    """Bytes of a PDF's streams, as they are packed, pictures aside."""
    return sum(end - begin for dictionary, begin, end in _streams(raw) if not _PICTURE.search(dictionary))


def too_large(raw: bytes) -> bool:
    """Whether a packed stream of a PDF unpacks to far more than text does; pictures, which are not read, aside."""
    for dictionary, begin, end in _streams(raw):
        filters = [found.lastindex or 0 for found in _FILTER.finditer(dictionary)]
        if not filters:
            continue
        # Packed twice, a few bytes are enough.
        if len(filters) == 1 and end - begin < _HARMLESS:
            continue
        packed = unpacked = raw[begin:end]
        most = min(MOST_UNPACKED, max(_UNSUSPECTED, _MOST_RATIO * len(packed)))
        for number in filters:
            try:
                unpacked = _UNPACK[number](unpacked, most + 1, not _LATE.search(dictionary))
            except (zlib.error, ValueError):
                break
            if len(unpacked) > most:
                if not _PICTURE.search(dictionary) or _draws(unpacked):
                    return True
                break
    return False


def shared(drawn: int, characters: int, size: int) -> bool:
    """Whether pages together draw far more than a file holds of each of them: they are one page, many times.

    Args:
        drawn: Objects of the pages.
        characters: Of their text.
        size: Its `drawing_bytes`. An object takes half of one at least, a character of text a thirtieth.
    """
    return drawn > max(_UNSUSPECTED, 2 * size) or characters > max(4 * _UNSUSPECTED, 32 * size)


def _draws(unpacked: bytes) -> bool:
    return len(_DRAWS.findall(unpacked)) * _DRAWS_EVERY > len(unpacked)


def _flate(packed: bytes, most: int, early: bool) -> bytes:
    return zlib.decompressobj().decompress(packed, most)


def _lzw(packed: bytes, most: int, early: bool) -> bytes:
    """As much as `most` bytes and a little more: LZW with codes of 9 to 12 bits, the highest bit first.

    Args:
        packed: The bytes.
        most: How many are wanted.
        early: Whether codes get wider one code before they have to, as is usual.
    """
    table = [bytes((value,)) for value in range(256)] + [b"", b""]
    parts: list[bytes] = []
    made = held = bits = 0
    width, before = 9, b""
    for byte in packed:
        held, bits = (held << 8) | byte, bits + 8
        if bits < width:
            continue
        bits -= width
        code, held = held >> bits, held & ((1 << bits) - 1)
        if code == _CLEAR:
            del table[_END + 1 :]
            width, before = 9, b""
            continue
        if code == _END or code > len(table) or (code == len(table) and not before):
            break
        part = table[code] if code < len(table) else before + before[:1]
        parts.append(part)
        made += len(part)
        if made > most:
            break
        if before and len(table) < 1 << _WIDEST:
            table.append(before + part[:1])
            width = min(_WIDEST, max(9, (len(table) + early).bit_length()))
        before = part
    return b"".join(parts)


def _ascii85(packed: bytes, most: int, early: bool) -> bytes:
    return base64.a85decode(packed.strip().removeprefix(b"<~").partition(b"~")[0])


def _hexadecimal(packed: bytes, most: int, early: bool) -> bytes:
    digits = b"".join(packed.partition(b">")[0].split())
    return bytes.fromhex((digits + b"0" * (len(digits) % 2)).decode("ascii"))


def _run_length(packed: bytes, most: int, early: bool) -> bytes:
    parts: list[bytes] = []
    place = made = 0
    while place + 1 < len(packed) and packed[place] != 128 and made <= most:
        length = packed[place]
        count = length + 1 if length < 128 else 257 - length
        part = packed[place + 1 : place + 1 + count] if length < 128 else packed[place + 1 : place + 2] * count
        parts.append(part)
        made += count
        place += 1 + (count if length < 128 else 1)
    return b"".join(parts)


_UNPACK: dict[int, Callable[[bytes, int, bool], bytes]] = {
    1: _flate,
    2: _lzw,
    3: _ascii85,
    4: _hexadecimal,
    5: _run_length,
}
"""By the group of `_FILTER`."""
