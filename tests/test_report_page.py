"""The page of runs in a real browser: drawn, searched, by keys alone, in both themes, without a network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_case import CONTRAST, browser, look_at_all, opened, pixels_like
from report_case import CONTROLS, HOSTILE, step_line, write_run

from megarl.report.page import write_page

#: The first two of the page's palette.
BLUE, ORANGE = "#2f7ed8", "#d9600f"

#: Where the keys go: the element's name, and the style of the line around it.
FOCUSED = """() => {
  let one = document.activeElement;
  while (one.shadowRoot?.activeElement) one = one.shadowRoot.activeElement;
  return [one.id || one.name || `${one.tagName} ${one.textContent.slice(0, 30)}`, getComputedStyle(one).outlineStyle];
}"""


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs side by side."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "first"), write_run(folder / "second<b>", steps=20, seed=7)]
    suite = runs[0] / "suites" / "step_000012"
    suite.mkdir(parents=True)
    scores = {"problems": 30, "samples": 4, "score": 0.125, "interval": [0.05, 0.2], "pass": {"1": 0.125, "4": 0.3}}
    (suite / "results.json").write_text(json.dumps({"suite": "math", "benchmarks": {"aime24": scores}}))
    (suite / "aime24.jsonl").write_text(
        json.dumps({"problem": "p", "answer": "1", "response": "2", "right": False}) + "\n"
    )
    return write_page(runs, folder / "report.html").file


def rows(page: Any) -> list[list[str]]:
    """The cells of the rows that are shown."""
    return page.eval_on_selector_all("#rows tbody tr", "all => all.map(row => [...row.cells].map(c => c.textContent))")


def set_filter(page: Any, name: str, value: str) -> None:
    place = page.locator(f"#filters [name={name}]")
    if place.evaluate("node => node.tagName") == "SELECT":
        place.select_option(value)
    else:
        place.fill(value)
    page.wait_for_timeout(250)


def test_curves_of_both_runs_are_drawn(started: Any, file: Path) -> None:
    with opened(started, file) as page:
        look_at_all(page)
        titles = page.eval_on_selector_all(".charts figcaption", "all => all.map(one => one.textContent)")
        assert titles[0] == "mean reward" and "|policy - engine| log-prob" in titles
        assert "mean reward by level, a column of the data" in titles and "phases of every rank" in titles
        for title in ("mean reward", "entropy (nats)", "weight pushes of a step, slowest rank (s)"):
            chart = page.locator(".charts figure", has=page.get_by_text(title, exact=True)).locator(".chart")
            chart.scroll_into_view_if_needed()
            assert pixels_like(chart, ORANGE) > 100, title
        reward = page.locator(".charts .chart").first
        assert reward.get_attribute("aria-label").startswith("mean reward. first: 0.1813 first, 0.9093 last")
        reward.scroll_into_view_if_needed()
        assert pixels_like(reward, BLUE) > 100
        # The second run's curve reaches step 20.
        label = page.locator("#times .chart").first.get_attribute("aria-label")
        assert label == (
            "phases of every rank, step 12: push 0.500 to 0.500 s, generate 2.000 to 2.300 s, update 1.000 to 1.000 s"
        )
        page.select_option("#time-run", label="second<b>")
        page.click("#time-before")
        assert "step 19" in page.locator("#times .chart").first.get_attribute("aria-label")
        bars = page.locator("#times .chart").first
        bars.scroll_into_view_if_needed()
        page.wait_for_timeout(400)
        assert pixels_like(bars, ORANGE) > 5_000
        assert page.locator("tr.differ th").all_text_contents()[0].startswith("name")
        assert page.get_by_text("5.0 to 20.0").count() == 1


def test_samples_are_filtered_and_paged(started: Any, file: Path) -> None:
    with opened(started, file) as page:
        # Of training first, the newest before the others: 7 rows a step.
        assert page.inner_text("#found") == f"{7 * 32} of {7 * 32 + 8 * 8 + 1} samples"
        assert len(rows(page)) == 25 and rows(page)[0][:3] == ["second<b>", "training", "20"]
        page.click("#page-after")
        assert page.inner_text("#page-number") == "page 2 of 9"
        set_filter(page, "run", "0")
        set_filter(page, "step_low", "11")
        assert page.inner_text("#found").startswith("14 of") and page.inner_text("#page-number") == "page 1 of 1"
        set_filter(page, "reward_low", "1")
        assert {row[6] for row in rows(page)} == {"1"}
        set_filter(page, "text", "TOOLdone")
        assert len(rows(page)) == 2
        page.click("text=Clear")
        page.wait_for_timeout(250)
        assert page.inner_text("#found").startswith("289 of")
        set_filter(page, "source", "arithmetic")
        assert {row[1] for row in rows(page)} == {"evaluation"}
        page.click("text=Clear")
        set_filter(page, "place", "2")
        assert [row[1] for row in rows(page)] == ["step_000012: aime24"]
        page.click("#rows tbody tr")
        assert page.locator("#sample dd", has_text="no").count() == 1


def test_a_sample_shows_thinking_turns_tree_and_advantages(started: Any, file: Path) -> None:
    def parts(page: Any) -> list[tuple[str, str]]:
        found = page.eval_on_selector_all(
            "#sample .part", "all => all.map(p => [p.textContent, p.nextSibling.innerText])"
        )
        return [
            (name, text) for name, text in found if name not in ("prompt", "reference", "others of the same prompt")
        ]

    with opened(started, file) as page:
        set_filter(page, "text", "step by step")
        page.click("#rows tbody tr")
        assert parts(page) == [("thinking", "+1.5<think>step by step</think>"), ("answer", "-0.5It is 7.")]
        token = page.locator("#sample .token").nth(8)
        assert token.get_attribute("title") == "token 9, advantage +1.5" and "p4" in token.get_attribute("class")
        assert "n2" in page.locator("#sample .token").last.get_attribute("class")
        set_filter(page, "text", "TOOLdone")
        page.click("#rows tbody tr")
        turns = [("response", "+0.25ask>"), ("environment", "TOOL"), ("response", "-2done")]
        assert parts(page) == turns
        assert page.locator("#sample .token").nth(5).get_attribute("title") == "token 6, not trained"
        set_filter(page, "text", "root and rest")
        page.click("#rows tbody tr")
        tree = page.locator("#sample .tree")
        assert tree.count() == 2 and tree.nth(1).inner_text() == "3.0.0: reward 1 from token 6 on"
        page.click("#sample .tree .tree button")
        assert page.inner_text("#sample h3").endswith("sample 3.0.0") and parts(page)[0][
            1
        ] == "root a\n+0.75\nnd rest".replace("\n", "")


def test_what_a_sample_brings_is_text(started: Any, file: Path) -> None:
    with opened(started, file) as page:
        set_filter(page, "text", "window.hacked")
        assert len(rows(page)) == 25
        page.click("#rows tbody tr")
        page.wait_for_timeout(200)
        shown = page.inner_text("#sample .said >> nth=2")
        assert HOSTILE in shown and "bell␇ escape␛[31m nothing␀ turned ‹U+202E›drawkcab" in shown
        assert CONTROLS[-20:] in shown and "separator \u2028" in page.evaluate(
            "document.querySelectorAll('#sample .said')[2].textContent"
        )
        assert page.evaluate("window.hacked") is None and page.locator("#sample img, #sample script").count() == 0
        assert page.locator("td b, th b, h1 b").count() == 0 and "second<b>" in page.inner_text("h1")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(started: Any, file: Path, theme: Any) -> None:
    """At least 4.5 to 1, which WCAG asks of its level AA; charts' texts and lines among them."""
    with opened(started, file, color_scheme=theme) as page:
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        look_at_all(page)
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        for text in ("step by step", "TOOLdone", "window.hacked", "root and rest"):
            set_filter(page, "text", text)
            page.click("#rows tbody tr")
            # All tints, though one sample has two.
            page.eval_on_selector_all(
                "#sample .token",
                "all => all.slice(0, 8).forEach((one, k) => one.className = 'token ' + 'pn'[k % 2] + (1 + (k >> 1)))",
            )
            contrast, where = page.evaluate(CONTRAST)
            assert contrast >= 4.5, where
        colours = page.evaluate(
            "Bokeh.documents.map((one) => one.roots()[0])"
            ".map((one) => [one.background_fill_color, one.below[0].major_label_text_color])"
        )
        assert len(colours) > 10 and set(map(tuple, colours)) == {
            {"light": ("#ffffff", "#57606a"), "dark": ("#14171c", "#a5adb8")}[theme]
        }
        assert contrast_of(*colours[0]) >= 4.5
        assert min(contrast_of(colours[0][0], one) for one in page.evaluate("PALETTE")) >= 3
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") != theme
        assert page.evaluate("Bokeh.documents[0].roots()[0].background_fill_color") != colours[0][0]


