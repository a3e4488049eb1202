"""The page in a real browser: every tab, wrong input, a live run, two people, phone and dark mode.

Needs gradio, playwright and Debian's Chromium; without them the tests are skipped, but not in CI.
`NACRE_AXE` names axe.min.js (of `npm pack axe-core`) for the check of accessibility.
`NACRE_PLAY_PICTURES=RUN:COMPOSITION:STUDY` makes the pictures of the documents of these folders.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from nacre import composition
from nacre.play import app, given
from nacre.train.folder import held

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WAIT = 120_000  # milliseconds; the first event of a page imports torch
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
TABS = ("Grow", "Compose", "Substrate", "Run", "Study")

MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # those of Gradio and its server
    pytest.mark.skipif(
        bool(MISSING) and os.environ.get("CI") != "true", reason=f"needs {', '.join(MISSING)}"
    ),
]

Open = Callable[..., Any]


@contextmanager
def served(*paths: Path) -> Iterator[str]:
    """Serve a page from a thread; give its address."""
    import uvicorn

    listening = app.listen("127.0.0.1", 0)
    page = app.application(given.look(paths))
    config = uvicorn.Config(
        page, log_level="critical", timeout_graceful_shutdown=1, timeout_keep_alive=60
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def address(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page of a run, a composition and a study."""
    root = tmp_path_factory.mktemp("play")
    stages = [tiny_run / "stages/01", tiny_run / "stages/02"]
    composition.compose(stages, root / "both", names=["low", "high"])
    (root / "study").mkdir()
    shutil.copy(ROOT / "docs/results/growth.json", root / "study/results.json")
    with served(tiny_run, root / "both", root / "study") as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Open a page as a new person; whatever it asks for must be on this machine."""
    asked: list[str] = []
    faults: list[str] = []
    people: list[Any] = []

    def open_page(url: str, tab: str = "", size: Any = DESKTOP, theme: str = "light") -> Any:
        person = chromium.new_context(
            viewport=size, color_scheme=theme, reduced_motion="reduce", device_scale_factor=1
        )
        people.append(person)
        page = person.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".masthead")
        if tab:
            page.get_by_role("tab", name=tab).click()
        return page

    yield open_page
    for person in people:
        person.close()
    local = [url for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")]
    assert local or not people
    assert {urlsplit(url).hostname for url in local} <= {"127.0.0.1"}
    assert not faults


def filled(page: Any, label: str) -> Any:
    """Return a text box once the page has put text into it and lets a person type."""
    box = page.get_by_label(label, exact=True).locator("visible=true")
    ready = "box => box.value.length > 0 && !box.disabled"
    page.wait_for_function(ready, arg=box.element_handle())
    return box


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def done(page: Any, cards: int) -> list[str]:
    """Wait until so many continuations are finished; return them."""
    finished = page.locator("#continued .card.done p")
    page.wait_for_function(f"document.querySelectorAll('#continued .card.done').length == {cards}")
    return finished.all_inner_texts()


def test_a_text_is_continued_at_every_depth(address: str, visit: Open) -> None:
    page = visit(address, "Grow")
    filled(page, "Prompt").fill("def ")
    press(page, "All depths side by side")
    texts = done(page, 3)
    assert all(text.startswith("def ") for text in texts)
    assert page.locator("#continued h3").all_inner_texts() == ["1 block", "2 blocks", "3 blocks"]
    slider = page.locator("#depth input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('#continued h3')?.innerText == '2 blocks'")
    assert done(page, 1) == texts[1:2]  # the same prompt and seed


def test_losses_are_shown_and_wrong_input_is_said(address: str, visit: Open) -> None:
    page = visit(address, "Grow")
    text = filled(page, "Text")
    text.fill("")
    press(page, "Show the loss")
    page.wait_for_selector("#losses [role=alert]")
    assert "The text: there is none" in page.locator("#losses").inner_text()
    text.fill("for x in y:")
    press(page, "Show the loss")
    page.wait_for_selector("#losses .token")
    shown = page.locator("#losses .tokens").inner_text()
    assert shown == "for x in y:"
    page.get_by_label("Second depth").last.check()
    page.wait_for_selector("#losses .token.loss")


def test_experts_are_chosen_weighed_and_coloured(address: str, visit: Open) -> None:
    page = visit(address, "Compose")
    filled(page, "Prompt").fill("def ")
    press(page, "Continue")
    page.wait_for_selector("#mixed .token.new.e0, #mixed .token.new.e1")
    assert page.locator("#mixed .legend li").count() == 2
    assert page.locator("#mixed svg").count() == 2
    page.get_by_role("checkbox", name="tiny", exact=True).check()
    page.wait_for_function("document.querySelector('#experts').innerText.match(/yes/g).length == 3")
    press(page, "Continue")
    page.wait_for_function("document.querySelectorAll('#mixed .legend li').length == 3")
    for name in ("low", "high", "tiny"):
        page.get_by_role("checkbox", name=name, exact=True).uncheck()
    press(page, "Continue")
    page.wait_for_selector("#mixed [role=alert]")
    assert "Experts: none is chosen" in page.locator("#mixed").inner_text()


def test_the_substrate_is_drawn_and_its_map_follows_the_keys(address: str, visit: Open) -> None:
    page = visit(address, "Substrate")
    page.wait_for_selector("#glyphs img")
    page.get_by_label("String", exact=True).fill("b")
    page.wait_for_function("document.querySelector('#nearest b') !== null")
    page.wait_for_selector("#map canvas")
    page.locator("#map > * canvas").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#map .seen b")
    first = page.locator("#map .seen").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#map .seen").inner_text() != first
    page.get_by_label("Text", exact=True).locator("visible=true").fill("")
    page.wait_for_selector("#glyphs [role=alert]")


def test_a_live_run_is_followed_and_checked(visit: Open, tiny_run: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    shutil.copytree(tiny_run, live)
    shutil.rmtree(live / "stages/03")
    metrics = live / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    third = [line for line in lines if json.loads(line)["stage"] == 3]
    metrics.write_text("".join(lines[: -len(third) + 1]))
    with served(live) as url:
        with held(live):
            page = visit(url, "Run")
            page.wait_for_selector("#run .status.live")
            before = page.locator("#run .tiles").inner_text()
            with metrics.open("a") as file:
                file.write("".join(third[1:]))
            page.wait_for_function(
                "before => document.querySelector('#run .tiles').innerText != before", arg=before
            )
        page.wait_for_selector("#run .status.stopped")
        press(page, "Check every tensor against the ledger")
        page.wait_for_selector("#checked .good")
        page.get_by_role("tab", name="Study").click()
        assert page.get_by_text("No study to compare").is_visible()
        page.get_by_role("tab", name="Compose").click()
        assert page.get_by_text("Nothing to compose").is_visible()


def test_a_study_shows_its_verdicts_and_charts(address: str, visit: Open) -> None:
    page = visit(address, "Study")
    page.wait_for_selector("#study picture img")
    claims = json.loads((ROOT / "docs/results/growth.json").read_text())["claims"]
    assert page.locator("#study .verdict").count() == len(claims)
    assert page.locator("#study svg.wide .mark").count() > 10


def test_two_people_at_once_each_get_their_own(address: str, visit: Open) -> None:
    people = [visit(address, "Grow") for _ in range(2)]
    prompts = ["def one", "class Two"]
    for page, prompt in zip(people, prompts, strict=True):
        filled(page, "Prompt").fill(prompt)
    for page in people:
        press(page, "All depths side by side")
    for page, prompt in zip(people, prompts, strict=True):
        assert all(text.startswith(prompt) for text in done(page, 3))


def look_at(page: Any, tab: str) -> None:
    """Open a tab and wait until what it shows is there."""
    page.get_by_role("tab", name=tab).click()
    if tab == "Grow":
        filled(page, "Prompt")
        press(page, "All depths side by side")
        page.wait_for_selector("#continued .card.done")
        press(page, "Show the loss")
        page.wait_for_selector("#losses .token")
    elif tab == "Compose":
        filled(page, "Prompt")
        press(page, "Continue")
        page.wait_for_selector("#mixed .token.new, #mixed [role=alert]")
    else:
        wanted = {"Substrate": "#map canvas", "Run": "#run .status", "Study": "#study picture"}
        page.wait_for_selector(wanted[tab])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(address: str, visit: Open, theme: str) -> None:
    script = os.environ.get("NACRE_AXE")
    if script is None:
        pytest.skip("NACRE_AXE does not name axe.min.js (of `npm pack axe-core`)")
    page = visit(address, theme=theme)
    found: list[str] = []
    for tab in TABS:
        look_at(page, tab)
        page.add_script_tag(path=script)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found += [
            f"{tab}: {fault['id']}: {node['html'][:160]}"
            for fault in result["violations"]
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"][:3]
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_everything_in_its_width(address: str, visit: Open, theme: str) -> None:
    page = visit(address, size=PHONE, theme=theme)
    for tab in TABS:
        look_at(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], tab


def test_the_keyboard_alone_is_enough(address: str, visit: Open) -> None:
    page = visit(address, "Grow")
    filled(page, "Prompt")
    page.get_by_role("tab", name="Grow").focus()
    reached: set[str] = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.innerText || document.activeElement.type")
        )
    assert {"Continue", "All depths side by side", "textarea", "range"} <= reached


@pytest.mark.skipif("NACRE_PLAY_PICTURES" not in os.environ, reason="makes pictures when asked to")
def test_pictures_for_the_documents(visit: Open) -> None:
    from PIL import Image

    run, mixed, compared = map(Path, os.environ["NACRE_PLAY_PICTURES"].split(":"))
    views: Sequence[tuple[str, Any, str]] = [
        ("", {"width": 1080, "height": 900}, "light"), ("-phone-dark", PHONE, "dark"),
    ]  # fmt: skip
    for folder, tabs in (
        (run, ("Grow", "Substrate", "Run")), (mixed, ("Compose",)), (compared, ("Study",)),
    ):  # fmt: skip
        with served(folder) as url:
            for suffix, size, theme in views:
                page = visit(url, size=size, theme=theme)
                for tab in tabs:
                    look_at(page, tab)
                    page.mouse.move(5, 5)
                    time.sleep(2)
                    tall = min(page.evaluate("document.body.scrollHeight"), 1.9 * size["height"])
                    clip = {"x": 0, "y": 0, "width": size["width"], "height": tall}
                    path = ROOT / f"docs/images/play-{tab.lower()}{suffix}.png"
                    page.screenshot(path=path, full_page=True, clip=clip)
                    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)
