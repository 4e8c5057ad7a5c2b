"""Make the pictures of the README: ``python docs/screenshots.py`` (needs selenium, chromium and chromedriver).

Runs ``cpdebug demo weight-scale`` and writes ``images/bisect.svg``, its end as a terminal shows it, and
``images/report.png``, the head of its HTML report.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from cp_debug.bisect.demos import DEMOS
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import BisectResult
from cp_debug.reports.causes import findings
from cp_debug.reports.page import write_page
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.reports.tables import layer_table
from cp_debug.reports.verdict_line import verdict_line

IMAGES = Path(__file__).parent / "images"
FAULT = "weight-scale"
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"
"""Whatever the reader has: the picture must not fetch a font."""
WIDTH, HEIGHT = 1280, 1540
READY = "return document.getElementById('graph').dataset.ready"


def terminal(result: BisectResult, target: Path) -> None:
    """The command, the layer table and the verdict as an SVG."""
    from rich._export_format import CONSOLE_SVG_FORMAT  # the only template there is to start from

    console = Console(record=True, width=122, file=StringIO(), force_terminal=True)
    test = result.tests[0]
    console.print(Text.assemble(("$ ", "dim"), (f"cpdebug demo {FAULT}", "bold")))
    console.print(Text(f"injected: {DEMOS[FAULT].summary}\n", "dim"))
    console.print(Terminal(layer_table(test)))
    for part in (*findings(test), Text(), verdict_line(test), Text()):
        console.print(part)
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)
    template = re.sub(r"font-family: [^;]+;", f"font-family: {FONTS};", template)
    picture = console.export_svg(title="cpdebug", code_format=template, theme=MONOKAI)
    target.write_text(picture, encoding="utf-8")


def browser(page: Path, target: Path) -> None:
    """The head of a page as a PNG."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.as_uri())
        WebDriverWait(driver, 60).until(lambda d: d.execute_script(READY))
        driver.execute_async_script("setTimeout(arguments[0], 600)")
        driver.save_screenshot(str(target))


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    seeded = DEMOS[FAULT].seed()
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "saved"
        result = bisect(seeded.model, seeded.backends, test_model=seeded.test_model, options=Options(save=saved))
        result.command = f"cpdebug demo {FAULT}"
        terminal(result, IMAGES / "bisect.svg")
        page = Path(scratch) / "report.html"
        write_page(SavedResult.of(result, saved), page)
        browser(page, IMAGES / "report.png")


if __name__ == "__main__":
    main()
