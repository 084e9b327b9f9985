# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: what it prints, writes, refuses, and its exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import resnet_fast
from resnet_fast import _table as table_module
from resnet_fast import cli
from resnet_fast.benchmarking import rows, tables
from resnet_fast.cli import arguments, terminal

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
        ratio = setting["ratio"]["resnet_fast"]  # None where the noise leaves nothing of it
        assert ratio is None or ratio == pytest.approx(ours["median"] / best)
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


# ---- what is refused, and in which words


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Files that people take for a state_dict of resnet18."""
    folder = tmp_path_factory.mktemp("checkpoints")
    state = torchvision.models.resnet18().state_dict()
    for name, content in {
        "pickled": torchvision.models.resnet18(),
        "wrapped": {"epoch": 3, "model": state},
        "prefixed": {f"module.{key}": value for key, value in state.items()},
        "other": torchvision.models.resnet34().state_dict(),
        "classes": torchvision.models.resnet18(num_classes=10).state_dict(),
        "tensor": torch.ones(3),
    }.items():
        torch.save(content, folder / f"{name}.pth")
    (folder / "junk.pth").write_text("not a checkpoint")
    (folder / "empty.pth").write_text("")
    (folder / "cut.pth").write_bytes((folder / "other.pth").read_bytes()[:5000])
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickled", "holds pickled objects"),
        ("wrapped", "whose weights are under 'model'"),
        ("prefixed", "all names in it begin with 'module.'"),
        ("other", "it is one of resnet34"),
        ("classes", "fc.weight is [10, 512], not [1000, 512]"),
        ("tensor", "holds a Tensor"),
        ("junk", "is no file that torch.save wrote"),
        ("empty", "is no file that torch.save wrote"),
        ("cut", "is no file that torch.save wrote, or is damaged"),
        ("missing", "it has IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_weights_that_do_not_fit_are_explained(name, words, checkpoints, capsys, picture):
    file = checkpoints / f"{name}.pth"
    arguments = ["compare", "resnet18", *QUICK, "--images", picture, "--weights", str(file)]
    status, out, err = run(capsys, *arguments)
    assert status == cli.BAD_INPUT and out == "" and len(err.splitlines()) == 1
    assert words in err and file.name in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "resnet18", "--batch", "100000"], "batch 100000 of resnet18"),
        (["profile", "resnet18", "--batch", "100000"], "batch 100000 of resnet18"),
        (["compare", "resnet18", "--seconds", "nan"], "--seconds: 'nan'"),
        (["compare", "resnet18", "--seconds", "inf"], "--seconds: 'inf'"),
        (["tune", "--seconds", "nan"], "--seconds: 'nan'"),
        (["tune", "--dry-run", "--arch", "99"], "compute capability 9.9; known are 8.0"),
        (["tune", "--dry-run", "--arch", "new"], "--arch: 'new' is not a compute capability"),
        (["tune", "--arch", "9.0"], "--arch is for --dry-run"),
        (["profile", "resnet18", "--png", "flame.xyz"], "--png: flame.xyz: the name must end"),
        (["profile", "resnet18", "--trace", "-"], "only --json and --csv"),
        (["compare", "resnet18", "--json", "-", "--csv", "-"], "--json and --csv cannot both"),
        (["--nothing"], "unknown argument '--nothing'"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(arguments, words, capsys):
    status, out, err = run(capsys, *arguments)
    assert status == cli.BAD_INPUT and out == "" and len(err.splitlines()) == 1
    assert err.startswith("resnet-fast: ") and words in err
    assert "resnet_fast:" not in err


def test_the_architectures_have_one_spelling_in_all_commands():
    for text in ("9.0", "90", "sm_90", "SM90"):
        assert arguments.architecture(text) == 90
    assert arguments.architecture("12.0") == 120


@pytest.mark.parametrize("command", [["check"], ["compare", "resnet18"], ["tune", "--dry-run"]])
def test_a_backend_that_is_none_is_refused_by_every_command(command, capsys, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "bogus")
    status, out, err = run(capsys, *command)
    assert status == cli.BAD_INPUT and out == ""
    assert "RESNET_FAST_BACKEND" in err and "'bogus'" in err and "triton" in err


# ---- what is written


def test_stdout_is_json_alone(capsys, picture):
    arguments = ["compare", "resnet18", *QUICK, "--images", picture, "--json", "-"]
    status, out, err = run(capsys, *arguments)
    assert status == cli.AGREES and json.loads(out)["settings"][0]["agrees"]
    assert "images/s" in err
    status, out, _ = run(capsys, "check", "--json", "-")
    found = json.loads(out)
    assert {fact["name"] for fact in found["facts"]} >= {"torch", "AMX"}
    assert {service["op"] for service in found["services"]} >= {"conv_bn_act", "add_relu"}


def test_compare_and_profile_and_tune_write_csv(capsys, picture, tmp_path):
    file = tmp_path / "rows.csv"
    run(capsys, "compare", "resnet18", *QUICK, "--images", picture, "--csv", str(file))
    rows = list(csv.DictReader(file.open()))
    assert {row["provider"] for row in rows} >= {"resnet_fast", "torchvision-contiguous"}
    assert all(float(row["median"]) > 0 and row["model"] == "resnet18" for row in rows)
    _, out, _ = run(capsys, "profile", "resnet18", "--seconds", "0", "--csv", "-")
    rows = list(csv.DictReader(out.splitlines()))
    assert float(next(row for row in rows if row["name"] == "conv1")["seconds"]) > 0
    _, out, _ = run(capsys, "tune", "resnet18", "--dry-run", "--csv", "-")
    rows = list(csv.DictReader(out.splitlines()))
    assert float(rows[0]["modelled_us"]) > 0


def test_an_interrupted_comparison_keeps_what_is_complete(capsys, picture, tmp_path, monkeypatch):
    from resnet_fast.comparison import measure as module

    timed, calls = module.protocol.measure, []

    def interrupted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return timed(*arguments, **keywords)

    monkeypatch.setattr(module.protocol, "measure", interrupted)
    file = tmp_path / "result.json"
    arguments = [*QUICK[2:], "--batch", "1", "2", "--images", picture, "--json", str(file)]
    status, out, _ = run(capsys, "compare", "resnet18", *arguments)
    assert status == cli.INTERRUPTED and "interrupted" in out
    found = json.loads(file.read_text())
    assert found["interrupted"] and [s["batch"] for s in found["settings"]] == [1]
    assert found["settings"][0]["timings"]


def test_a_report_is_plain_data():
    model = resnet_fast.models.resnet18().eval()
    found = json.loads(json.dumps(resnet_fast.report(model, torch.zeros(1, 3, 32, 32)).to_json()))
    assert found["fused"] == 9 and found["rows"][1]["name"] == "layer1.0"


# ---- what is shown


def words_of(lines) -> set[str]:
    return {word for line in lines for word in line.split() if set(word) != {"-"}}


def commands(picture: str) -> dict[str, list[str]]:
    return {
        "check": ["check"],
        "compare": ["compare", "resnet18", "--batch", "1", "--dtype", "float32", "bfloat16",
                    "--seconds", "0.01", "--images", picture],
        "profile": ["profile", "wide_resnet50_2", "--seconds", "0", "--compare", "torchvision"],
        "tune": ["tune", "resnet18", "--dry-run"],
    }  # fmt: skip


@pytest.mark.parametrize("name", commands(""))
def test_tables_fit_a_terminal_of_80_columns(name, capsys, monkeypatch, picture):
    monkeypatch.setenv("COLUMNS", "80")
    rendered, lines = [], table_module.Table.lines

    def spied(table, width=None):
        assert width == 80
        rendered.append((lines(table, 80), lines(table, None)))
        return rendered[-1][0]

    monkeypatch.setattr(table_module.Table, "lines", spied)
    status, out, _ = run(capsys, *commands(picture)[name])
    assert status == cli.AGREES and rendered
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for narrow, whole in rendered:
        shown = [line.text for line in narrow]
        notes = " ".join(shown).find("left out at")
        told = words_of([" ".join(shown)[: notes if notes >= 0 else None]])
        assert told <= words_of(line.text for line in whole), "a word was broken"


def test_benchmarks_fit_too(monkeypatch):
    found = rows.read(Path(__file__).parent.parent / "benchmarks/results/cpu")
    for part in tables.render(found):
        text = [part] if isinstance(part, str) else [line.text for line in part.lines(80)]
        if not isinstance(part, str):
            assert max(map(len, text)) <= 80
            assert "…" not in "".join(text)


def test_check_says_each_reason_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "check")
    assert out.count("runs on cuda tensors, not cpu") <= 1
    assert out.count("cpu comes first") <= 1
    assert len(out.splitlines()) < 45


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_an_example_and_fits(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert f"\n  resnet-fast {name}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert resnet_fast.__version__ in out and torch.__version__ in out


def test_progress_away_from_a_terminal_is_a_line_now_and_then(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with terminal.progress(stream) as tell:
        for second in range(101):
            clock[0] = float(second)
            tell(f"case {second}", second / 100)
    lines = stream.getvalue().splitlines()
    assert 5 <= len(lines) <= 10
    assert lines[1] == "[ 20%] case 20, 80 s left"


def test_progress_at_a_terminal_has_a_total_and_the_time_left(monkeypatch):
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    stream = Terminal()
    with terminal.progress(stream) as tell:
        clock[0] = 30.0
        tell("case 5", 0.25)
    assert "case 5" in stream.getvalue() and "2 min left" in stream.getvalue()


@pytest.mark.parametrize(
    ("share", "elapsed", "text"),
    [(0, 9, ""), (0.5, 60, "60 s left"), (0.1, 60, "9 min left"), (0.01, 600, "16.5 h left")],
)
def test_the_time_left_in_words(share, elapsed, text):
    assert terminal.time_left(share, elapsed) == text


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    root = Path(__file__).parent.parent
    code = "import sys, resnet_fast_command; sys.exit(resnet_fast_command.main())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == cli.INTERRUPTED
    assert done.stderr == "resnet-fast: interrupted\n"


def test_the_installed_command_starts_there():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert settings["project"]["scripts"] == {"resnet-fast": "resnet_fast_command:main"}
    assert settings["tool"]["setuptools"]["py-modules"] == ["resnet_fast_command"]
