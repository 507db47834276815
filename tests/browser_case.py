"""A real browser without a window, in which tests open pages: launch/browser.sh finds or fetches one."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

#: The least contrast of any text with what lies behind it, over all that can be seen, and that text.
CONTRAST = """() => {
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
  const channels = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3])).concat(1);
  const behind = (node) => {
    const layers = [];
    for (let one = node; one; one = one.parentElement) layers.push(channels(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  let least = [99, ""];
  for (const node of document.querySelectorAll("body *")) {
    if (node.closest("script, .chart") || !node.checkVisibility()) continue;
    const text = [...node.childNodes].filter((one) => one.nodeType === 3).map((one) => one.textContent.trim()).join("");
    if (!text) continue;
    const back = behind(node), front = over(channels(getComputedStyle(node).color), back);
    const [high, low] = [luminance(front), luminance(back)].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least[0]) least = [contrast, text.slice(0, 40)];
  }
  return least;
}"""


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """The browser; skips the test where there is none and none can be fetched."""
    from playwright.sync_api import sync_playwright

    found = subprocess.run(["bash", str(ROOT / "launch" / "browser.sh")], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found.stdout.strip(), args=["--no-sandbox"])
        yield started
        started.close()


@contextlib.contextmanager
def opened(started: Any, file: Path, **settings: Any) -> Iterator[Any]:
    """The page in `file`, by file://, once its samples are there; fails on an error, a dialog or a request that it
    makes."""
    context = started.new_context(viewport={"width": 1280, "height": 900}, **settings)
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda said: faults.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith(("file:", "blob:")) else None)
    page.goto(file.resolve().as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    yield page
    assert faults == []
    context.close()


def look_at_all(page: Any) -> None:
    """Scroll through the page, so that all charts are drawn."""
    for place in range(0, page.evaluate("document.body.scrollHeight"), 600):
        page.evaluate(f"scrollTo(0, {place})")
        page.wait_for_timeout(30)
    page.wait_for_function(
        "[...document.querySelectorAll('.charts .chart')].filter((one) => one.checkVisibility())"
        ".every((one) => one.childElementCount)"
    )
    # A figure is drawn in the frames after it is there.
    page.wait_for_timeout(700)


def pixels_like(place: Any, colour: str) -> int:
    """How many pixels of an element have very nearly this colour (#rrggbb)."""
    picture = np.asarray(Image.open(io.BytesIO(place.screenshot())).convert("RGB")).astype(int)
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((np.abs(picture - wanted).max(axis=2) < 12).sum())
