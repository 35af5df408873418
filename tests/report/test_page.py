"""The report in a browser: it opens, a token is chosen, the panel follows, nothing is run and nothing requested."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsa.report.explanation import Explanation

LIMIT_MS = 120_000


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report, opened at phone width; afterwards it must not have said or asked for anything."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=request.param)
    opened = context.new_page()
    opened.set_default_timeout(LIMIT_MS)
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda made: asked.append(made.url))
    opened.goto(page_file.as_uri())
    opened.wait_for_selector("main[aria-busy=false]", timeout=LIMIT_MS)
    yield opened
    assert said == []
    assert asked == [page_file.as_uri()]
    context.close()


def test_a_choice_changes_the_panel(page: Any) -> None:
    before = page.inner_text("#summary")
    assert "read 24 of" in before
    options = page.locator("#tokens [role=option]")
    options.last.click()
    assert options.last.get_attribute("aria-selected") == "true"
    assert page.inner_text("#summary") != before
    assert page.locator("#passages button").count() > 0


def test_the_keyboard_chooses_too(page: Any) -> None:
    chosen = page.locator("#tokens [role=option][aria-selected=true]")
    chosen.focus()
    before = page.inner_text("#summary")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#summary") != before
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "layer"


def test_layers_shading_and_maps(page: Any) -> None:
    page.select_option("#layer", "1")
    assert "in layer 1." in page.inner_text("#summary")
    for shade in ("rate", "distance", "token"):
        page.check(f"[name=shade][value={shade}]")
        assert page.locator(".block span[style]").count() > 0
    for kind in ("rate", "parts", "token"):
        page.check(f"[name=map][value={kind}]")
        drawn = page.evaluate(
            "() => { const c = document.getElementById('map');"
            "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean); }"
        )
        assert drawn
    assert page.locator("#layers tbody tr").count() == 4


def test_a_passage_leads_to_its_place(page: Any) -> None:
    places = page.locator("#passages button", has_text="page ")
    places.first.click()
    assert page.locator(".found").count() > 0


def test_text_is_text(page: Any, explanation: Explanation) -> None:
    shown = page.locator("#pane").text_content()
    assert "<script>document.title = 'run'</script>" in shown
    assert "</script><script>fetch(" in shown
    assert "\u2407" in shown
    assert page.title().startswith("What was read of <b>odd.pdf")
    asked = "".join(page.locator("#tokens .asked").all_text_contents()).replace("∅", "").replace("␣", " ")
    assert "<i>is</i> it, \u241b\u2421</script>?" in asked
    page.locator("#tokens .asked").last.click()
    assert (
        page.locator("#pane script, #pane img, h1 b, i, #tokens script, #passages script, #passages img").count() == 0
    )
    hidden = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]"
    assert re.search(hidden, page.evaluate("document.body.innerText")) is None


def test_it_fits_a_phone(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_it_can_be_read_aloud(page: Any) -> None:
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").count() == 1
    for landmark in ("header", "main", "footer"):
        assert page.locator(landmark).count() == 1
    assert page.get_attribute("#summary", "aria-live") == "polite"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('section, canvas, [role=region], [role=listbox]')].filter("
        "e => !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')).length"
    )
    assert unnamed == 0


NAMED = """element => {
  const of = id => document.getElementById(id)?.textContent ?? "";
  return element.getAttribute("aria-label") || of(element.getAttribute("aria-labelledby")) ||
    [...(element.labels ?? [])].map(each => each.textContent).join("") || element.textContent;
}"""
REACHABLE = """() => [...document.querySelectorAll(
  "a[href], button, select, input, summary, [tabindex='0']")].filter(each => each.checkVisibility() && (
  each.type !== "radio" || each.checked)).length"""


def test_every_control_is_reached_named_and_seen_to_have_the_focus(page: Any) -> None:
    reachable = page.evaluate(REACHABLE)
    for number in range(reachable):
        page.keyboard.press("Tab")
        focused = page.evaluate_handle("document.activeElement").as_element()
        what = focused.evaluate("element => element.outerHTML.slice(0, 120)")
        assert focused.evaluate("element => element !== document.body"), f"{number} of {reachable}"
        assert focused.evaluate(NAMED).strip(), what
        assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid", what
        assert focused.evaluate("element => parseFloat(getComputedStyle(element).outlineWidth)") >= 2, what
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement === document.body || document.activeElement.className === 'skip'")


def test_who_does_not_see_the_place_hears_of_it(page: Any) -> None:
    page.locator("#passages button", has_text="page 2").first.click()
    assert page.inner_text("#said") == "The text shows page 2."
    # At this width the text lies below the passages.
    assert page.evaluate("document.getElementById('pane').getBoundingClientRect().top < innerHeight")
    assert page.locator(".back a").is_visible()


def test_the_guidelines_for_accessible_pages(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    page.locator("#tokens [role=option]").last.click()
    for shade in ("token", "rate", "distance"):
        page.check(f"[name=shade][value={shade}]")
        found = axe.run(page, options={"resultTypes": ["violations"]})
        assert found.violations_count == 0, found.generate_report()


SMALL = """() => [...document.querySelectorAll(
  "[role=option], button, select, input[type=number], fieldset label, summary, .back a")].filter(each => {
    const box = each.getBoundingClientRect();
    return box.width && Math.min(box.width, box.height) < 24;
  }).map(each => each.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize(("wanted", "behavior"), [("reduce", "auto"), ("no-preference", "smooth")])
def test_nothing_moves_for_who_asks_for_it(browser: Any, page_file: Path, wanted: str, behavior: str) -> None:
    context = browser.new_context(reduced_motion=wanted)
    opened = context.new_page()
    opened.set_default_timeout(LIMIT_MS)
    opened.goto(page_file.as_uri())
    assert opened.evaluate("getComputedStyle(document.getElementById('pane')).scrollBehavior") == behavior
    context.close()


def test_fingers_find_every_control(browser: Any, page_file: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    opened = context.new_page()
    opened.set_default_timeout(LIMIT_MS)
    opened.goto(page_file.as_uri())
    opened.wait_for_selector("main[aria-busy=false]", timeout=LIMIT_MS)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    small = opened.evaluate(SMALL)
    assert small == []
    context.close()


def test_on_paper_everything_is_seen(page: Any) -> None:
    """Bars, legend and shading are printed without the browser's backgrounds; nothing is cut to a screen."""
    page.emulate_media(media="print")
    for selector in (".passages .bar", "#legend .swatch", "#pane span"):
        assert page.locator(selector).first.evaluate("each => getComputedStyle(each).printColorAdjust") == "exact"
    for selector in ("#pane", "#tokens", "#panel"):
        assert page.locator(selector).evaluate("each => each.scrollHeight - each.clientHeight") <= 1
    chosen = page.locator("#tokens [aria-selected=true]")
    assert chosen.evaluate("each => getComputedStyle(each).color") == "rgb(0, 0, 0)"
    assert not page.locator("#page").is_visible()
    assert page.pdf(format="A4")[:4] == b"%PDF"
    page.emulate_media(media="screen")


def test_the_page_box_keeps_to_the_pages(page: Any) -> None:
    for given, kept in (("99", "3"), ("0", "1"), ("2", "2")):
        page.locator("#page").fill(given)
        page.keyboard.press("Enter")
        assert page.locator("#page").input_value() == kept


def test_question_and_answer_stand_as_text(page: Any, explanation: Explanation) -> None:
    said = page.locator("header .said").all_inner_texts()
    assert said[0].startswith("Question What <i>is</i> it")
    assert said[1].startswith("Answer")
