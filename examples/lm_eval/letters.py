"""The data of the tasks next to it: a few short texts, each with a question."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def load(**_: Any) -> DatasetDict:
    """All texts as the split `test`; nothing is fetched, and nothing is cached."""
    lines = Path(__file__).with_name("letters.jsonl").read_text(encoding="utf-8").splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))


def answer(row: dict[str, Any]) -> str:
    """The right choice in words."""
    return str(row["choices"][row["answer"]])


def contained(row: dict[str, Any], made: Sequence[str]) -> dict[str, float]:
    """Whether the generated line names the right choice."""
    return {"contained": float(answer(row).lower() in made[0].lower())}
