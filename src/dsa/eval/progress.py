"""Moves to `dsa.runs.progress`."""

from dsa.runs.progress import Progress as Progress
from dsa.runs.progress import silent as silent
