# SPDX-License-Identifier: Apache-2.0
"""The READMEs say what is there: their paths, commands, code, tables and picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import picture, readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"```\n(pip .*?)\n```", README, flags=re.DOTALL)


def test_every_path_exists():
    text = "".join(page.read_text() for page in readme.PAGES)
    paths = re.findall(r"`((?:resnet_fast|benchmarks|tests|csrc|softgpu)(?:/[\w/.]*)?)`", text)
    assert len(paths) >= 8
    for page in readme.PAGES:
        links = re.findall(r"\]\(([\w/.]+)\)", page.read_text())
        paths += [(page.parent / link).relative_to(ROOT) for link in links]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_the_readme_is_short_and_begins_with_what_matters():
    lines = README.splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:60])
    for part in ("pip install", "```python", "![", "<!-- begin: benchmarks/readme.py -->"):
        assert part in first


def test_ci_runs_both_commands():
    assert len(COMMANDS) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        install, run = command.split(" && ")
        extras = re.search(r"\[\w+\]", install).group()
        assert f'pip install --quiet -e ".{extras}"' in ci
        assert re.search(rf"^{' '.join(run.split()[:2])}", ci, flags=re.MULTILINE), run


@pytest.mark.parametrize("block", BLOCKS, ids=["first", "optimize", "ops"])
def test_the_code_runs(block, capsys):
    torch.manual_seed(0)
    with torch.inference_mode(False):
        exec(compile(block, "README.md", "exec"), {})
    if "report" in block:
        assert "17 of 17 fused" in capsys.readouterr().out


@pytest.mark.parametrize("page", readme.PAGES, ids=["README", "benchmarks"])
def test_the_tables_are_those_of_the_results(page):
    """A figure that no measurement printed cannot stand in a README."""
    assert readme.rewritten(page.read_text()) == page.read_text(), "run python -m benchmarks.readme"


def test_the_picture_is_the_tables(tmp_path):
    """The committed picture has the same labels; its lines depend on matplotlib's version."""
    pytest.importorskip("matplotlib")
    picture.draw(README, tmp_path / "ratios.svg")
    texts = [
        re.findall(r">([^<>]+)</text>", file.read_text())
        for file in (tmp_path / "ratios.svg", picture.PICTURE)
    ]
    assert texts[0] and texts[0] == texts[1], "run python -m benchmarks.picture"


def test_what_stands_below_the_table_is_true_of_every_row():
    """ "faster than torchvision in every row", and others faster "in some of them"."""
    headings, rows, measured = picture.table(README)
    ours = headings.index("resnet_fast")
    assert rows and measured
    assert all(picture.number(row[ours]) < 1 for row in rows)
    for other in range(ours + 1, len(headings)):
        pairs = [(picture.number(row[ours]), picture.number(row[other])) for row in rows]
        known = [(mine, theirs) for mine, theirs in pairs if mine and theirs]
        assert any(theirs < mine for mine, theirs in known), headings[other]
        assert any(theirs > mine for mine, theirs in known), headings[other]
