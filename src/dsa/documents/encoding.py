"""Which encoding an HTML file is in, by the rules of the web (the WHATWG's Encoding and HTML standards)."""

from __future__ import annotations

import re
import warnings

import webencodings
from justhtml import stream

_DECLARED_WITHIN = 1024
_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16le", b"\xfe\xff": "utf-16be"}
_XML = re.compile(rb"""<\?xml[^>]*?\sencoding\s*=\s*["']([^"'>]+)["']""")
_CONTENT = re.compile(r"""charset\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s;"']+))""", re.IGNORECASE)
# GBK and GB18030 are read alike; Python's gbk lacks characters that browsers know.
_CODECS = {"gbk": "gb18030", "euc-jp": "euc_jis_2004", "iso-2022-jp": "iso2022_jp_ext"}
# Texts of these are hardly ever UTF-8 by chance; what is valid UTF-8 throughout was declared wrongly.
_MANY_BYTES = frozenset({"big5", "euc-jp", "euc-kr", "gb18030", "gbk", "iso-2022-jp", "shift_jis"})
# Five bytes stand for nothing in windows-1252; browsers take them for control characters, Python refuses them.
_WINDOWS_1252 = {
    byte: bytes([byte]).decode("cp1252") for byte in range(0x80, 0xA0) if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_MOST_UNREADABLE = 0.01


def decode_html(raw: bytes, name: str, argument: str) -> str:
    """The characters of an HTML file.

    A byte order mark decides, then what the file declares, by the web's table of labels; without either it is UTF-8. A
    file that declares an encoding of one byte a character but is UTF-8 throughout is read as UTF-8.

    Args:
        raw: The file.
        name: What to call it.
        argument: What the user called it, for messages.

    Raises:
        ValueError: It is not in the encoding that it declares, or in no known one.
    """
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            return _decoded(raw[len(mark) :], encoding, name, argument)
    label = declared_encoding(raw[:_DECLARED_WITHIN])
    found = webencodings.lookup(label) if label else None
    # A declaration that could be read as ASCII rules UTF-16 out.
    encoding = "utf-8" if found is None or found.name.startswith("utf-16") else found.name
    if encoding == "x-user-defined":
        encoding = "windows-1252"
    if encoding not in _MANY_BYTES and encoding != "utf-8" and not raw.isascii():
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            pass
        else:
            warnings.warn(f"{name} declares {label}, but is UTF-8 and was read so", UserWarning, stacklevel=4)
            return text
    if encoding == "utf-8" and not label and b"\0" in raw[:_DECLARED_WITHIN]:
        raise ValueError(
            f"{argument}: the HTML file {name} is binary (it holds NUL bytes); if it is UTF-16, save it with its byte "
            "order mark or as UTF-8"
        )
    return _decoded(raw, encoding, name, argument, label)


def declared_encoding(begin: bytes) -> str | None:
    """The label that the beginning of an HTML file declares in a `<meta>` or an XML declaration, if any."""
    if found := _XML.match(begin.lstrip()):
        return found[1].decode("latin-1")
    for event, value in stream(begin.decode("latin-1")):
        if event != "start" or not isinstance(value, tuple) or value[0] != "meta" or not isinstance(value[1], dict):
            continue
        attributes = value[1]
        if attributes.get("charset"):
            return attributes["charset"]
        if (attributes.get("http-equiv") or "").lower() == "content-type":
            found_in = _CONTENT.search(attributes.get("content") or "")
            if found_in:
                return next(each for each in found_in.groups() if each is not None)
    return None


def _decoded(raw: bytes, encoding: str, name: str, argument: str, label: str | None = None) -> str:
    if encoding == "replacement":
        raise ValueError(
            f"{argument}: the HTML file {name} declares {label}, which browsers refuse too; convert it to UTF-8 first, "
            "e.g. with iconv"
        )
    codec = _CODECS.get(encoding) or webencodings.lookup(encoding).codec_info.name
    if encoding == "windows-1252":
        return raw.decode("latin-1").translate(_WINDOWS_1252)
    text = raw.decode(codec, "replace")
    unreadable = text.count("\ufffd") - raw.count(b"\xef\xbf\xbd") * (encoding == "utf-8")
    if unreadable > _MOST_UNREADABLE * sum(each > "\x7f" for each in text):
        at = _first_unreadable(raw, codec)
        if label and encoding == "utf-8" and webencodings.lookup(label) is None:
            problem = f"is neither UTF-8 nor {label}, which it says it is and nobody knows"
        elif label:
            problem = f"says that it is {label}, but is not"
        else:
            problem = "is not UTF-8 text, and declares nothing else"
        raise ValueError(
            f"{argument}: the HTML file {name} {problem} (byte {at} is 0x{raw[at]:02x}); convert it first, e.g. with "
            "iconv, or declare its encoding with <meta charset=...>"
        )
    if unreadable:
        warnings.warn(
            f"{unreadable:,} characters of {name} cannot be read as {encoding}; they stand as \ufffd",
            UserWarning,
            stacklevel=5,
        )
    return text


def _first_unreadable(raw: bytes, codec: str) -> int:
    try:
        raw.decode(codec)
    except UnicodeDecodeError as error:
        return error.start
    return 0
