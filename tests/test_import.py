# SPDX-License-Identifier: Apache-2.0
"""What importing the package does, and does not: each case in a Python of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fast

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("triton", "torchvision", "timm", "typer", "rich", "numpy.testing", "PIL")

# torch first, so that what is counted is this package's own.
IMPORT = """
import json, sys
{before}
import torch
before = set(sys.modules)
import resnet_fast
new = sorted(set(sys.modules) - before)
"""
RUN = """
x = torch.randn(1, 3, 32, 32)
with torch.inference_mode():
    y = resnet_fast.models.resnet18().eval()(x)
    assert y.shape == (1, 1000) and y.isfinite().all()
    z = resnet_fast.ops.add_relu(x, x)
"""


def python(code: str, **environment: str) -> str:
    """Run code; its standard output. Fails on an error, and on a word on either stream but that."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def imported():
    """Modules that the import adds to torch's, and whether CUDA was initialised."""
    tail = "print(json.dumps([new, torch.cuda.is_initialized()]))"
    return json.loads(python(IMPORT.format(before="") + tail))


@pytest.mark.parametrize("name", OPTIONAL)
def test_it_leaves_optional_packages_alone(name, imported):
    modules, _ = imported
    assert not [m for m in modules if m == name or m.startswith(name + ".")]


def test_it_costs_little_beyond_torch(imported):
    modules, _ = imported
    own = [m for m in modules if m.partition(".")[0] == "resnet_fast"]
    assert len(own) > 10
    assert len(modules) - len(own) <= 5, sorted(set(modules) - set(own))


def test_it_does_not_touch_a_gpu(imported):
    assert imported[1] is False


def test_it_loads_no_test_code(imported):
    assert not [m for m in imported[0] if m.startswith("tests.support")]


BLOCKED = {
    "triton": ("triton",),
    "torchvision": ("torchvision",),
    "all": ("triton", "torchvision", "timm", "typer", "rich"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_it_works_without(name):
    """Imports, runs a model and an op, and says nothing."""
    before = f"for name in {BLOCKED[name]}: sys.modules[name] = None"
    assert python(IMPORT.format(before=before) + RUN) == ""


def test_it_works_without_a_compiler(tmp_path):
    assert python(IMPORT.format(before="") + RUN, PATH=str(tmp_path), CC="", CXX="") == ""


def test_public_names():
    assert [name for name in resnet_fast.__all__ if not hasattr(resnet_fast, name)] == []


@pytest.mark.parametrize("first", ["resnet_fast", "torch.utils.flop_counter"])
def test_the_flop_counter_knows_the_ops_whoever_is_imported_first(first):
    code = f"""
import {first}
import torch, resnet_fast
from torch.utils.flop_counter import FlopCounterMode
x, w, v = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3), torch.ones(3)
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    resnet_fast.ops.conv_bn_act(x, w, v, v)
print(counter.get_total_flops())
"""
    assert python(code).strip() == str(2 * 3 * 9 * 2 * 9)
