# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the layers of the package and of csrc, read from imports and includes."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "resnet_fast"
SOFTGPU = ROOT / "softgpu"  # a package of its own, which moves to another place as it is

# Each folder or module may import what stands above it, and nothing else of the package.
LAYERS = (
    ("spec", "_env", "_hardware", "_names", "_table", "agreement"),
    ("kernels",),
    ("dispatch",),
    ("ops",),
    ("nn",),
    ("models",),
    ("conversion", "recording"),
    ("measuring",),
    ("profiling",),
    ("machine", "tune", "graphs"),
    ("benchmarking",),
    ("comparison",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

FILES = sorted(PACKAGE.rglob("*.py"))

# In a folder with floors, each file may import those before it.
FLOORS = {
    "nn": (
        *("units", "reasons", "recipes", "parts", "plan"),
        *("guard", "launches", "run", "forward"),
    ),
    "dispatch": (
        *("problem", "preferences", "heuristics", "gemm", "tiles", "row", "steps"),
        *("aten", "cpu", "cuda", "triton", "tuning", "trial", "table"),
    ),
}
MOST_LINES = 400  # of a Python file, tests apart
# Its kernels, its file in ops, its rows, and what tests it; others walk `ops.OPS` and the table.
OP = "conv_bn_join"  # the op with most parts
FILES_OF_AN_OP = 12

# Imported lazily or not at all by the core: only these places may name them.
OPTIONAL = {
    "triton": ("kernels",),
    "torchvision": ("models/weights.py", "measuring", "cli"),
    "timm": (),
    "rich": ("cli/terminal.py",),
    "matplotlib": ("profiling/picture.py",),
    "onnxruntime": ("measuring/peers.py",),
    "torch_tensorrt": ("measuring/peers.py",),
    "PIL": ("measuring/photographs.py", "cli"),
    "numpy": (),
    "openvino": ("measuring/peers.py",),
}


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import in a file, lazy ones included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # only inside testing/ptx, which may be used without the package
                assert "ptx" in path.parts, f"{path}:{node.lineno}: a relative import"
                module = f"softgpu.ptx.{module}"
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def room(path: Path) -> str:
    """The folder or module right under the package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_what_stands_above(path):
    mine = room(path)
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] != "resnet_fast" or mine == "__init__":
            continue
        theirs = parts[1] if len(parts) > 1 else ""
        if theirs not in LEVEL or theirs == mine:
            continue  # a name of the package itself: __version__, optimize, ...
        assert LEVEL[theirs] < LEVEL[mine], f"{path}:{line}: {mine} imports {theirs}"


@pytest.mark.parametrize("folder", FLOORS)
def test_a_file_imports_only_files_of_its_folder_that_stand_before_it(folder):
    floors = FLOORS[folder]
    names = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    assert names == set(floors)
    for name in floors:
        for module, line in imports(PACKAGE / folder / f"{name}.py"):
            parts = module.removeprefix(f"resnet_fast.{folder}.").split(".")
            if module.startswith(f"resnet_fast.{folder}.") and parts[0] in names - {name}:
                assert floors.index(parts[0]) < floors.index(name), f"{name}:{line}: {module}"


def test_no_file_is_longer_than_a_reader_can_hold():
    for path in (*FILES, *SOFTGPU.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_an_op_is_named_in_few_files():
    folders = ("resnet_fast", "csrc", "tests", "benchmarks", "softgpu")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    places = [path for path in found if path.suffix in (".py", ".cu", ".cuh", ".h")]
    naming = [path for path in places if OP in path.read_text()]
    assert 5 < len(naming) <= FILES_OF_AN_OP, [str(path.relative_to(ROOT)) for path in naming]


def test_only_the_ops_call_dispatch_and_only_they_and_dispatch_call_kernels():
    for path in FILES:
        for module, line in imports(path):
            where = f"{path}:{line}: {module}"
            if module.startswith("resnet_fast.dispatch"):
                # tune measures the candidates of the table from which the ops choose
                assert room(path) in ("dispatch", "ops", "tune"), where
            if module.startswith("resnet_fast.kernels"):
                assert room(path) in ("kernels", "dispatch", "ops"), where


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_stay_in_their_rooms(package):
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE).as_posix()
        if any(module.split(".")[0] == package for module, _ in imports(path)):
            allowed = OPTIONAL[package]
            assert any(relative.startswith(place) for place in allowed), f"{relative}: {package}"


def test_the_package_imports_no_tests_and_no_machine():
    for path in FILES:
        for module, line in imports(path):
            first = module.split(".")[0]
            assert first not in ("tests", "benchmarks", "softgpu"), f"{path}:{line}: {module}"


def test_softgpu_needs_numpy_and_the_standard_library_only():
    for path in SOFTGPU.rglob("*.py"):
        for module, line in imports(path):
            first = module.split(".")[0]
            known = first in sys.stdlib_module_names or first in ("numpy", "softgpu")
            assert known, f"{path}:{line}: {module}"


CSRC = ROOT / "csrc"
CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
# Where a file lies -> what of csrc it may include; whether it may include torch.
MAY_INCLUDE = {
    "common": (("common",), False),
    "common/check.h": (("common",), True),
    "cuda": (("common", "cuda", "cuda/device"), True),
    "cuda/device": (("common", "cuda/device"), False),
    "": (("cuda",), False),  # bindings.cpp; build_facts.h is written by the build
}


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_includes_only_what_stands_below(path):
    name = path.relative_to(CSRC).as_posix()
    folder = name.rpartition("/")[0]
    folders, torch = MAY_INCLUDE.get(name) or MAY_INCLUDE[folder]
    for kind, included in re.findall(r'^#include ([<"])([^>"]+)[>"]', path.read_text(), re.M):
        if kind == "<" or included == "build_facts.h":
            assert torch or not included.startswith("torch/"), f"{name}: includes {included}"
            continue
        target = (path.parent / included).resolve().relative_to(CSRC)
        assert target.parent.as_posix() in folders, f"{name}: includes {included}"
        if folder == "cuda/device":
            assert target.name != "check.h", f"{name}: device code takes plain structs"


def test_every_source_file_names_its_licence():
    text = "SPDX-License-Identifier: Apache-2.0"
    for folder in ("resnet_fast", "softgpu", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text().partition("\n")[0] == f"# {text}", path
    assert len(CPP_FILES) > 15
    for path in (*CPP_FILES, *(ROOT / "tests").rglob("*.cu")):
        assert path.read_text().partition("\n")[0] == f"// {text}", path


def neighbours(path: Path) -> set[Path]:
    """The files of the package that a file imports, lazily or for its types too."""
    found = set()
    for module, _ in imports(path):
        parts = module.split(".")[1:] if module.startswith("resnet_fast.") else []
        here = PACKAGE.joinpath(*parts)
        places = (here.with_suffix(".py"), here / "__init__.py", here.parent.with_suffix(".py"))
        found |= {place for place in places if parts and place.is_file()}
    return found - {path}


def test_no_file_imports_itself_by_way_of_others():
    graph = {path: neighbours(path) for path in FILES if path.parent != PACKAGE}
    while leaves := [path for path, others in graph.items() if not others & graph.keys()]:
        for path in leaves:
            del graph[path]
    assert not graph, f"in or above a circle: {sorted(str(p.relative_to(PACKAGE)) for p in graph)}"
