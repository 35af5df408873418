"""Which Debian packages the training text comes from, and which texts are held out of training.

The Python documentation is left out on purpose: the Python language reference is what `dsa demo` measures on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["html", "text", "man", "wml", "rdata"]


@dataclass(frozen=True)
class Source:
    """One document: some files of one package, in natural order of their paths, joined by empty lines.

    Args:
        name: Name of the text that is written, without `.txt`.
        package: Debian package.
        kind: How its files become text: `"html"`, `"text"` (also `.gz`), `"man"` (rendered by groff), `"wml"`
            (dialogue of a Wesnoth campaign), or `"rdata"` (strings of an R data base, the one called `member`).
        files: Glob patterns below the package's root.
        megabytes: At most so much text of it is kept, so that no source outweighs the others.
        held_out: Never trained on; for measuring.
        member: Name of the variable in an R data base.
    """

    name: str
    package: str
    kind: Kind
    files: tuple[str, ...]
    megabytes: float = 1.0
    held_out: bool = False
    member: str = ""


_DOC = "usr/share/doc"
_HELP = "usr/share/libreoffice/help/en-US/text"
_GO = "usr/share/go-1.19/src"
_PERL = "usr/share/perl/5.36.0"


def _novel(name: str, member: str, held_out: bool = False) -> Source:
    files = ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",)
    return Source(name, "r-cran-janeaustenr", "rdata", files, held_out=held_out, member=member)


def _campaign(name: str, short: str, held_out: bool = False) -> Source:
    files = ("usr/share/games/wesnoth/1.16/data/campaigns/*/scenarios*/**/*.cfg",)
    return Source(name, f"wesnoth-1.16-{short}", "wml", files, held_out=held_out)


SOURCES = (
    # Long-form prose and dialogue.
    Source("anarchist-faq", "anarchism", "html", (f"{_DOC}/anarchism/html/*.html",), 3.0),
    _novel("austen-sense-and-sensibility", "sensesensibility"),
    _novel("austen-pride-and-prejudice", "prideprejudice"),
    _novel("austen-mansfield-park", "mansfieldpark"),
    _novel("austen-emma", "emma"),
    _novel("austen-northanger-abbey", "northangerabbey"),
    _novel("austen-persuasion", "persuasion", held_out=True),
    _campaign("wesnoth-descent-into-darkness", "did"),
    _campaign("wesnoth-delfadors-memoirs", "dm"),
    _campaign("wesnoth-the-eastern-invasion", "ei"),
    _campaign("wesnoth-legend-of-wesmere", "low"),
    _campaign("wesnoth-under-the-burning-suns", "utbs", held_out=True),
    Source("copyright-does-not-exist", "cfi-en", "html", (f"{_DOC}/cfi-en/html/*.htm",), held_out=True),
    Source("jargon-file", "jargon-text", "text", (f"{_DOC}/jargon-text/jargon.txt.gz",), 1.5),
    # Rules and legal text.
    Source("licenses", "base-files", "text", ("usr/share/common-licenses/*",), 0.5),
    Source("debian-policy", "debian-policy", "text", (f"{_DOC}/debian-policy/policy.txt.gz",), held_out=True),
    Source("gnu-standards", "gnu-standards", "text", (f"{_DOC}/gnu-standards/*.text.gz",)),
    # Guides.
    Source("debian-reference", "debian-reference-en", "text", ("usr/share/debian-reference/*.en.txt.gz",)),
    Source(
        "developers-reference",
        "developers-reference",
        "text",
        ("usr/share/developers-reference/developers-reference.txt.gz",),
    ),
    Source("debian-faq", "debian-faq", "text", (f"{_DOC}/debian/FAQ/debian-faq.en.txt.gz",)),
    Source("debmake", "debmake-doc", "text", (f"{_DOC}/debmake-doc/debmake-doc.en.txt.gz",)),
    Source("securing-debian", "harden-doc", "html", (f"{_DOC}/harden-doc/html/en-US/*.html",)),
    Source("live-manual", "live-manual-txt", "text", (f"{_DOC}/live-manual/txt/live-manual.en.txt.gz",)),
    Source("aptitude", "aptitude-doc-en", "html", (f"{_DOC}/aptitude/html/en/*.html",)),
    # Manuals.
    Source("postgresql", "postgresql-doc-15", "html", (f"{_DOC}/postgresql-doc-15/html/*.html",), 3.0),
    Source("apache-httpd", "apache2-doc", "html", (f"{_DOC}/apache2-doc/manual/en/**/*.html",), 1.5),
    Source("sqlite", "sqlite3-doc", "html", (f"{_DOC}/sqlite3/*.html",), 2.0),
    Source("exim", "exim4-doc-html", "html", (f"{_DOC}/exim4-doc-html/spec_html/*.html",), 1.5),
    Source("kerberos", "krb5-doc", "html", (f"{_DOC}/krb5-doc/admin/**/*.html", f"{_DOC}/krb5-doc/user/**/*.html")),
    Source("zsh", "zsh-doc", "html", (f"{_DOC}/zsh-common/html/*.html",), 1.5),
    Source("vim", "vim-doc", "html", (f"{_DOC}/vim/html/*.html",), 2.0),
    Source("maxima", "maxima-doc", "html", (f"{_DOC}/maxima-doc/html/*.html",), 1.5),
    Source("gap", "gap-doc", "html", ("usr/share/gap/doc/ref/chap[0-9]*[0-9].html",), 1.5),
    Source(
        "libreoffice", "libreoffice-help-en-us", "html", ("usr/share/libreoffice/help/en-US/text/s[cw]*/**/*.html",)
    ),
    Source("bind9", "bind9-doc", "html", (f"{_DOC}/bind9-doc/arm/*.html",), held_out=True),
    # Reference pages with much code.
    Source("linux-manual", "manpages", "man", ("usr/share/man/man[457]/*",), 1.5),
    Source("linux-programmers-manual", "manpages-dev", "man", ("usr/share/man/man[23]/*",), 2.0),
    Source("tcl", "tcl8.6-doc", "man", ("usr/share/man/man[3n]/*",)),
    Source("git", "git-doc", "text", (f"{_DOC}/git-doc/*.txt", f"{_DOC}/git-doc/technical/*.txt"), 2.0),
    Source("perl", "perl-doc", "text", (f"{_PERL}/pod/perl[a-z]*.pod",), 2.0),
    Source("cxx-annotations", "c++-annotations-txt", "text", (f"{_DOC}/c++-annotations/cplusplus.txt.gz",), 2.0),
    Source("cppreference", "cppreference-doc-en-html", "html", ("usr/share/cppreference/doc/html/en/cpp/**/*.html",)),
    Source("nodejs", "nodejs-doc", "html", (f"{_DOC}/nodejs/api/*.html",), 2.0),
    Source("chez-scheme", "chezscheme-doc", "html", (f"{_DOC}/chezscheme-doc/html/*.html",)),
    Source("cmake", "cmake-doc", "text", (f"{_DOC}/cmake-data/html/_sources/manual/*.txt",)),
    # Programs.
    Source("go-net-http", "golang-1.19-src", "text", (f"{_GO}/net/http/*.go",), 1.5),
    Source("go-compiler", "golang-1.19-src", "text", (f"{_GO}/go/**/*.go",)),
    Source(
        "perl-modules", "perl-modules-5.36", "text", (f"{_PERL}/CPAN/**/*.pm", f"{_PERL}/TAP/**/*.pm"), held_out=True
    ),
)
