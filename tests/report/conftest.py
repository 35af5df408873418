"""A small report of a text with everything in it that could do harm, and a browser to open it in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsa
from dsa.documents import SourceDocument
from dsa.documents.prompt import make_prompt
from dsa.models.loading import LoadedModel
from dsa.report.explaining import explain
from dsa.report.explanation import Explanation
from dsa.report.page import write_page
from dsa.testing.browser import NoBrowserError, chromium
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

PAGES = (
    "The first page says little. <script>document.title = 'run'</script> <img src=x onerror=alert(1)> & so on.\n",
    "The second page has an odd \x07 character and a \u202e mark. Caf\u00e9 costs 3 \u20ac. \U0001f600 It ends here.\n",
    "The third page closes: </script><script>fetch('http://example.com/')</script> and </textarea>. Good bye.\n",
)


QUESTION = "What <i>is</i> it, \x1b\u202e</script>?"


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """A tiny attached model that reads bytes, one layer dense and one that shares a selection among its four."""
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, num_hidden_layers=4, max_position_embeddings=1024)
    model.generation_config.eos_token_id = None
    config = dsa.DSAConfig(
        top_k=24, index_heads=2, index_head_dim=8, sinks=2, local=6, layers={0: {"dense": True}, 3: {"share": 1}}
    )
    dsa.attach(model, config)
    return LoadedModel(model, tiny_tokenizer(), "tiny", False)


@pytest.fixture(scope="session")
def explanation(loaded: LoadedModel) -> Explanation:
    document = SourceDocument.of_pages("folder/<b>odd.pdf", PAGES)
    prompt = make_prompt(loaded.tokenizer, document, QUESTION)
    return explain(loaded, document, prompt, ask=QUESTION, new_tokens=6)


@pytest.fixture(scope="session")
def page_file(explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("report") / "report.html", explanation)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    try:
        with chromium() as opened:
            yield opened
    except NoBrowserError as error:
        pytest.skip(str(error))
