"""Small PDFs that unpack to much, for tests of what they cost."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable

SHOW = b"BT /F 8 Tf 10 700 Td (words of a page) Tj (and more) Tj ET\n"
FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
SHARERS = 2_000


def lzw(data: bytes) -> bytes:
    """As PDF and TIFF pack: codes of 9 to 12 bits, the highest bit first, wider one code early."""
    out = bytearray()
    table: dict[bytes, int] = {}
    held = bits = width = 0

    def put(code: int) -> None:
        nonlocal held, bits
        held, bits = (held << width) | code, bits + width
        while bits >= 8:
            bits -= 8
            out.append(held >> bits)
            held &= (1 << bits) - 1

    def clear() -> None:
        nonlocal table, width
        width = width or 9
        put(256)
        table, width = {bytes((value,)): value for value in range(256)}, 9

    clear()
    word = b""
    for value in data:
        longer = word + bytes((value,))
        if longer in table:
            word = longer
            continue
        put(table[word])
        if len(table) < 3_800:
            table[longer] = len(table) + 2
            width = max(9, (len(table) + 2).bit_length())
        else:
            clear()
        word = bytes((value,))
    put(table[word])
    put(257)
    return bytes(out) + bytes(((held << (8 - bits)) & 255,))


def pdf(dictionary: bytes, packed: bytes, pages: int = 1) -> bytes:
    """A PDF whose pages all show one stream."""
    kids = b" ".join(b"%d 0 R" % (5 + page) for page in range(pages))
    stream = b"<<%s/Length %d>>\nstream\n%s\nendstream" % (dictionary, len(packed), packed)
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>/Contents 4 0 R>>"
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, pages), FONT, stream]
    out, places = b"%PDF-1.7\n", []
    for number, each in enumerate([*objects, *[page] * pages], start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(places) + 1
    trailer = b"trailer <</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF" % (size, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + trailer


def words(count: int) -> bytes:
    """A drawing that shows so many words, each at another place."""
    shown = (b"1 0 0 1 %d %d Tm (w%d) Tj " % (each * 37 % 600, each * 53 % 800, each) for each in range(count))
    return b"BT /F 8 Tf " + b"".join(shown) + b"ET"


def boxes(count: int) -> bytes:
    """A drawing of so many boxes."""
    return b"".join(b"%d %d 5 5 re f\n" % (each % 600, each % 797) for each in range(count))


BOMBS: dict[str, Callable[[], bytes]] = {
    "flate.pdf": lambda: pdf(b"/Filter/FlateDecode", zlib.compress(SHOW * 100_000, 9)),
    "called-a-picture.pdf": lambda: pdf(
        b"/Subtype/Image/Width 9999/Height 9999/Filter/FlateDecode", zlib.compress(SHOW * 100_000, 9)
    ),
    "lzw.pdf": lambda: pdf(b"/Filter/LZWDecode", lzw(b"(a) Tj " * 120_000)),
    "flate-of-lzw.pdf": lambda: pdf(b"/Filter[/FlateDecode/LZWDecode]", zlib.compress(lzw(b"(a) Tj " * 120_000), 9)),
    "ascii85.pdf": lambda: pdf(
        b"/Filter[/ASCII85Decode/FlateDecode]", base64.a85encode(zlib.compress(SHOW * 100_000, 9)) + b"~>"
    ),
    "hexadecimal.pdf": lambda: pdf(b"/Filter[/AHx/Fl]", zlib.compress(SHOW * 100_000, 9).hex().encode() + b">"),
    "run-length.pdf": lambda: pdf(b"/Filter[/RL/RL]", b"\x81\x81" * 500 + b"\x80"),
}
