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
from dsa.generation.session import Session
from dsa.models.context import DSAContext
from dsa.models.loading import LoadedModel
from dsa.report.explaining import explain
from dsa.runs.progress import silent
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


def test_facts_are_spread_over_the_pages_with_text(benchmark: ModuleType) -> None:
    document = SourceDocument.of_pages("a.pdf", ["text. "] * 9 + [""], range(11, 21))
    assert benchmark.spread(document, 1) == [15]
    assert benchmark.spread(document, 3) == [12, 15, 18]
    assert benchmark.spread(document, 9) == list(range(11, 20))
    with pytest.raises(ValueError, match=r"a.pdf has 9 page\(s\) with text, got 10 facts for them"):
        benchmark.spread(document, 10)
    with pytest.raises(ValueError, match=r"has 0 page\(s\) with text"):
        benchmark.spread(SourceDocument("text", "a.txt"), 1)


def test_each_answer_is_that_of_a_reading_of_its_own(benchmark: ModuleType, loaded: LoadedModel) -> None:
    """Facts share one reading of the document, cropped between them; it must not show."""
    document = SourceDocument.of_pages("a.pdf", PAGES)
    facts = benchmark.make_facts(loaded.tokenizer, document, [3, 1, 3], seed=1)
    assert 0 < benchmark.in_common(facts) < min(len(fact.prompt.ids) for fact in facts)
    dense, _ = benchmark.ask_dense(loaded, facts, silent)
    explanations = benchmark.ask_dsa(loaded, document, facts, silent)
    for fact, explanation, told in zip(facts, explanations, dense, strict=True):
        assert "".join(each.text for each in explanation.answer) == loaded.tokenizer.decode(fact.answer)
        ids = torch.tensor([[*fact.prompt.ids, *fact.answer]])
        for mode, found in (
            ("sparse", [math.log(each.probability) for each in explanation.answer]),
            ("dense", told.logs),
        ):
            with torch.no_grad():
                logits = loaded.model(ids, use_cache=False, dsa_context=DSAContext(mode=mode)).logits[0].log_softmax(-1)
            places = range(len(fact.prompt.ids) - 1, len(fact.prompt.ids) - 1 + len(fact.answer))
            expected = [float(logits[place, token]) for place, token in zip(places, fact.answer, strict=True)]
            assert found == pytest.approx(expected, abs=1e-4)
            if mode == "dense":
                assert told.is_found == all(int(logits[place].argmax()) == ids[0, place + 1] for place in places)
        alone = explain(loaded, document, fact.prompt, answer=fact.answer)
        query = explanation.query_of(0)
        for layer, row in explanation.recorder.rows[query].items():
            assert row.positions.equal(alone.recorder.rows[query][layer].positions)
        assert explanation.dsa.cache_mb == alone.dsa.cache_mb


def test_the_same_question_again(benchmark: ModuleType, loaded: LoadedModel) -> None:
    """The question is read again even where all of it is held: its selections are shown."""
    document = SourceDocument.of_pages("a.pdf", PAGES)
    (fact,) = benchmark.make_facts(loaded.tokenizer, document, [1], seed=0)
    session = Session(loaded.model)
    first, again = (explain(loaded, document, fact.prompt, answer=fact.answer, session=session) for _ in range(2))
    assert 0 < session.timings.held < len(fact.prompt.ids) - 1
    assert first.queries == again.queries
    for query, rows in first.recorder.rows.items():
        for layer, row in rows.items():
            assert row.positions.equal(again.recorder.rows[query][layer].positions)


def test_means_over_the_facts(benchmark: ModuleType) -> None:
    facts = [
        {
            "difference": difference,
            "found_dense": difference > 0,
            "tokens_with_page": int(rank is not None),
            "tokens": [{"rank_of_page": rank}],
        }
        for difference, rank in ((-0.4, None), (0.1, 1), (0.05, 4))
    ]
    summary = benchmark.summarise(facts)
    assert summary["all"]["difference"] == pytest.approx(-0.25 / 3)
    assert summary["all"]["half_width"] == pytest.approx(4.303 * 0.2753785 / 3**0.5, rel=1e-4)
    assert summary["all"]["is_within"]
    assert (summary["found_dense"]["facts"], summary["found_dense"]["difference"]) == (2, pytest.approx(0.075))
    assert (summary["facts_within"], summary["facts_with_page"], summary["tokens_with_page"]) == (2, 2, 2)
    one = benchmark.summarise(facts[:1])
    assert not one["all"]["is_within"]
    assert one["all"]["half_width"] is None
    assert one["found_dense"] is None


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
    asked = ["planted_fact.py", str(tmp_path / "a.pdf"), "--pages", "2-4", "--model", str(folder)]
    given = ["--facts", "2", "--json", str(out), "--report", str(page), "--top-k", "900"]
    monkeypatch.setattr(sys, "argv", [*asked, *given])
    assert benchmark.main() == 0
    found = json.loads(out.read_text())
    # with a budget of the whole document both readings are the same
    assert found["summary"]["all"]["is_within"]
    assert found["summary"]["facts_within"] == 2
    assert found["rope"]["rope_type"] == "yarn"
    assert [each["page"] for each in found["facts"]] == [2, 4]
    for fact in found["facts"]:
        assert "".join(each["text"] for each in fact["tokens"]).strip() in fact["sentence"]
    assert page.read_text().startswith("<!doctype html>")
    shown = capsys.readouterr().out
    assert "within 0.1" in shown
    assert "mean difference over all facts, 2: " in shown
    for wrong, message in ((["--page", "9"], "page: "), (["--facts", "4"], "facts: ")):
        monkeypatch.setattr(sys, "argv", [*asked, *wrong])
        assert benchmark.main() == 2
        assert message in capsys.readouterr().err
