# SPDX-License-Identifier: Apache-2.0
"""Installs the package; everything constant is in pyproject.toml.

By default the installation is pure Python and needs neither a compiler nor torch. If the recipe in
`resnet_fast/build.py` finds nvcc, torch, ninja and pybind11, the CUDA C++ extension is built too,
with or without a GPU in the machine. An isolated build does not see these packages: use
`pip install --no-build-isolation`, or run `resnet-fast build` later, which does the same.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NAME = "resnet_fast._C"


def load_recipe():
    """`resnet_fast/build.py` alone: the package itself needs torch."""
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "resnet_fast" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


def extensions() -> list[Extension]:
    """The extension, or none and one line on stderr that says why."""
    try:
        recipe.find()
    except recipe.BuildError as error:
        print(f"resnet_fast: pure Python, no CUDA C++ extension: {error}", file=sys.stderr)
        return []
    return [Extension(NAME, sources=[], optional=True)]


class BuildExtension(build_ext):
    """Builds by the recipe; if that fails, it says so and the installation is pure Python."""

    def build_extension(self, extension: Extension) -> None:
        output = ROOT / self.get_ext_fullpath(extension.name)
        try:
            recipe.build(recipe.find(), output=output, jobs=self.parallel or None)
        except recipe.BuildError as error:
            raise CompileError(str(error)) from error


class BuildPython(build_py):
    """Installs the C++ sources too, so that `resnet-fast build` works in the installed package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "resnet_fast" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
