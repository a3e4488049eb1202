"""How long the page of `nacre play` lets a person wait: python benchmarks/play.py RUN

From the command to its first paint in Chromium, and from a key on the depth slider to the first new
tokens of that depth, for the demo's run by default (`nacre grow`, runs/small). Needs the extra
`play`, playwright and Chromium.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROUNDS = 5
PAINTED = """() => performance.timeOrigin
    + performance.getEntriesByName('first-contentful-paint')[0].startTime"""
WATCH = """() => {
    const place = document.querySelector('#continued');
    const depth = () => place.querySelector('h3')?.innerText;
    let before, pressed;
    window.waits = [];
    document.addEventListener('keydown', () => {
        before = depth();
        pressed = performance.now();
    }, true);
    new MutationObserver(() => {
        if (pressed && depth() && depth() != before) {  // a card comes with its first new token
            window.waits.push((performance.now() - pressed) / 1000);
            pressed = undefined;
        }
    }).observe(place, {subtree: true, childList: true, characterData: true});
}"""


def first_paint(browser: Any, run: str) -> tuple[float, Page, subprocess.Popen[str]]:
    """Start the page; return the seconds to its first paint, the page, and its server."""
    started = time.time()
    command = [sys.executable, "-m", "nacre", "play", run]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = next(line.split()[0] for line in server.stderr if line.startswith("http"))
    page = browser.new_context(reduced_motion="reduce").new_page()
    page.goto(address)
    page.wait_for_selector(".masthead")
    return page.evaluate(PAINTED) / 1000 - started, page, server


def slider(page: Page) -> list[float]:
    """Return the seconds from each key on the depth slider to new tokens of that depth."""
    page.get_by_role("button", name="Continue", exact=True).locator("visible=true").click()
    page.wait_for_selector("#continued .card.done", timeout=120_000)
    page.evaluate(WATCH)
    page.locator("#depth input[type=range]").focus()
    for number in range(ROUNDS):
        page.keyboard.press("ArrowRight" if number % 2 else "ArrowLeft")
        page.wait_for_function("count => window.waits.length == count", arg=number + 1)
        page.wait_for_selector("#continued .card.done", timeout=120_000)
    return page.evaluate("window.waits")


def main(run: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        paints = []
        for number in range(3):
            seconds, page, server = first_paint(browser, run)
            paints.append(seconds)
            if number == 2:
                waits = slider(page)
                print(f"first new tokens: {statistics.median(waits):.2f} s ({waits})")
            server.terminate()
            server.wait()
        print(f"first paint: {statistics.median(paints):.1f} s ({paints})")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/small"])
