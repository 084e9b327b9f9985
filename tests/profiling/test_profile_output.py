# SPDX-License-Identifier: Apache-2.0
"""What a profile is written as: the command's tables, the trace, the picture and the page."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import resnet_fast
from resnet_fast import cli
from resnet_fast.profiling import picture
from resnet_fast.profiling.profile import profile

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


@pytest.fixture(scope="module")
def found():
    model = resnet_fast.models.resnet18().eval().to(memory_format=torch.channels_last)
    x = torch.zeros(1, 3, 64, 64).to(memory_format=torch.channels_last)
    return profile(model, x, rounds=2, compare="torchvision")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["profile", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ---- the trace


def test_the_trace_has_each_layer_by_name_inside_its_block_and_stage(found):
    trace = json.loads(json.dumps(found.trace()))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    tracks = {e["args"]["name"]: e["tid"] for e in trace["traceEvents"] if e["ph"] == "M"}
    layers = {e["name"]: e for e in slices if e["tid"] == tracks["layers"]}
    assert list(layers) == list(dict.fromkeys(row.name for row in found.rows))
    for child, parent, track in (
        ("layer2.0.conv1", "layer2.0", "blocks"),
        ("layer2.0.conv1", "layer2", "stages"),
        ("conv1", "stem", "stages"),
        ("fc", "ResNet", "model"),
    ):
        around = next(e for e in slices if e["name"] == parent and e["tid"] == tracks[track])
        inner = layers[child]
        assert around["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= around["ts"] + around["dur"] + 1e-6
    facts = layers["layer2.0.conv1"]["args"]
    assert facts["backend"] == "cpu" and facts["flops"] > 0 and "bound by" in facts
    ends = [(e["ts"], e["ts"] + e["dur"]) for e in layers.values()]
    assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(ends))


# ---- the picture


def test_boxes_fill_each_level_no_more_than_once(found):
    boxes = picture.boxes(found)
    for level in range(4):
        mine = sorted((b.begin, b.begin + b.width) for b in boxes if b.level == level)
        assert mine[0][0] >= 0 and mine[-1][1] <= 1 + 1e-9
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(mine))
    assert sum(b.width for b in boxes if b.level == 3) == pytest.approx(1.0)
    assert {"layer1", "layer4", "stem", "head"} <= {b.name for b in boxes if b.level == 1}


def test_colours_follow_the_roofline(found):
    row = found.layers[0]
    colours = [picture.colour_of(_with(row, roof)) for roof in (0.0, 0.01, 0.5, 0.99, 1.2)]
    assert len(set(colours)) == 5 and colours[0] == picture.GREY


def _with(row, roof):
    return replace(row, roof=roof)


def test_the_svg_is_well_formed_and_tells_figures(found):
    root = ElementTree.fromstring(picture.svg(found))
    titles = [title.text for title in root.iter("title")]
    assert any(re.match(r"layer2\.0\.conv1: .* ms, .*roofline", title) for title in titles)


def test_the_png_is_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.png(tmp_path / "flame.png")
    assert _colours(tmp_path / "flame.png") > 20


def _colours(file: Path) -> int:
    image = pytest.importorskip("PIL.Image").open(file).convert("RGB")
    return len(image.getcolors(maxcolors=image.width * image.height))


# ---- the page


def test_the_page_needs_nothing_else(found):
    page = found.html()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page) and "url(" not in page
    for text in ("layer2.0.conv1", "torchvision ms", "of roof", "between layers", "<svg"):
        assert text in page
    assert "prefers-color-scheme: dark" in page and "color-scheme: light dark" in page
    # On a phone it scrolls: the picture keeps its height, and its names their size.
    assert '<div class="wide"><svg class="flame"' in page and "min-width: 1000px" in page


def test_each_box_leads_to_the_row_with_its_figures(found):
    """Who has no mouse to point with reads them there."""
    page = found.html()
    rows = dict(re.findall(r'<tr class="[^"]*" id="([^"]+)"><td class="name">(.*?)</td>', page))
    boxes = re.findall(r'<a href="#([^"]+)"><title>(.*?): ', page)
    assert len(boxes) > 30 and len(set(re.findall(r' id="([^"]+)"', page))) == page.count(' id="')
    for anchor, name in boxes[1:]:
        assert rows[anchor] == name or rows[anchor].startswith(f"{name}."), name
    assert boxes[0][0] == "stages" and 'id="stages"' in page


def test_the_page_says_of_each_column_how_it_was_obtained(found):
    for head in re.findall(r"<thead>(.*?)</thead>", found.html()):
        groups, names = (
            re.findall(r"<th[^>]*>(.*?)</th>", row)[1:] for row in head.split("</tr>")[:2]
        )
        spans = [int(span) for span in re.findall(r'colspan="(\d+)"', head)]
        told = [group for group, span in zip(groups, spans, strict=True) for _ in range(span)]
        how = dict(zip(names, told, strict=True))
        assert how["ms"] == how["torchvision ms"] == "measured" and how["bound by"] == ""
        assert how["MB"] == "counted" and how["GB/s"] == how["of roof"] == "counted / measured"


def test_the_pages_headline_is_the_unmarked_runs(found):
    calm = replace(found, busy=None, spread=0.02, peer_spread=0.02)
    run, page = calm.run, calm.html()
    (row,) = re.findall(r"<tr[^>]*><td class=\"name\">unmarked run</td>.*?</tr>", page)[:1]
    for text in (f"{run.seconds * 1e3:.2f} ms", f"<b>{run.ratio:.2f}</b>of torchvision's time"):
        assert text.replace("'", "&#x27;") in page
    assert f"{run.ratio:.2f}" in row and f"{run.seconds * 1e3:.3f}" in row
    wild = replace(calm, spread=0.5).html()
    assert f"<b>~{run.seconds * 1e3:.2f} ms</b>" in wild


def test_names_are_escaped(found):
    named = replace(found, model="<script>alert(1)</script>")
    assert "<script>" not in named.html()


@functools.cache
def browser_skip() -> str:
    """Why pages cannot be opened here; "" if they can."""
    return "" if CHROMIUM else "no Chromium is installed (Debian: apt-get install chromium)"


def opened(page: Path, picture: Path) -> list[str]:
    """Open a page, photograph it, and return what its console said."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--hide-scrollbars", "--window-size=1280,1600", f"--user-data-dir={picture.parent}/user",
        f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and picture.exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_opens_in_a_browser(found, tmp_path):
    if reason := browser_skip():
        pytest.skip(reason)
    page = tmp_path / "page.html"
    with page.open("w") as file:
        found.html(file)
    assert opened(page, tmp_path / "page.png") == []
    assert _colours(tmp_path / "page.png") > 50
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<script>nobody.home()</script>")
    assert "nobody" in str(opened(wrong, tmp_path / "wrong.png"))
    assert _colours(tmp_path / "wrong.png") == 1


