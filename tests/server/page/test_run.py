"""What people do on the page: run, watch, abort, look back, upload, and what they see when things go wrong."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.server.page.conftest import SECRET, visit
from tests.server.page.gated import SIDE, Gate
from tests.server.page.site import Site


def start(page: Page, prompt: str) -> None:
    """Fill in the prompt and run; the job is looked at then."""
    page.get_by_label("Prompt").first.fill(prompt)
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.locator("#jobs [aria-current]")).to_contain_text(prompt)


def state(page: Page) -> Locator:
    """The word for the state of the job that is looked at."""
    return page.locator("#job-state")


def history(page: Page) -> Locator:
    """The items of the history."""
    return page.get_by_role("list", name="History").get_by_role("listitem")


def stroke(page: Page, step: int, num: int = 4) -> None:
    """Wait until the stage is seen at this step."""
    expect(page.locator("#stages")).to_contain_text(f"brush stroke {step} of {num}")


def finished(page: Page) -> None:
    """Wait until the job is done and its results are there."""
    expect(state(page)).to_have_text("Done")
    expect(page.get_by_role("link", name="Download").first).to_be_visible()


def test_run_watch_and_look_back(page: Page, gate: Gate) -> None:
    page.get_by_label("Seed", exact=True).fill("41")
    start(page, "a red disc")
    expect(state(page)).to_have_text("Running")
    gate.let(1)
    stroke(page, 1)
    bar = page.get_by_role("progressbar", name="Progress of draw")
    assert bar.evaluate("bar => bar.value") == 0.25
    gate.let(1)
    stroke(page, 2)
    preview = page.get_by_role("img", name="Preview of the picture in the making")
    expect(preview).to_be_visible()
    assert preview.evaluate("async image => (await image.decode(), image.naturalWidth)") == SIDE
    expect(page.locator("#stages")).to_contain_text("painting a red disc")
    gate.let(2)

    finished(page)
    picture = page.get_by_role("img", name="image of paint, seed 41")
    assert picture.evaluate("image => image.naturalWidth") == SIDE
    expect(preview).to_be_hidden()
    expect(page.locator("figure pre")).to_contain_text('"words": 3')
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").first.click()
    assert download.value.suggested_filename == "paint-41-image.png"
    drawn = Image.open(download.value.path())
    assert drawn.size == (SIDE, SIDE)
    assert drawn.convert("RGB").getpixel((SIDE // 2, SIDE // 2)) == (200, 40, 40)

    page.reload()
    finished(page)
    expect(page.locator("#job-seed")).to_have_text("seed 41")
    item = history(page).first
    expect(item).to_contain_text("a red disc")
    expect(item.locator("img")).to_be_visible()
    page.get_by_role("button", name="Same again: a red disc").first.click()
    expect(page.get_by_label("Prompt").first).to_have_value("a red disc")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("41")
    expect(page.get_by_label("Prompt").first).to_be_focused()


def test_a_long_prompt_is_there_again(page: Page, gate: Gate) -> None:
    """The job's object leaves it out."""
    prompt = "a red disc " * 7000
    page.get_by_label("Prompt").first.fill(prompt)
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(state(page)).to_have_text("Running")
    gate.let(4)
    finished(page)
    page.get_by_label("Prompt").first.fill("")
    page.get_by_role("button", name="Same again", exact=True).click()
    expect(page.get_by_label("Prompt").first).to_have_value(prompt)


def test_abort_by_button_and_by_key(page: Page, gate: Gate) -> None:
    start(page, "a green disc")
    gate.let(1)
    stroke(page, 1)
    page.get_by_role("button", name="Abort", exact=False).first.click()
    expect(state(page)).to_have_text("Aborted")
    expect(page.get_by_role("button", name="Abort", exact=True)).to_have_count(0)

    start(page, "another green disc")
    gate.let(1)
    stroke(page, 1)
    page.keyboard.press("Escape")
    expect(state(page)).to_have_text("Aborted")
    expect(history(page).first).to_contain_text("aborted")


