# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: what it prints, writes, refuses, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from resnet_fast import cli

QUICK = ["--batch", "1", "--dtype", "float32", "--seconds", "0.01"]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 50).convert("RGB").save(path)
    return str(path)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_compare_prints_writes_and_agrees(capsys, tmp_path):
    """On the photographs that ship, with two dtypes and batches as the documentation has them."""
    file = tmp_path / "result.json"
    arguments = ["--batch", "1", "2", "--dtype", "float32", "bfloat16", "--seconds", "0.01"]
    status, out, _ = run(capsys, "compare", "resnet18", *arguments, "--json", str(file))
    assert status == cli.AGREES
    for text in ("astronaut.png", "china.jpg", "agree", "9 of 9", "images/s", "resnet_fast"):
        assert text in out
    result = json.loads(file.read_text())
    assert len(result["photographs"]) == 8
    settings = {(s["dtype"], s["batch"]) for s in result["settings"]}
    assert settings == {(d, b) for d in ("float32", "bfloat16") for b in (1, 2)}
    for setting in result["settings"]:
        assert setting["agrees"]
        best = min(t["median"] for n, t in setting["timings"].items() if "torchvision" in n)
        ours = setting["timings"]["resnet_fast"]
        assert setting["ratio"]["resnet_fast"] == pytest.approx(ours["median"] / best)
        assert ours["p20"] <= ours["median"] <= ours["p80"]


def test_files_that_are_no_images_are_named_and_skipped(capsys, picture, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    with open(picture, "rb") as whole:
        cut.write_bytes(whole.read()[:200])
    files = [str(text), picture, str(cut), str(tmp_path / "absent.png")]
    status, out, err = run(capsys, "compare", "resnet18", *QUICK, "--images", *files)
    assert status == cli.SKIPPED
    assert "picture.png" in out and "agree" in out
    for name in ("notes.txt", "cut.png", "absent.png"):
        assert name in err


def test_no_readable_image_at_all(capsys, tmp_path):
    status, _, err = run(
        capsys, "compare", "resnet18", *QUICK, "--images", str(tmp_path / "no.png")
    )
    assert status == cli.BAD_INPUT and "no.png" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            ["compare", "resnet5"], ["resnet5", "resnet50", "resnext50_32x4d"], id="model"
        ),
        pytest.param(["compare", "resnet18", "--dtype", "int8"], ["int8", "bfloat16"], id="dtype"),
        pytest.param(["compare", "resnet18", "--device", "gpu9"], ["gpu9"], id="device"),
        pytest.param(["compare", "resnet18", "--batch", "0"], ["--batch"], id="batch"),
        pytest.param(["compare", "resnet18", "--weights", "NONE"], ["NONE"], id="weights"),
        pytest.param(
            ["compare", "resnet18", "--json", "/nowhere/result.json"], ["/nowhere"], id="json"
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, arguments, words, picture):
    status, out, err = run(capsys, *arguments, "--images", picture)
    assert status == cli.BAD_INPUT and out == ""
    assert err.strip().startswith("resnet-fast: ")
    for word in words:
        assert word in err


def test_disagreement_is_not_timed(capsys, picture, monkeypatch):
    from resnet_fast.comparison import measure as module

    build = module.build_pair

    def wrong(*arguments):
        theirs, ours = build(*arguments)
        ours.fc.bias.data += 1.0
        return theirs, ours

    monkeypatch.setattr(module, "build_pair", wrong)
    status, out, _ = run(capsys, "compare", "resnet18", *QUICK, "--images", picture)
    assert status == cli.DISAGREES
    assert "DISAGREE" in out and "images/s" not in out
    assert out.count("resnet_fast") == 1  # the version in the heading, and no time


def test_check_tells_what_serves_what(capsys):
    status, out, _ = run(capsys, "check")
    assert status == 0
    for text in (
        "NVIDIA GPU",
        "Triton",
        "oneDNN bfloat16",
        "AMX",
        "conv_bn_act",
        "add_relu",
        "aten",
    ):
        assert text in out


def test_help_helps():
    command = [sys.executable, "-m", "resnet_fast.cli"]
    out = subprocess.run(
        [*command, "compare", "--help"], capture_output=True, text=True, check=True
    )
    for text in ("--batch", "--images", "--json", "--compile", "exit status", "default"):
        assert text in out.stdout
    empty = subprocess.run(command, capture_output=True, text=True)
    assert empty.returncode == 2 and "compare" in empty.stderr


@pytest.mark.parametrize(
    "command", [["check"], ["tune", "resnet18", "--dry-run"]], ids=lambda c: c[0]
)
def test_a_plain_install_has_plain_text(command, capsys, monkeypatch):
    for name in ("rich", "rich.console", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, _ = run(capsys, *command)
    assert status == cli.AGREES and "triton" in out
