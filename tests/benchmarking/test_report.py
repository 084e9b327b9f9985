# SPDX-License-Identifier: Apache-2.0
"""The page shows what was measured, and says of every number how it was obtained."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace

import pytest

from resnet_fast.benchmarking import report, rows, tables
from resnet_fast.benchmarking.rows import Results
from resnet_fast.profiling.roofline import Roofline
from tests.benchmarking.fakes import row
from tests.benchmarking.test_rows import EAGER, MODELLED

OP = {
    "suite": "ops", "subject": "conv_bn_act", "batch": 1, "backend": "cpu",
    "shape": "1x56x56x64 -> 64, 3x3/1 +relu, float32", "roof_share": 0.4, "bound": "memory",
}  # fmt: skip


def results() -> Results:
    found = []
    for batch in (1, 8):
        for provider, ms in ((EAGER, 20.0), ("openvino", 12.0), ("resnet_fast", 13.0)):
            found.append(row(provider, ms * batch, batch=batch))
    found.append(row("<script>alert(1)</script>", status=rows.THREW, reason="boom & <b>bang</b>"))
    for provider, ms in (("aten", 0.9), ("compile", 0.5), ("resnet_fast", 0.45)):
        found.append(row(provider, ms, **OP))
    return Results(rows=found, modelled=[MODELLED], left_out={"models: triton": "no GPU"})


ROOFS = {"float32": Roofline("CPU", 0.5, 20.0, "measured")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    report.write(results(), ROOFS, path)
    return path


def test_the_files_are_there_and_small(folder):
    names = {"throughput.png", "layers.png", "roofline.png", "bytes.png", "report.html"}
    assert names == {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


def test_every_section_says_how_its_numbers_were_obtained(folder):
    page = (folder / "report.html").read_text()
    sections = re.findall(r"<h2>(.*?)</h2>", page)
    kinds = [re.findall(r'class="how (\w+)"', title) for title in sections]
    assert kinds == [["measured"], ["measured"], ["measured", "modelled"], ["counted"],
                     ["counted", "modelled"], []]  # fmt: skip


def test_measured_and_modelled_columns_are_apart(folder):
    page = (folder / "report.html").read_text()
    headings = [re.findall(r"<th[^>]*>(.*?)</th>", head)
                for head in re.findall(r"<thead>(.*?)</thead>", page)]  # fmt: skip
    assert len(headings) == 3
    for heading in headings[:2]:
        assert "wall ms" in heading and "modelled" not in " ".join(heading)
    modelled = headings[2]
    assert [name for name in modelled if "µs" in name or "ms" in name] == [
        f"modelled µs ({gpu})" for gpu in MODELLED.modelled_ms
    ]


def test_nothing_comes_from_elsewhere_and_text_is_text(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page and "<b>bang" not in page
    assert "&lt;script&gt;" in page and "boom &amp; &lt;b&gt;bang" in page


def test_a_run_that_measured_nothing_has_a_page_too(tmp_path):
    lost = replace(row(), status=rows.THREW, reason="gone", wall_ms=None)
    report.write(Results(rows=[lost], complete=False), {}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Interrupted" in page and "gone" in page


def test_the_terminals_modelled_table_has_a_layer_and_kernel_once():
    tiles = [replace(MODELLED, tile=f"64x64x{k}", counted_sectors=1 + k) for k in (16, 32, 64)]
    found = Results(modelled=[*tiles, replace(MODELLED, kernel="CUTLASS")])
    _, table = tables.render(found)
    kernels = [row.cells[0] for row in table.rows if row.cells]
    assert len(kernels) == 2 and table.notes[0].startswith("2 more, of other layers and tiles")
    assert "64x64x16" in kernels[0]


@pytest.mark.parametrize(
    "value, text",
    [(None, ""), (0.0123, "0.0123"), (61.32, "61.3"), (999.6, "1000"), (1377, "1377")],
)
def test_milliseconds_are_plain_numbers(value, text):
    assert tables.milliseconds(value) == text


def test_the_readmes_table_has_what_was_measured_and_nothing_else():
    found = results()
    table = tables.markdown(found)
    assert table.splitlines()[0].startswith(f"| model | dtype | batch | {EAGER} (ms) | openvino |")
    assert "| resnet18 | float32 | 1 | 20.0 | 0.60 | 0.65 |" in table
    assert "script" not in table and "Test Processor" in table
    # A provider without a time in one of the cases has a dash there.
    del found.rows[1]
    assert "| resnet18 | float32 | 1 | 20.0 | 0.65 | - |" in tables.markdown(found)
    assert tables.markdown(Results()) == "No model was measured."


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
def test_a_browser_shows_it_without_an_error(folder, tmp_path):
    shot = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars", "--window-size=700,900",
        "--enable-logging=stderr", "--v=0", f"--screenshot={shot}",
        (folder / "report.html").as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert shot.exists(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert len(colors(shot.read_bytes())) > 50, "the page is blank"


def colors(png: bytes) -> set[bytes]:
    """The first bytes of pixels that a PNG's filtered lines hold: few where all is one colour."""
    place, data, width = 8, b"", 0
    while place < len(png):
        size, kind = struct.unpack(">I4s", png[place : place + 8])
        body = png[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            width = struct.unpack(">I", body[:4])[0]
        data += body if kind == b"IDAT" else b""
        place += size + 12
    raw = zlib.decompress(data)
    assert width
    return {raw[i : i + 3] for i in range(0, len(raw) - 3, 7)}
