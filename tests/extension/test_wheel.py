# SPDX-License-Identifier: Apache-2.0
"""The wheel holds what production needs, and nothing of the tests, benchmarks and softgpu."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from resnet_fast import build

ROOT = Path(__file__).resolve().parents[2]
NEITHER_NEEDED = ("numpy", "softgpu", "tests", "benchmarks")
USE = f"""
import sys
sys.path.insert(0, ".")  # before the checkout, if that is installed to be edited
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.modules.update(dict.fromkeys({NEITHER_NEEDED}))  # importing them fails
import torch, resnet_fast
from resnet_fast import build, cli
assert build.PACKAGE.parent == build.Path.cwd(), build.PACKAGE
x = torch.randn(2, 8, 4, 4)
assert torch.equal(resnet_fast.ops.add_relu(x, x), torch.relu(x + x))
assert resnet_fast.models.resnet18().eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
assert cli.main(["check"]) == 0
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built as a user builds it where there is no nvcc, from a copy of the checkout."""
    for package in ("pip", "setuptools"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns(".git", "build", "_C.*", "__pycache__", "*.egg-info", ".*")
    shutil.copytree(ROOT, folder / "checkout", ignore=unneeded)
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    done = subprocess.run(
        [sys.executable, "-m", *command, "./checkout"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": "", "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_it_holds_the_package_its_command_and_its_sources_alone(wheel):
    names = wheel.namelist()
    first = {name.partition("/")[0] for name in names}
    assert {name for name in first if not name.endswith(".dist-info")} == {
        "resnet_fast",
        "resnet_fast_command.py",
    }
    packages = {Path(name).parts[1] for name in names if name.startswith("resnet_fast/")}
    assert not packages & {"testing", "tests", "softgpu", "benchmarks"}
    sources = {
        f"resnet_fast/csrc/{path.relative_to(build.csrc()).as_posix()}"
        for path in build.csrc().rglob("*")
        if path.suffix in build.SUFFIXES
    }
    assert sources <= set(names)


def test_it_works_without_numpy_and_all_that_is_left_out(wheel, tmp_path):
    wheel.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
