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
from matplotlib.collections import PathCollection

from benchmarks import report
from resnet_fast.benchmarking import tables
from resnet_fast.benchmarking.rows import Results
from resnet_fast.measuring import protocol
from resnet_fast.profiling.roofline import Roofline
from tests.benchmarking.fakes import row
from tests.benchmarking.test_counted import MODELLED
from tests.benchmarking.test_rows import EAGER

OP = {
    "suite": "ops", "subject": "conv_bn_act", "batch": 1, "backend": "cpu",
    "shape": "1x56x56x64 -> 64, 3x3/1 +relu, float32", "roof_share": 0.4, "bound": "memory",
}  # fmt: skip


def results() -> Results:
    found = []
    for batch in (1, 8):
        for provider, ms in ((EAGER, 20.0), ("openvino", 12.0), ("resnet_fast", 13.0)):
            found.append(row(provider, ms * batch, batch=batch))
    found.append(
        row("<script>alert(1)</script>", status=protocol.THREW, reason="boom & <b>bang</b>")
    )
    for provider, ms in (("aten", 0.9), ("compile", 0.5), ("resnet_fast", 0.45)):
        found.append(row(provider, ms, **OP))
    return Results(rows=found, left_out={"models: triton": "no GPU"})


ROOFS = {"float32": Roofline("CPU", 0.5, 20.0, "measured")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    report.write(results(), ROOFS, [MODELLED], path)
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


def test_the_page_follows_the_reader_into_the_dark_and_onto_a_phone(folder):
    page = (folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page and "color-scheme: light dark" in page
    assert page.count("<div class=picture><img") == 4  # each scrolls where it is too wide
    assert 'content="width=device-width' in page


def test_a_run_that_measured_nothing_has_a_page_too(tmp_path):
    lost = replace(row(), status=protocol.THREW, reason="gone", wall_ms=None)
    report.write(Results(rows=[lost], complete=False), {}, [], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Interrupted" in page and "gone" in page


@pytest.mark.parametrize(
    "value, text",
    [(None, ""), (0.0123, "0.0123"), (61.32, "61.3"), (999.6, "1000"), (1377, "1377")],
)
def test_milliseconds_are_plain_numbers(value, text):
    assert tables.milliseconds(value) == text


def unstable() -> Results:
    """A run on a busy machine: ours scatters, the peer says nothing, eager is as it should be."""
    ours = row("resnet_fast", 13.0, spread=0.2, stable=False, busy=0.6)
    wild = row("compile", 1602.4, spread=0.9, stable=False, rounds=7)
    return Results(rows=[row(EAGER, 20.0), ours, wild])


def test_the_terminals_table_marks_what_is_not_stable_and_gives_it_no_prize():
    *_, busy, told = (part for part in tables.render(unstable()) if isinstance(part, str))
    table = next(part for part in tables.render(unstable()) if not isinstance(part, str))
    rows = [row for row in table.rows if not row.text]
    names = [column.name for column in table.columns]
    column = {name: [row.cells[i] for row in rows] for i, name in enumerate(names)}
    assert column["wall ms"] == ["20", "~13", "~1602"]
    assert column["ratio"] == ["1.00", "~0.65", "?"]
    assert [row.style for row in rows] == ["", "", ""]
    assert "2 of 3 times" in told and "60%" in busy and "--seconds" in told
    stable = next(part for part in tables.render(results()) if not isinstance(part, str))
    assert "bold" in [line.style for line in stable.rows]


def test_the_page_marks_it_too():
    page = report.page(unstable(), {})
    assert page.count("<td>~13</td>") == 1 and "<td>?</td>" in page and "~1602" in page
    assert "too busy" in page and "2 of 3 times" in page and 'class="ours' not in page


def test_the_pictures_show_it_too():
    from benchmarks import plots

    axes = plots.throughput(unstable().rows).axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow if len(line.get_xdata())] == [
        [pytest.approx(1e3 / 13)], [pytest.approx(1e3 / 1602.4)],
    ]  # fmt: skip
    ops = [replace(r, **OP) for r in unstable().rows]
    ops[0] = replace(ops[0], provider="aten")
    bars = [bar for bar in plots.speedups(ops).axes[0].patches if bar.get_width()]
    assert [bar.get_hatch() for bar in bars] == ["////"]  # and the peer has no bar
    ops[1] = replace(ops[1], wall_p20_ms=1.0, wall_p80_ms=99.0)
    assert plots.speedups(ops) is None


def test_no_point_of_the_roofline_is_where_it_is_by_construction():
    """Of a GPU that nothing ran on there are shapes to show, and no speeds."""
    from benchmarks import plots

    ops = [row("resnet_fast", 0.45, **OP)]
    left, right = plots.rooflines(ops, ROOFS).axes
    assert len(left.collections) == 1 and not any(
        isinstance(c, PathCollection) for c in right.collections
    )
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert len(labels) == 2 and all("left of the bend" in label for label in labels)
    for axes in (left, right):  # the legend lies below the axes: no roof is behind it
        anchor = axes.get_legend().get_bbox_to_anchor()
        assert anchor.transformed(axes.transAxes.inverted()).y1 < 0


@pytest.mark.parametrize(
    "count, text",
    [(1, "way 0"), (2, "way 0; another way is in the rows"),
     (3, "way 0; 2 other ways are in the rows")],
)  # fmt: skip
def test_the_ways_of_inputs_are_counted_in_grammar(count, text):
    assert tables.inputs_of([row(inputs=f"way {i}") for i in range(count)]) == text


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


def test_a_row_of_few_rounds_says_so_below_its_time():
    few = row(EAGER, 20.0, rounds=4, stable=False, reason="4 rounds of at least 7: no time")
    (table,) = (part for part in tables.render(Results(rows=[few])) if not isinstance(part, str))
    _, time, why = table.rows
    assert time.cells[3] == "~20" and "4 rounds of at least 7" in why.text
    assert "4 rounds of at least 7" in report.page(Results(rows=[few]), {})
