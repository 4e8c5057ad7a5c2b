"""Make the pictures of the report's page: ``python docs/report_screenshots.py`` (needs selenium, chromium, pillow).

Runs ``cpdebug demo weight-scale`` and writes the page at 1400 and 400 pixels, light and dark, and its layer graph.
"""

from __future__ import annotations

import base64
import shutil
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from cp_debug.bisect.demos import DEMOS
from cp_debug.bisect.engine import Options, bisect
from cp_debug.reports.page import write_page
from cp_debug.reports.saved import SavedResult

IMAGES = Path(__file__).parent / "images"
FAULT = "weight-scale"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
READY = "return document.getElementById('graph').dataset.ready"


def picture(driver: Any, target: Path, selector: str, width: int, height: int) -> None:
    """Write the page as a PNG, from the top of an element on."""
    driver.execute_script("document.querySelector(arguments[0]).scrollIntoView()", selector)
    top = driver.execute_script(
        "return document.querySelector(arguments[0]).getBoundingClientRect().top + scrollY", selector
    )
    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    found = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    shown = Image.open(BytesIO(base64.b64decode(found["data"]))).convert("RGB")
    shown.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    seeded = DEMOS[FAULT].seed()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in FLAGS:
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with tempfile.TemporaryDirectory() as scratch, webdriver.Chrome(options=options, service=service) as driver:
        saved = Path(scratch) / "saved"
        result = bisect(seeded.model, seeded.backends, test_model=seeded.test_model, options=Options(save=saved))
        result.command = f"cpdebug demo {FAULT}"
        write_page(SavedResult.of(result, saved), Path(scratch) / "report.html")
        for theme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            for width in (1400, 400):
                size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                driver.get((Path(scratch) / "report.html").as_uri())
                picture(driver, IMAGES / f"report-{width}-{theme}.png", "body", width, 1000)
                picture(driver, IMAGES / f"graph-{width}-{theme}.png", "#graph", width, 950)  # brings it into view
                WebDriverWait(driver, 60).until(lambda d: d.execute_script(READY))
                driver.execute_async_script("setTimeout(arguments[0], 600)")
                picture(driver, IMAGES / f"graph-{width}-{theme}.png", "#graph", width, 950)


if __name__ == "__main__":
    main()
