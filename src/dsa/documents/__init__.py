"""Documents that users bring: PDF, HTML, Markdown and plain text as one value, with the pages kept."""

from dsa.documents.joining import joined, read_sources
from dsa.documents.reading import read_source, read_stdin
from dsa.documents.source import Page, SourceDocument

__all__ = ["Page", "SourceDocument", "joined", "read_source", "read_sources", "read_stdin"]