def contrast_of(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_everything_can_be_reached_by_keys(started: Any, file: Path) -> None:
    with opened(started, file) as page:
        reached = []
        for _ in range(120):
            page.keyboard.press("Tab")
            where = page.evaluate(FOCUSED)
            reached.append(where[0])
            assert where[1] != "none" or where[0].startswith("BODY"), where
        wanted = {"theme", "time-run", "time-moment", "time-before", "run", "place", "step_low", "reward_high", "text"}
        assert wanted | {"page-after", "page-last"} <= set(reached)
        assert reached[0].startswith("A To the samples")
        assert any(one.startswith("TR ") for one in reached) and any(
            "step" in one for one in reached if "BUTTON" in one
        )
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.name") == "text"
        page.keyboard.type("np/ ")
        assert page.input_value("#filters [name=text]") == "np/ "
        page.fill("#filters [name=text]", "")
        page.wait_for_timeout(250)
        page.keyboard.press("Escape")
        for _ in range(3):
            page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.rowIndex") == 4
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "sample" and page.is_visible("#sample")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
        page.keyboard.press("n")
        assert page.inner_text("#page-number").startswith("page 2 of")
        page.keyboard.press("p")
        assert page.inner_text("#page-number").startswith("page 1 of")


def test_a_page_that_is_followed_loads_itself_again(started: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    file = write_page([run], tmp_path / "live.html", reload=3).file
    with opened(started, file) as page:
        page.uncheck("#reloads")
        set_filter(page, "text", "step by step")
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps(step_line(5)) + "\n" + '{"step": 6, "lo')
        write_page([run], file)
        page.check("#reloads")
        page.wait_for_selector("text=the last line is unfinished", timeout=20_000)
        page.wait_for_selector("html[data-ready]")
        # What was filtered is, and the last page stays as it is.
        assert page.input_value("#filters [name=text]") == "step by step" and len(rows(page)) == 4
        assert page.is_hidden("#live")


def test_a_hundred_thousand_samples_stay_usable(started: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    row = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    with open(run / "samples.jsonl", "w") as out:
        for number in range(100_000):
            row |= {"step": 1 + number // 16, "prompt_index": number // 8, "sample_index": number % 8}
            row |= {"prompt": f"What is {number} + {number * 7919 % 1000}?", "reward": float(number % 3 == 0)}
            out.write(json.dumps(row) + "\n")
    written = write_page([run], tmp_path / "report.html")
    print(f"page of 100,000 samples: {written.sentence()}")
    assert written.size < 12e6 and written.remarks == ()
    start = time.perf_counter()
    with opened(started, written.file) as page:
        print(f"opened in {time.perf_counter() - start:.2f} s")
        assert page.inner_text("#found") == "100000 of 100000 samples" or "of 100004" in page.inner_text("#found")
        assert page.locator("#rows tbody tr").count() == 25
        for name, value, found in (("text", "What is 77777 +", 1), ("reward_low", "1", 0), ("text", "", 33334)):
            taken = page.evaluate(
                "([name, value]) => new Promise((done) => { const start = performance.now();"
                "const place = document.querySelector(`#filters [name=${name}]`); place.value = value;"
                "new MutationObserver(() => done(performance.now() - start)).observe(document.getElementById('found'),"
                " { childList: true, characterData: true, subtree: true });"
                "place.dispatchEvent(new Event('input', { bubbles: true })); })",
                [name, value],
            )
            print(f"filter {name}={value!r}: {taken:.0f} ms")
            assert taken < 5_000
            assert page.inner_text("#found").startswith(f"{found} of 10000")
        page.click("#page-last")
        assert page.inner_text("#page-number") == "page 1334 of 1334"
