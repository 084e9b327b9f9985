# SPDX-License-Identifier: Apache-2.0
"""The README says what is there: its paths, commands, code and tables."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"```\n(pip .*?)\n```", README, flags=re.DOTALL)


def test_every_path_exists():
    paths = re.findall(r"`((?:resnet_fast|benchmarks|tests|csrc)[\w/.]*)`", README)
    assert len(paths) >= 8
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_ci_runs_both_commands():
    assert len(COMMANDS) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        install, run = command.split(" && ")
        extras = re.search(r"\[\w+\]", install).group()
        assert f'pip install --quiet -e ".{extras}"' in ci
        assert re.search(rf"^{' '.join(run.split()[:2])}", ci, flags=re.MULTILINE), run


@pytest.mark.parametrize("block", BLOCKS, ids=["models", "ops"])
def test_the_code_runs(block, capsys):
    torch.manual_seed(0)
    with torch.inference_mode(False):
        exec(compile(block, "README.md", "exec"), {})
    if "report" in block:
        assert "17 of 17 fused" in capsys.readouterr().out


def test_the_tables_are_those_of_the_results():
    """A figure that no measurement printed cannot stand in the README."""
    readme = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert readme["rewritten"](README) == README, "run python -m benchmarks.readme"
