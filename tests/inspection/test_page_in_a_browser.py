"""The page of inspect in a real browser: a token that is pointed at shades where it looks, by mouse and by keys."""

import pytest
import tiny
import torch
from browsing import watched

import attn_plugins as ap
from attn_plugins.inspection.page import Entry, entry_of, page

TOKENS = ["the", " red", "\n", " <b>cat</b>", " is", " good"]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def inspected():
    model = ap.swap_attention(tiny.build("llama"), "retention")
    given = {"input_ids": torch.arange(3, 9).unsqueeze(0)}
    return ap.inspect_attention(model, given, queries=[1, 3, 5]).layers


@pytest.fixture(params=["light", "dark", "phone"])
def opened(browser, inspected, tmp_path, request):
    """The page; an error in it, or a request to anywhere, fails the test."""
    entries = [entry_of(layer, TOKENS, TOKENS) for layer in inspected]
    beside = Entry(
        title="beside",
        told="told",
        heads=["sum"],
        captions=[""],
        queries=[0],
        query_texts=["all"],
        key_texts=TOKENS,
        weights_hqK=torch.tensor([[[0.0, -1, 0, 0.5, 0, 0.25]]]),
        own_hqK=None,
        mean=False,
    )
    path = tmp_path / "page.html"
    path.write_text(page([*entries, beside], title="a <model>", told="told"), encoding="utf8")
    size = {"width": 375, "height": 812} if request.param == "phone" else {"width": 1200, "height": 900}
    scheme = "dark" if request.param == "dark" else "light"
    with watched(browser, path.as_uri(), viewport=size, color_scheme=scheme) as tab:
        yield tab
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it is wider than the window"


def shares_in(tab, name):
    titles = tab.locator(f"#{name} span").evaluate_all("spans => spans.map(span => span.title)")
    return [float(title.split(": ")[1].removesuffix(" %")) for title in titles]


def test_it_shows_where_tokens_look(opened, inspected):
    assert opened.locator("#queries button").all_inner_texts()[3] == " <b>cat</b>"
    assert opened.locator("#queries button:enabled").count() == 3
    assert opened.locator("#queries .chosen").inner_text() == " good"
    opened.locator("#queries button").nth(3).hover()
    assert opened.locator("#queries .chosen").inner_text() == " <b>cat</b>"
    for name in ("weights", "own"):
        weights = getattr(inspected[0], f"{name}_BhqK")[0, :, 1]
        want = (100 * weights / weights.abs().sum(-1, keepdim=True)).mean(0).tolist()
        assert shares_in(opened, name) == pytest.approx(want, abs=1)
    first = opened.locator("#own-top li").first.inner_text()
    assert first.split(" at ")[1].partition(":")[0] == str(int(inspected[0].own_BhqK[0, :, 1].mean(0).argmax()))


def test_shades_may_leave_out_what_is_on_the_first_tokens(opened, inspected):
    weights = inspected[0].own_BhqK[0, :, 2].mean(0)
    shades = "spans => spans.map(span => Number(getComputedStyle(span).backgroundColor.split(/[,)]/)[3]))"
    for most in (weights.max(), weights[4:].max()):
        want = (0.85 * (weights / most).clamp(max=1)).tolist()
        assert opened.locator("#own span").evaluate_all(shades) == pytest.approx(want, abs=0.02)
        opened.check("#rest")


def test_it_is_reached_by_keys_and_lists(opened, inspected):
    opened.locator("#queries .chosen").focus()
    opened.keyboard.press("ArrowLeft")
    assert opened.evaluate("document.activeElement.textContent") == " <b>cat</b>"
    opened.keyboard.press("Home")
    assert opened.locator("#queries .chosen").inner_text() == " red"
    opened.select_option("#entry", label="decoder layer 1  (model.layers.1.self_attn)")
    opened.select_option("#head", "2")
    assert "entropy" in opened.locator("#caption").inner_text()
    weights = inspected[1].weights_BhqK[0, 2, 0]
    assert shares_in(opened, "weights") == pytest.approx((100 * weights / weights.abs().sum()).tolist(), abs=1)
    opened.select_option("#entry", label="beside")
    assert opened.locator("#head option").all_inner_texts() == ["sum"]
    assert not opened.locator("#own-section").is_visible()
    assert shares_in(opened, "weights") == pytest.approx([0, -57.1, 0, 28.6, 0, 14.3], abs=0.5)
