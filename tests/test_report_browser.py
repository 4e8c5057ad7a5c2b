"""The page in a real browser: it sorts, filters and expands, by keyboard too, and asks a network for nothing."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
from extras import needs
from onnx import TensorProto, helper
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_report import save_faulty

from cp_debug.bisect.result import GUILTY
from cp_debug.reports.page import write_page
from cp_debug.reports.saved import SavedResult

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--window-size=1280,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedResult:
    return SavedResult.open(save_faulty(tmp_path_factory.mktemp("net")))


@pytest.fixture(scope="module")
def driver(saved: SavedResult, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as running:
        yield running


@pytest.fixture
def page(driver: Any, saved: SavedResult, tmp_path: Path) -> Iterator[Any]:
    """The open page; afterwards the console must be empty and nothing may have been asked for but the file."""
    write_page(saved, tmp_path / "report.html")
    address = (tmp_path / "report.html").as_uri()
    driver.get_log("performance")
    driver.get(address)
    yield driver
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = {r["request"]["url"] for r in requests if r["documentURL"].startswith(address)}  # not the browser's own
    assert {url for url in asked if not url.startswith("data:")} == {address}


def names(page: Any, script: str = "") -> list[str]:
    """The layers that the first table shows, after ``script`` ran with ``table`` and ``form``."""
    return page.execute_script(
        "const table = document.querySelector('table.layers'), form = document.querySelector('.filters');"
        f"{script}; const shown = [...table.tBodies[0].rows].filter(row => !row.hidden);"
        "return shown.map(row => row.querySelector('summary').innerText)"
    )


def head(page: Any, name: str) -> Any:
    return page.find_element("xpath", f"(//table[contains(@class,'layers')])[1]//th[button='{name}']")


def test_the_table_sorts_by_mouse_and_keyboard(page: Any, saved: SavedResult) -> None:
    test = saved.result.tests[0]
    excess = head(page, "excess")
    excess.find_element("tag name", "button").click()
    assert excess.get_attribute("aria-sort") == "descending"
    assert names(page)[0] == test.guilty[0].name
    assert len(page.find_elements("css selector", "table.layers:first-of-type th[aria-sort]")) == len(
        saved.result.tests
    )
    excess.find_element("tag name", "button").send_keys("\ue007")  # Enter
    assert excess.get_attribute("aria-sort") == "ascending"
    head(page, "#").find_element("tag name", "button").click()
    assert names(page) == [row.name for row in test.rows]
    head(page, "layer").find_element("tag name", "button").click()
    assert sorted(names(page), key=str.lower) == sorted((row.name for row in test.rows), key=str.lower)
    assert names(page) != [row.name for row in test.rows]


def test_the_table_filters(page: Any, saved: SavedResult) -> None:
    test = saved.result.tests[0]
    search = page.find_element("css selector", ".filters input[type=search]")
    search.send_keys("CONV")
    wanted = [row.name for row in test.rows if "conv" in f"{row.name} {row.onnx} {row.op}".lower()]
    assert names(page) == wanted
    chosen = "form.querySelector('[data-filter=verdict]').value = 'guilty'; form.dispatchEvent(new Event('input'))"
    assert names(page, chosen) == [row.name for row in test.rows if row.verdict == GUILTY]
    assert page.find_element("css selector", ".filters output").text == f"1 of {len(test.rows)} layers"
    search.send_keys("\ue007")  # submitting the form must not load the page again
    assert names(page) == [test.guilty[0].name]


def test_details_open_by_keyboard_and_from_the_chart(page: Any, saved: SavedResult) -> None:
    row = page.find_element("css selector", "table.layers tbody tr")
    row.find_element("tag name", "summary").send_keys("\ue00d")  # Space
    assert row.find_element("tag name", "details").get_attribute("open")
    assert row.find_element("css selector", "dl.pairs").is_displayed()
    page.execute_script(
        "document.querySelector('svg.growth a').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    guilty = page.find_element("id", f"t0-layer-{saved.result.tests[0].guilty[0].index}")
    assert guilty.find_element("tag name", "details").get_attribute("open")
    assert page.switch_to.active_element == guilty.find_element("tag name", "summary")


def test_everything_that_works_by_mouse_can_be_reached_by_tab(page: Any) -> None:
    unreachable = page.execute_script(
        "return [...document.querySelectorAll('a[href], button, input, select, summary, .scroll')]"
        ".filter(e => e.tabIndex < 0).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unreachable == []


def opened_graph(page: Any) -> None:
    page.execute_script("document.getElementById('graph').scrollIntoView()")
    WebDriverWait(page, 60).until(lambda d: d.execute_script("return document.getElementById('graph').dataset.ready"))


def shown_nodes(page: Any) -> list[str]:
    return page.execute_script(
        "return document.getElementById('graph').graph.cy.nodes(':childless').map(n => n.data('label'))"
    )


def tap(page: Any, which: str) -> None:
    """A click with the mouse on the first node that the selector finds, brought into view before."""
    page.execute_async_script(
        "const done = arguments[1], {cy, idle} = document.getElementById('graph').graph;"
        "const node = cy.nodes(arguments[0])[0]; cy.zoom(1); cy.center(node);"
        "setTimeout(() => { node.emit('tap'); idle().then(done); }, 50)",
        which,
    )


def test_the_graph_shows_the_guilty_layer_its_charts_and_its_row(page: Any, saved: SavedResult) -> None:
    opened_graph(page)
    guilty = saved.result.tests[0].guilty[0]
    about = page.find_element("css selector", ".graph-about")
    assert guilty.name in about.text  # chosen from the start
    assert len(about.find_elements("css selector", "svg.chart")) == 4
    assert len(shown_nodes(page)) == len(saved.result.tests[0].rows)
    tap(page, f"#n{saved.result.tests[0].rows[1].index}")
    assert saved.result.tests[0].rows[1].name in about.text
    about.find_element("tag name", "a").click()
    row = page.find_element("id", f"t0-layer-{saved.result.tests[0].rows[1].index}")
    assert row.find_element("tag name", "details").get_attribute("open")


def test_the_graph_is_searched_and_walked_by_keyboard(page: Any, saved: SavedResult) -> None:
    opened_graph(page)
    search = page.find_element("css selector", "#graph input[type=search]")
    search.send_keys("concat\ue007")
    about = page.find_element("css selector", ".graph-about h3")
    (concat,) = [row.name for row in saved.result.tests[0].rows if row.op == "Concat"]
    WebDriverWait(page, 20).until(lambda d: d.find_element("css selector", ".graph-about h3").text == concat)
    assert page.find_element("css selector", "#graph output").text.startswith("1 of")
    assert [e.text for e in page.find_elements("css selector", ".graph-found button")] == [concat]
    page.find_element("css selector", ".graph-canvas").send_keys("\ue015")  # down: the layer that reads it
    about = page.find_element("css selector", ".graph-about")
    assert concat not in about.text
    assert "Conv" in about.text


@pytest.mark.slow
def test_three_thousand_layers_come_folded_and_open_on_demand(driver: Any, saved: SavedResult, tmp_path: Path) -> None:
    write_page(many_layers(saved, 3000, tmp_path), tmp_path / "many.html")
    driver.get((tmp_path / "many.html").as_uri())
    opened_graph(driver)
    assert len(shown_nodes(driver)) < 100
    (folded,) = [label for label in shown_nodes(driver) if label.startswith("▸ stage.3 ")]
    before = len(shown_nodes(driver))
    tap(driver, f"[label = '{folded}']")
    assert len(shown_nodes(driver)) > before + 5
    assert driver.get_log("browser") == []


@pytest.mark.slow
def test_a_healthy_network_is_shown_whole(driver: Any, saved: SavedResult, tmp_path: Path) -> None:
    result = many_layers(saved, 90, tmp_path).result
    healthy = replace(result.tests[0], rows=[replace(row, verdict="ok") for row in result.tests[0].rows], findings=[])
    write_page(SavedResult.of(replace(result, tests=[healthy])), tmp_path / "healthy.html")
    driver.get((tmp_path / "healthy.html").as_uri())
    opened_graph(driver)
    seen, all_of_it, zoom = driver.execute_script(
        "const {cy} = document.getElementById('graph').graph, a = cy.extent(), b = cy.elements().boundingBox();"
        "return [[a.x1, a.y1, a.x2, a.y2], [b.x1, b.y1, b.x2, b.y2], cy.zoom()]"
    )
    assert zoom >= 0.55, "names can be read"
    assert seen[0] <= all_of_it[0]
    assert seen[1] <= all_of_it[1]
    assert seen[2] >= all_of_it[2]
    assert seen[3] >= all_of_it[3]


def many_layers(saved: SavedResult, count: int, folder: Path) -> SavedResult:
    """The result as if its network had ``count`` layers, in stages of 300 and blocks of ten."""
    test, nodes, rows = saved.result.tests[0], [], []
    for i in range(count):
        name = f"/stage.{i // 300}/block.{i // 10 % 30}/Relu_{i}"
        nodes.append(helper.make_node("Relu", [f"v{i - 1}" if i else "x"], [f"v{i}"], name=name))
        base = test.rows[1 + i % 8]
        rows.append(replace(base, index=i, name=name, onnx=f"v{i}", op="Relu"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", f"v{count - 1}")]
    graph = helper.make_graph(nodes, "many", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "many.onnx")
    many = replace(test, rows=rows, outputs=rows[-1:], stages=[])
    return SavedResult.of(replace(saved.result, tests=[many], programs={"net": str(folder / "many.onnx")}))


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_makes_the_page_scroll_sideways(page: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
@needs("axe_playwright_python")
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)])
def test_axe_finds_no_barrier(page: Any, theme: str, width: int) -> None:
    spec = find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.origin is not None
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        choose_theme(page, theme)
        opened_graph(page)
        page.execute_script(
            "document.querySelectorAll('details')"
            ".forEach((d, i) => { if (!d.closest('td') || i % 9 === 0) d.open = true })"
        )
        page.execute_script((Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
        page.set_script_timeout(200)
        found = page.execute_async_script("axe.run().then(arguments[0], e => arguments[0]({violations: [String(e)]}))")
        assert len(found["passes"]) > 20
        said = [(v["id"], v["help"], [n["html"][:150] for n in v["nodes"][:3]]) for v in found["violations"]]
        assert said == []
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        choose_theme(page, "system")


def choose_theme(page: Any, name: str) -> None:
    Select(page.find_element("css selector", ".theme select")).select_by_value(name)


def test_the_theme_is_chosen_and_remembered(page: Any) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    try:
        light = page.execute_script(colour)
        choose_theme(page, "dark")
        dark = page.execute_script(colour)
        assert dark != light
        page.refresh()
        assert page.execute_script(colour) == dark
        choose_theme(page, "system")
        assert page.execute_script(colour) == light
    finally:
        choose_theme(page, "system")
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_growth_chart_shows_a_part(page: Any, saved: SavedResult) -> None:
    rows = saved.result.tests[0].rows
    (guilty,) = [i for i, row in enumerate(rows) if row.verdict == GUILTY]
    strip = page.find_element("css selector", ".overview")
    assert strip.find_element("tag name", "output").text == f"all {len(rows)} layers"
    strip.find_element("css selector", "[data-do=in]").send_keys("\ue007")
    first, last = map(int, re.findall(r"\d+", strip.find_element("tag name", "output").text)[:2])
    assert first <= guilty <= last
    assert last - first < len(rows) * 0.6
    mark = page.find_element("css selector", "svg.growth circle.guilty")
    chart = page.find_element("css selector", "svg.growth").rect
    assert chart["x"] < mark.rect["x"] < chart["x"] + chart["width"]
    picture = strip.find_element("tag name", "svg")
    width = picture.rect["width"]
    drag = ActionChains(page).move_to_element_with_offset(picture, int(-width / 2) + 3, 0).click_and_hold()
    drag.move_by_offset(int(width * 0.3), 0).release().perform()
    first, last = map(int, re.findall(r"\d+", strip.find_element("tag name", "output").text)[:2])
    assert (first, last) == (0, pytest.approx(len(rows) * 0.3, abs=2))
    strip.find_element("css selector", "[data-do=all]").click()
    assert strip.find_element("tag name", "output").text == f"all {len(rows)} layers"


def test_guilty_rows_stay_in_sight(page: Any, saved: SavedResult) -> None:
    guilty = saved.result.tests[0].guilty[0]
    box = page.find_element("css selector", ".tall:has(table.layers)")
    page.execute_script("arguments[0].scrollTop = arguments[0].scrollHeight", box)
    (pinned,) = page.find_elements("css selector", "section:has(#t0-title) .pinned")
    assert guilty.name in pinned.text
    top = page.execute_script("return arguments[0].getBoundingClientRect().top", box)
    assert abs(page.execute_script("return arguments[0].getBoundingClientRect().top", pinned) - top) < 60
    pinned.find_element("tag name", "a").click()
    row = page.find_element("id", f"t0-layer-{guilty.index}")
    assert row.find_element("tag name", "details").get_attribute("open")


@pytest.mark.parametrize("width", [360, 400])
def test_nothing_is_cut_at_the_width_of_a_phone(page: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        cut = page.execute_script(
            "return [...document.querySelectorAll('.badge, button, .key, h1, h2, h3, h4, .facts div')]"
            ".filter(e => e.checkVisibility() && (r => r.left < 0 || r.right > innerWidth + 1"
            " || e.scrollWidth > e.clientWidth + 2 && getComputedStyle(e).display !== 'inline')"
            "(e.getBoundingClientRect())).map(e => e.outerHTML.slice(0, 120))"
        )
        assert cut == []
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_and_print(page: Any) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        colours.add(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(colours) == 2
    printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