# ---- the command

QUICK = ("resnet18", "--seconds", "0")


def test_the_command_prints_stages_and_slowest_layers_and_writes(capsys, tmp_path):
    files = {name: tmp_path / f"profile.{name}" for name in ("trace", "html", "json", "png")}
    written = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    status, out, _ = run(capsys, *QUICK, "--compare", "torchvision", *written)
    assert status == cli.AGREES
    for text in (
        "resnet18, float32, 1x3x224x224",
        "layer4",
        "slowest 12",
        "torchvision ms",
        "roof",
    ):
        assert text in out
    assert json.loads(files["json"].read_text())["model"] == "resnet18"
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert "<svg" in files["html"].read_text() and files["png"].stat().st_size > 1000


def test_with_layers_it_prints_all_in_order(capsys):
    status, out, _ = run(capsys, *QUICK, "--layers", "--batch", "2", "--device", "cpu")
    assert status == cli.AGREES and "slowest" not in out
    names = [line.split()[0] for line in out.splitlines() if line.startswith("layer1.")]
    assert names == [f"layer1.{b}.conv{c}" for b in (0, 1) for c in (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["resnet5"], ["resnet5", "resnet50", "resnext50_32x4d"], id="model"),
        pytest.param(["resnet18", "--dtype", "int8"], ["int8", "bfloat16"], id="dtype"),
        pytest.param(["resnet18", "--device", "gpu9"], ["gpu9", "auto, cpu"], id="device"),
        pytest.param(["resnet18", "--compare", "keras"], ["keras", "torchvision"], id="compare"),
        pytest.param(["resnet18", "--batch", "0"], ["--batch"], id="batch"),
        pytest.param(["resnet18", "--seconds", "-1"], ["--seconds"], id="seconds"),
        pytest.param(["resnet18", "--seconds", "nan"], ["--seconds"], id="nan"),
        pytest.param(["resnet18", "--device", "meta"], ["nothing is timed on meta"], id="meta"),
        pytest.param(
            ["resnet18", "--batch", "100000000"], ["batch 100000000", "memory"], id="memory"
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, arguments, words):
    status, out, err = run(capsys, *arguments)
    assert status == cli.BAD_INPUT and out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("resnet-fast: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("option", ["--trace", "--html", "--png", "--json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch, option):
    from resnet_fast.profiling import command

    monkeypatch.setattr(command, "profile_by_name", lambda *_: pytest.fail("it began to work"))
    for file in ("/nowhere/file", "/"):
        status, _, err = run(capsys, *QUICK, option, file)
        assert status == cli.BAD_INPUT and option in err and file in err


def test_an_interrupt_prints_what_was_measured(capsys, monkeypatch):
    from resnet_fast.profiling import profile as module

    once, left = module._once, [3]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        once(*arguments)

    monkeypatch.setattr(module, "_once", interrupted)
    status, out, _ = run(capsys, *QUICK)
    assert status == cli.INTERRUPTED and "interrupted" in out and "layer4" in out


def test_without_matplotlib_it_says_what_to_install(capsys, monkeypatch, found, tmp_path):
    for name in ("", ".figure", ".cm", ".colors", ".backends", ".backends.backend_agg"):
        monkeypatch.setitem(sys.modules, f"matplotlib{name}", None)
    with pytest.raises(ImportError, match=r"resnet_fast\[bench\]"):
        found.png(tmp_path / "flame.png")
