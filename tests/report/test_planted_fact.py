"""benchmarks/planted_fact.py: where a fact is put, what is compared, and mistakes."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fpdf import FPDF

from dsa.documents import SourceDocument
from dsa.documents.prompt import make_prompt
from dsa.eval.progress import silent
from dsa.models.context import DSAContext
from dsa.models.loading import LoadedModel
from dsa.report.explanation import explain
from dsa.testing.scripts import load_script
from dsa.testing.tiny_models import tiny_model
from dsa.testing.tiny_tokenizer import BYTE_VOCABULARY, tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "planted_fact.py"
PAGES = ("One page. It is short.", "", "The third page. It ends. Here.")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(SCRIPT)


@pytest.mark.parametrize("numbers", [(1, 2, 3), (4, 6, 9)])
def test_the_fact_stands_on_its_page(benchmark: ModuleType, numbers: tuple[int, ...]) -> None:
    document = SourceDocument.of_pages("a.pdf", PAGES, numbers)
    for number, expected in ((numbers[2], "The third page. It ends. A fact. Here.\n\n"), (numbers[0], None)):
        planted = benchmark.plant(document, number, "\n\nA fact.\n\n")
        assert planted.page_of(planted.text.index("A fact.")) == number
        by_number = {page.number: planted.text[page.start : page.end] for page in planted.pages}
        assert expected is None or by_number[number] == expected
        assert planted.text.replace("A fact. ", "") == document.text
        other = numbers[0] if number == numbers[2] else numbers[2]
        assert by_number[other].strip() == PAGES[numbers.index(other)]


def test_where_nothing_can_be_planted(benchmark: ModuleType) -> None:
    document = SourceDocument.of_pages("a.pdf", PAGES)
    with pytest.raises(ValueError, match=r"page: a.pdf has no page 4 among those read \(1 to 3\)"):
        benchmark.plant(document, 4, "A fact.")
    with pytest.raises(ValueError, match="has no text; take another"):
        benchmark.plant(document, 2, "A fact.")
    with pytest.raises(ValueError, match=r"has no page 1 among those read \(none\)"):
        benchmark.plant(SourceDocument("text", "a.txt"), 1, "A fact.")


def test_both_readings_write_the_given_answer(benchmark: ModuleType, loaded: LoadedModel) -> None:
    document = SourceDocument.of_pages("a.pdf", PAGES)
    prompt, answer = make_prompt(loaded.tokenizer, document, "Which?"), [70, 71, 72]
    explanation = explain(loaded, document, prompt, answer=answer)
    assert "".join(each.text for each in explanation.answer) == loaded.tokenizer.decode(answer)
    dense, _ = benchmark.read_dense(loaded, prompt, answer, silent)
    ids = torch.tensor([[*prompt.ids, *answer]])
    for mode, found in (("sparse", [math.log(each.probability) for each in explanation.answer]), ("dense", dense)):
        with torch.no_grad():
            logits = loaded.model(ids, use_cache=False, dsa_context=DSAContext(mode=mode)).logits[0].log_softmax(-1)
        places = range(len(prompt.ids) - 1, len(prompt.ids) - 1 + len(answer))
        expected = [float(logits[place, token]) for place, token in zip(places, answer, strict=True)]
        assert found == pytest.approx(expected, abs=1e-4)


def test_the_command(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder, pdf = tmp_path / "model", FPDF()
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY, max_position_embeddings=256)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for number in range(4):
        pdf.add_page()
        pdf.set_font("helvetica", size=12)
        pdf.multi_cell(0, 8, f"This is page {number + 1}. It says hardly anything. " * 3)
    pdf.output(str(tmp_path / "a.pdf"))
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    asked = ["planted_fact.py", str(tmp_path / "a.pdf"), "--pages", "2-4", "--page", "3", "--model", str(folder)]
    monkeypatch.setattr(sys, "argv", [*asked, "--json", str(out), "--report", str(page), "--top-k", "600"])
    assert benchmark.main() == 0
    found = json.loads(out.read_text())
    # with a budget of the whole document both readings are the same
    assert found["is_within"]
    assert found["rope"]["rope_type"] == "yarn"
    assert found["page"] == 3
    assert "".join(each["text"] for each in found["tokens"]).strip() in found["sentence"]
    assert page.read_text().startswith("<!doctype html>")
    assert "within 0.1" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*asked, "--page", "9"])
    assert benchmark.main() == 2
    assert "page: " in capsys.readouterr().err
