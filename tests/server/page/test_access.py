"""The page for everyone: by keyboard, by screen reader, in light and dark, on a phone, without motion."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.server.page.conftest import visit
from tests.server.page.gated import Gate
from tests.server.page.site import Site

MIN_CONTRAST = 4.5
MIN_EDGE_CONTRAST = 3.0
CONTRASTS = """(selector) => {
    const luminance = (colour) => {
        const parts = colour.slice(0, 3).map((part) => {
            const value = part / 255;
            return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const ground = (element) => {
        for (let node = element; node; node = node.parentElement) {
            const colour = parse(getComputedStyle(node).backgroundColor);
            if (colour[3] === undefined || colour[3] === 1) return colour;
        }
    };
    const ratio = (one, two) => {
        const [low, high] = [luminance(one), luminance(two)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const found = [];
    for (const element of document.querySelectorAll(selector)) {
        if (!element.checkVisibility({visibilityProperty: true})) continue;
        const style = getComputedStyle(element);
        const says = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
        const name = `${element.tagName} ${element.id} ${element.className} ${element.textContent.slice(0, 30)}`;
        if (says) found.push([name, "text", ratio(parse(style.color), ground(element))]);
        if (element.matches("input, select, textarea") && !element.matches("[type=file], [type=checkbox]"))
            found.push([name, "edge", ratio(parse(style.borderTopColor), ground(element.parentElement))]);
    }
    return found;
}"""
"""Contrast of each visible text and each edge of a control with what is behind it, by WCAG 2.2."""

NAMELESS = """() => [...document.querySelectorAll(
        "input, select, textarea, button, a[href], summary, img, video, audio, progress")]
    .filter((element) => element.checkVisibility())
    .filter((element) => !(element.labels?.length || element.getAttribute("aria-label") || element.textContent.trim()
        || element.getAttribute("alt") !== null || element.querySelector("img[alt]")))
    .map((element) => element.outerHTML)"""


NAME_OF = "(element) => element.id || element.ariaLabel || element.innerText"


def failing(page: Page, gate: Gate) -> None:
    """A page that shows about everything: folded out, a failed job, a fault at an input, a history."""
    page.get_by_text("More inputs").click()
    page.get_by_label("Prompt").first.fill("fail")
    gate.let(1)
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.locator("#job-state")).to_have_text("Failed")
    page.get_by_label("Prompt").first.fill("")
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.get_by_text("Prompt is needed.")).to_be_visible()


def succeeding(page: Page, gate: Gate) -> None:
    """A page with a result."""
    page.get_by_label("Prompt").first.fill("a red disc")
    gate.let(4)
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.locator("#outputs figure")).to_have_count(2)


@pytest.mark.parametrize("show", [failing, succeeding])
def test_contrast(page: Page, gate: Gate, show: Callable[[Page, Gate], None]) -> None:
    least = {"text": MIN_CONTRAST, "edge": MIN_EDGE_CONTRAST}
    page.emulate_media(reduced_motion="reduce")
    show(page, gate)
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        found = page.evaluate(CONTRASTS, "body *")
        assert len(found) > 20
        assert not [(theme, *fault) for fault in found if fault[2] < least[fault[1]]]


def test_contrast_is_measured(page: Page) -> None:
    page.evaluate("document.querySelector('#graph-about').style.color = '#8a8f98'")
    assert [fault for fault in page.evaluate(CONTRASTS, "#graph-about") if fault[2] < MIN_CONTRAST]


@pytest.mark.parametrize("show", [failing, succeeding])
def test_everything_has_a_name(page: Page, gate: Gate, show: Callable[[Page, Gate], None]) -> None:
    show(page, gate)
    assert page.evaluate(NAMELESS) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    referred = """["aria-describedby", "aria-labelledby", "for"].flatMap((name) =>
        [...document.querySelectorAll(`[${name}]`)].flatMap((element) => element.getAttribute(name).split(" ")))"""
    assert set(page.evaluate(referred)) <= set(ids)


def test_accessibility_snapshot(page: Page, gate: Gate) -> None:
    succeeding(page, gate)
    expect(page.locator("body")).to_match_aria_snapshot("""
    - link "Skip to the form"
    - banner:
      - heading "Omni" [level=1]
      - button /Theme/
    - status
    - main:
      - region "Request":
        - heading "Request" [level=2]
        - form "Request":
          - combobox "Graph"
          - textbox "Prompt required": a red disc
          - button "Image"
          - group: /More inputs/
          - textbox "Seed"
          - button "Draw a random seed"
          - button /Run/
      - region "Result":
        - heading "Result" [level=2]
        - article "Job":
          - list "Stages":
            - listitem:
              - progressbar "Progress of draw"
            - listitem:
              - progressbar "Progress of facts"
          - figure:
            - link "image in full size":
              - img /image of paint, seed/
          - button "Same again"
          - button "Delete"
        - group:
          - link "The plan in full size":
            - img /Drawing of the plan of paint/
      - region "History":
        - heading "History" [level=2]
        - combobox "Jobs of"
        - list "History":
          - listitem:
            - button /a red disc done/
            - 'button "Same again: a red disc"'
            - 'button "Delete: a red disc"'
    """)


def test_news_are_announced(page: Page, gate: Gate) -> None:
    status = page.get_by_role("status").first
    expect(status).to_have_attribute("aria-live", "polite")
    page.get_by_label("Prompt").first.fill("a red disc")
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(status).to_have_text("draw has started")
    gate.let(1)
    expect(status).to_have_text("draw: brush stroke 1 of 4")
    gate.let(3)
    expect(status).to_have_text("Done")


def test_by_keyboard_only(page: Page, gate: Gate) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the form")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the form")).to_be_in_viewport()
    page.keyboard.press("Enter")
    for wanted in ("graph", "input-1"):
        page.keyboard.press("Tab")
        expect(page.locator(f"#{wanted}")).to_be_focused()
        assert page.evaluate("getComputedStyle(document.activeElement).outline").endswith("solid 3px")
    page.keyboard.type("a green disc")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#job-state")).to_have_text("Running")
    page.keyboard.press("Escape")
    expect(page.locator("#job-state")).to_have_text("Aborted")
    gate.let(4)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#outputs figure")).to_have_count(2)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(f"({NAME_OF})(document.activeElement)"))
    controls = "[...document.querySelectorAll('button, select, textarea, input, summary, a[href]')]"
    visible = f"{controls}.filter((element) => element.checkVisibility())"
    assert set(page.evaluate(f"{visible}.map({NAME_OF})")) <= reached


def ground(page: Page) -> tuple[int, ...]:
    """Red, green and blue behind everything."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return tuple(int(part) for part in re.findall(r"\d+", colour))[:3]


def test_themes(page: Page) -> None:
    button = page.get_by_role("button", name="Theme")
    page.emulate_media(color_scheme="light")
    assert sum(ground(page)) > 700
    page.emulate_media(color_scheme="dark")
    expect(button).to_have_text("Theme: auto")
    assert sum(ground(page)) < 80
    button.click()
    expect(button).to_have_text("Theme: light")
    assert sum(ground(page)) > 700
    page.reload()
    expect(button).to_have_text("Theme: light")
    assert sum(ground(page)) > 700
    page.emulate_media(color_scheme="light")
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert sum(ground(page)) < 80
    button.click()
    expect(button).to_have_text("Theme: auto")
    assert sum(ground(page)) > 700


def test_on_a_phone(tabs: Callable[[], Page], site: Site, gate: Gate) -> None:
    page = tabs()
    page.set_viewport_size({"width": 360, "height": 740})
    visit(page, site.urls["open"])
    succeeding(page, gate)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    expect(page.locator("#work")).to_be_in_viewport()
    small = """[...document.querySelectorAll("button, select, input, summary, a.button")]
        .filter((element) => element.checkVisibility())
        .map((element) => [element.outerHTML.slice(0, 60), element.getBoundingClientRect()])
        .filter(([, box]) => box.width < 24 || box.height < 24).map(([html]) => html)"""
    assert page.evaluate(small) == []


def test_without_motion(page: Page, gate: Gate) -> None:
    page.get_by_label("Prompt").first.fill("a red disc")
    page.get_by_role("button", name=re.compile("^Run")).click()
    bar = page.get_by_role("progressbar", name="Progress of draw")
    expect(bar).not_to_have_attribute("value", re.compile(".*"))  # it runs, and its steps are not known yet
    motion = "(bar) => getComputedStyle(bar).animationName"
    assert bar.evaluate(motion) == "sweep"
    page.emulate_media(reduced_motion="reduce")
    assert bar.evaluate(motion) == "none"
    page.keyboard.press("Escape")
    expect(page.locator("#job-state")).to_have_text("Aborted")
