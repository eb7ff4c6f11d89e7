"""report.html in a real browser: it shows, sorts, filters and tells, light and dark, wide and narrow, no error."""

import compared
import pytest
from browsing import watched

from attn_plugins.benchmark.html.page import write_run_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config, results = compared.write_run(folder)
    return write_run_page([(None, config)], results).as_uri()


@pytest.fixture
def page(browser, address, request):
    """The page, in a window of the size and colours that a test is parametrized with; errors in it fail the test."""
    options = getattr(request, "param", {})
    options = {"viewport": {"width": 1280, "height": 900}, **options}
    with watched(browser, address, allowed=("file:", "data:", "blob:"), **options) as tab:
        yield tab


PHONE = {"viewport": {"width": 375, "height": 812}, "is_mobile": True, "has_touch": True}


def first_column(page):
    return page.locator("#board tbody tr:visible th").all_inner_texts()


def test_figures_are_drawn(page):
    page.wait_for_selector("#training .plot .main-svg")
    assert page.locator(".figures figure").count() == page.locator(".figures .plot .main-svg:first-child").count() == 12
    assert page.locator("#cost .plot path.point").count() >= 4 * 8
    assert page.locator("#maps .plot .heatmaplayer image").count() == 2
    assert page.locator("#h-summary").is_visible()
    assert "Best perplexity: dense" in page.locator("#summary").inner_text()


def test_the_table_sorts(page):
    head = page.locator("#board thead th", has_text="perplexity")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    column = page.locator("#board tbody tr td:nth-child(4)").all_inner_texts()
    found = [float(text.split()[0]) for text in column if text[:1].isdigit()]
    assert found == sorted(found)
    assert len(found) == 8
    assert all(not text[:1].isdigit() for text in column[8:]), "rows without a figure stay last"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert first_column(page)[0] == "<b>odd</b>"
    assert page.locator("#board tbody tr td:nth-child(4)").last.inner_text()[:1].isdigit() is False


def test_the_table_filters_by_text_and_by_values(page):
    assert page.locator("#shown").inner_text() == "14 rows"
    page.fill("#find", "window untrained")
    assert first_column(page) == ["window"]
    page.fill("#find", "")
    page.select_option("[data-filter=family]", "linear")
    assert set(first_column(page)) == {"<b>odd</b>"}
    page.select_option("[data-filter=family]", "")
    page.select_option("[data-filter=state]", "failed")
    assert set(first_column(page)) == {"broken"}
    assert "layers=7 is out of range" in page.locator("#board tbody tr:visible").first.inner_text()
    assert page.locator("#shown").inner_text() == "3 of 14 rows"


def test_a_click_tells_of_the_cells_of_a_row(page):
    page.locator("#board tbody tr", has_text="chosen").last.click()
    detail = page.locator("#detail")
    assert detail.locator("h2").inner_text() == "chosen, fine-tuned"
    assert detail.locator("h3").all_inner_texts()[:3] == [f"fine-tuned, seed {seed}" for seed in range(3)]
    assert "abacus" in detail.inner_text()
    assert "--set 'finetune=" in detail.locator("pre").first.text_content() or "step" in detail.inner_text()
    detail.locator("summary", has_text="Settings").first.click()
    assert "block_size: 16" in detail.inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copy = detail.locator(".copy button").first
    copy.click()
    assert copy.inner_text() == "Copied"
    assert page.evaluate("navigator.clipboard.readText()").startswith("attn-plugins compare --output-dir runs/again")
    page.keyboard.press("Escape")
    assert not detail.is_visible()
    page.locator("#board .open", has_text="broken").first.focus()
    page.keyboard.press("Enter")
    assert "Traceback: here" in detail.inner_text(), "the log of what failed is open"


def test_attentions_can_be_left_out_of_the_figures(page):
    shown = "#cost .plot >> nth=0 >> .scatterlayer .trace >> visible=true"
    before = page.locator(shown).count()
    page.locator("#attentions button", has_text="window").click()
    assert page.locator("#attentions button[aria-pressed=false]").inner_text() == "window"
    assert page.locator(shown).count() == before - 2
    page.locator("#stages button", has_text="untrained").click()
    assert page.locator(shown).count() < before - 2


def test_dark_and_light(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(21, 24, 28)"
    assert page.locator("#theme").inner_text() == "Light"
    axis = "getComputedStyle(document.querySelector('#cost .xtick text')).fill"
    assert page.evaluate(axis) == "rgb(163, 173, 184)", "figures change with the page"
    page.reload()
    assert page.evaluate(ground) == "rgb(21, 24, 28)"


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}], indirect=True)
def test_dark_where_the_system_is(page):
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_a_phone_does_not_scroll_sideways(page):
    page.wait_for_selector("#training .plot .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    wide = page.evaluate(
        "[...document.querySelectorAll('.plot')].filter((e) => e.getBoundingClientRect().right > 376).length"
    )
    assert wide == 0
    board = page.evaluate(
        "(({scrollWidth, clientWidth}) => scrollWidth > clientWidth)(document.querySelector('#leaderboard .scroll'))"
    )
    assert board, "the table scrolls within itself"
    page.locator("#board .open").first.tap()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