def test_a_failure_shows_cause_and_remedy(page: Page, gate: Gate) -> None:
    gate.let(1)
    start(page, "fail, please")
    alert = page.get_by_role("alert").filter(has_text="draw failed")
    expect(alert).to_contain_text("the paint has run out")
    expect(alert).to_contain_text("What to do: buy paint, or say another colour")
    expect(state(page)).to_have_text("Failed")
    expect(history(page).first).to_contain_text("failed")


def test_a_lost_connection_resumes(tabs: Callable[[], Page], site: Site, gate: Gate) -> None:
    page = tabs()
    visit(page, site.cable_urls["open"])
    cable = site.cables["open"]
    resumed: list[str | None] = []
    page.on(
        "request", lambda asked: asked.url.endswith("/events") and resumed.append(asked.headers.get("last-event-id"))
    )
    start(page, "a blue disc")
    gate.let(1)
    stroke(page, 1)
    site.do(cable.cut)
    expect(page.get_by_text("The connection to the server is lost")).to_be_visible()
    gate.let(2)
    site.do(cable.mend)
    stroke(page, 3)
    expect(page.get_by_text("The connection to the server is lost")).to_be_hidden()
    gate.let(1)
    finished(page)
    text = page.locator("#stages li").first.locator(".text")
    expect(text).to_have_text("painting a blue disc")  # once: no event was heard again
    assert resumed[0] is None
    assert all(int(number or 0) >= 3 for number in resumed[1:])  # queued, started, text ... were heard before the cut


def test_upload_and_the_same_upload_again(page: Page, gate: Gate, tmp_path: Path) -> None:
    path = tmp_path / "ground.png"
    Image.new("RGB", (64, 32), (250, 230, 10)).save(path)
    page.get_by_label("Image", exact=True).set_input_files(path)
    expect(page.get_by_role("img", name="Image 1")).to_be_visible()
    gate.let(4)
    start(page, "a blue disc on my ground")
    finished(page)
    expect(page.locator("figure pre")).to_contain_text("64")
    page.get_by_role("button", name="Remove ground.png").click()
    expect(page.get_by_role("img", name="Image 1")).to_have_count(0)

    page.get_by_role("button", name="Same again", exact=True).click()
    expect(page.get_by_role("img", name="Image 1")).to_be_visible()
    gate.let(4)
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(history(page).filter(has_text="a blue disc on my ground").filter(has_text="done")).to_have_count(2)
    finished(page)
    drawn = page.get_by_role("img", name="image of paint")
    assert drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 32]


def test_files_are_dropped(page: Page) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "PNG")
    drop = """(zone, [bytes, name, type]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
        zone.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }"""
    zone = page.locator(".drop").first
    zone.evaluate(drop, [list(data.getvalue()), "dropped.png", "image/png"])
    expect(page.get_by_role("img", name="Image 1")).to_be_visible()
    zone.evaluate(drop, [[1, 2, 3], "notes.txt", "text/plain"])
    expect(page.get_by_text("Image takes files of the type image only.")).to_be_visible()
    expect(page.get_by_text("dropped.png")).to_be_visible()


def test_wrong_values_are_told_at_their_place(page: Page) -> None:
    page.get_by_role("button", name=re.compile("^Run")).click()
    prompt = page.get_by_label("Prompt").first
    expect(prompt).to_be_focused()
    expect(prompt).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_text("Prompt is needed.")).to_be_visible()
    prompt.fill("a disc")
    expect(page.get_by_text("Prompt is needed.")).to_be_hidden()

    page.get_by_text("More inputs").click()
    steps = page.get_by_label("Num inference steps")
    steps.fill("0")
    page.get_by_text("More inputs").click()
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.get_by_text("Num inference steps must be at least 1.")).to_be_visible()  # unfolded again
    expect(steps).to_be_focused()
    steps.fill("100000")  # what only the server knows
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.locator(".fault", has_text="num_inference_steps")).to_be_visible()
    expect(steps).to_be_focused()

    steps.fill("")
    page.get_by_label("Seed", exact=True).fill("-1")
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.get_by_text("The seed is a whole number")).to_be_visible()


