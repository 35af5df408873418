"""What a PDF's packed streams unpack to, looked at before PDFium unpacks them: it knows no bound."""

from __future__ import annotations

import re
import zlib

MOST_UNPACKED = 64 << 20
"""Bytes of one stream that is no picture: the drawing of a page, a font."""

# A page's drawing packs to a third or a tenth. PDFium takes 260 bytes of memory for a character: what a small file
# unpacks to costs up to 110 MB for each of these.
_UNSUSPECTED = 1 << 19
_MOST_RATIO = 50
# zlib makes at most 1,032 bytes of one.
_HARMLESS = _UNSUSPECTED // 1032
_STREAM = re.compile(rb">>\s{0,8}stream\r?\n")
_FLATE = re.compile(rb"/(?:FlateDecode|Fl)\b")
_PICTURE = re.compile(rb"/Subtype\s*/Image\b")
_DICTIONARY_WITHIN = 2048


def too_large(raw: bytes) -> bool:
    """Whether a packed stream of a PDF unpacks to far more than text does; pictures, which are not read, aside."""
    for begins in _STREAM.finditer(raw):
        dictionary = raw[max(0, begins.start() - _DICTIONARY_WITHIN) : begins.start()].rpartition(b" obj")[2]
        times = len(_FLATE.findall(dictionary))
        if not times or _PICTURE.search(dictionary):
            continue
        end = raw.find(b"endstream", begins.end())
        end = len(raw) if end < 0 else end
        # Packed twice, a few bytes are enough.
        if times == 1 and end - begins.end() < _HARMLESS:
            continue
        packed = unpacked = raw[begins.end() : end]
        most = min(MOST_UNPACKED, max(_UNSUSPECTED, _MOST_RATIO * len(packed)))
        for _ in range(times):
            try:
                unpacked = zlib.decompressobj().decompress(unpacked, most + 1)
            except zlib.error:
                break
            if len(unpacked) > most:
                return True
    return False
