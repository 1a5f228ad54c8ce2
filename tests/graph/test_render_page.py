"""The interactive page: self-contained, and every control does what it says in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from pictured import three_layers

from prunec.graph.render import build_page, write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

DRIVER = Path(__file__).with_name("page_driver.js")


@cache
def page() -> str:
    return build_page(three_layers(), title="toy <model>")


def test_the_page_needs_no_network() -> None:
    namespaces = r"http://www\.w3\.org/(1999/xlink|2000/svg|XML/1998/namespace)"
    assert re.findall(r"(?:https?:)?//[\w.]+", re.sub(namespaces, "", page())) == []
    assert "default-src 'none'" in page()
    assert "prefers-color-scheme: dark" in page()


def test_names_of_the_model_cannot_become_markup() -> None:
    assert "toy <model>" not in page()
    assert "toy &lt;model&gt;" in page()


def test_the_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_page(three_layers(), tmp_path / "toy.html")
    written = (tmp_path / "toy.html").read_bytes()
    monkeypatch.setattr(Path, "replace", _full_disk)
    with pytest.raises(Exception, match="No space left"):
        write_page(three_layers(), tmp_path / "toy.html")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.html"]
    assert (tmp_path / "toy.html").read_bytes() == written


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@cache
def driven(folder: Path) -> dict[str, Any]:
    file = folder / "driven.html"
    file.write_text(page().replace("</body>", f"<script>{DRIVER.read_text()}</script></body>"))
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    run = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--window-size=1440,900", f"--user-data-dir={folder / 'profile'}"),
            *("--virtual-time-budget=5000", "--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r'<pre id="report">(.*?)</pre>', run.stdout, re.DOTALL)
    assert match, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match.group(1)))
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return driven(tmp_path_factory.mktemp("browser"))


@pytest.mark.engine("chromium")
def test_the_page_lists_every_picture_and_group_and_fetches_nothing(seen: dict[str, Any]) -> None:
    assert "error" not in seen
    assert seen["views"][:2] == ["blocks", "block-layers.0"]
    assert len(seen["views"]) == 2 + len(seen["rows"])
    assert "layers.*.mlp/ffn_channel" in seen["rows"]
    assert all(seen["drawn"])
    assert seen["requests"] == []


@pytest.mark.engine("chromium")
def test_a_click_highlights_a_group_and_a_second_one_releases_it(seen: dict[str, Any]) -> None:
    assert seen["before"] == seen["released"] == 0
    assert seen["dimmed"] > 5
    assert seen["selected"] == "layers.*.mlp/ffn_channel"
    assert "layers.0.mlp.gate.weight[0]" in seen["detail"]


@pytest.mark.engine("chromium")
def test_hovering_shows_shape_and_source_line(seen: dict[str, Any]) -> None:
    assert re.search(r"linear: 2 x 5 x \d+ .*\.py:\d+", seen["hint"])


@pytest.mark.engine("chromium")
def test_the_wheel_zooms_and_dragging_pans(seen: dict[str, Any]) -> None:
    start, zoomed, panned = seen["places"]
    assert len({start, zoomed, panned}) == 3
    assert (
        zoomed.rpartition("scale")[2]
        == panned.rpartition("scale")[2]
        != start.rpartition("scale")[2]
    )


@pytest.mark.engine("chromium")
def test_search_finds_modules_in_the_picture_and_groups_in_the_list(seen: dict[str, Any]) -> None:
    assert seen["kept"] == 1
    assert 1 <= seen["listed"] < len(seen["rows"])
    assert seen["cleared"] == 0