def test_another_graph_with_numbers_and_json(page: Page) -> None:
    page.get_by_label("Graph", exact=True).select_option("shout")
    expect(page.get_by_text("Says it louder.")).to_be_visible()
    plan = page.get_by_role("img", name="Drawing of the plan of shout")
    assert plan.evaluate("async image => (await image.decode(), image.naturalWidth)") > 50
    page.get_by_text("More inputs").click()
    marks = page.get_by_label("Marks")
    expect(marks).to_have_value("1")
    marks.fill("3,")
    page.get_by_label("Prompt").first.fill("hello")
    page.get_by_role("button", name=re.compile("^Run")).click()
    expect(page.get_by_text("Marks is not JSON")).to_be_visible()
    marks.fill("3")
    start(page, "hello")
    expect(page.locator("figure .text")).to_have_text("HELLO!!!")
    page.get_by_role("button", name="Draw a random seed").click()
    assert 0 <= int(page.get_by_label("Seed", exact=True).input_value()) < 2**32


def test_history_by_graph_in_pages_and_deletion(page: Page, site: Site) -> None:
    for number in range(14):
        body = json.dumps({"inputs": {"prompt": f"number {number}"}}).encode()
        headers = {"Content-Type": "application/json", "Prefer": "wait=20"}
        urlopen(Request(f"{site.urls['open']}/v1/graphs/shout/jobs", body, headers), timeout=30).close()
    page.get_by_label("Jobs of").select_option("shout")
    expect(history(page).first).to_contain_text("number 13")
    expect(history(page)).to_have_count(12)
    page.get_by_role("button", name="Show more").click()
    expect(history(page).filter(has_text="number 1,")).to_have_count(0)
    expect(history(page).filter(has_text="number 0")).to_have_count(1)

    remove = history(page).first.get_by_role("button", name="Delete")
    remove.click()
    expect(remove).to_have_text("Delete?")
    page.keyboard.press("Tab")
    expect(remove).to_have_text("")  # leaving it takes the question back
    remove.click()
    remove.click()
    expect(history(page).first).to_contain_text("number 12")
    page.reload()
    page.get_by_label("Jobs of").select_option("shout")
    expect(history(page).first).to_contain_text("number 12")


def test_jobs_have_addresses(page: Page, gate: Gate) -> None:
    gate.let(4)
    start(page, "the first disc")
    finished(page)
    gate.let(4)
    start(page, "the second disc")
    expect(history(page).filter(has_text="second")).to_contain_text("done")
    page.go_back()
    expect(page.locator("#stages .text").first).to_have_text("painting the first disc")
    page.go_forward()
    expect(page.locator("#stages .text").first).to_have_text("painting the second disc")


def test_a_server_with_keys_asks_for_one(tabs: Callable[[], Page], site: Site, gate: Gate) -> None:
    page = tabs()
    page.goto(site.urls["locked"])
    key = page.get_by_label("Key", exact=True)
    expect(key).to_be_focused()
    key.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server does not know this key.")).to_be_visible()
    key.fill(SECRET)
    page.get_by_role("button", name="Use this key").click()
    gate.let(4)
    start(page, "a secret disc")
    finished(page)
    picture = page.get_by_role("img", name="image of paint")
    assert picture.evaluate("image => image.naturalWidth") == SIDE
    assert picture.get_attribute("src").startswith("blob:")  # an <img> can send no key
    assert page.evaluate("[localStorage.length, sessionStorage.getItem('omni.key')]") == [0, SECRET]
    page.reload()
    finished(page)
    page.evaluate("sessionStorage.clear()")
    page.reload()
    expect(key).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#page-error")).to_be_visible()
    expect(page.get_by_role("button", name="API key")).to_be_visible()


def test_everything_comes_from_the_server(tabs: Callable[[], Page], site: Site, gate: Gate) -> None:
    page = tabs()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    visit(page, site.urls["open"])
    gate.let(4)
    start(page, "a disc")
    finished(page)
    strangers = [url for url in asked if not url.startswith((site.urls["open"], "data:"))]
    assert asked
    assert not strangers
