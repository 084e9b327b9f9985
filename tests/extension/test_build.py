# SPDX-License-Identifier: Apache-2.0
"""The recipe's refusals, and a package whose extension is absent or broken; nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types
import venv
import zipfile
from pathlib import Path

import pytest

from resnet_fast import build, cli, machine
from resnet_fast.cli import ptxas
from resnet_fast.kernels import cuda

ROOT = Path(__file__).resolve().parents[2]
TOOLCHAIN = build.Toolchain(
    nvcc="nvcc",
    ninja="ninja",
    host_compiler="",
    cuda=(13, 0),
    torch=Path("/somewhere/torch"),
    torch_version="2.14.0",
    pybind11=Path("/somewhere/pybind11"),
    wheels=(Path("/somewhere/nvidia/cu13"),),
    known=(75, 80, 90),
)


def program(folder: Path, name: str, text: str) -> None:
    """A stand-in for a tool: a shell script that prints."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH with stand-ins for nvcc of CUDA 13, g++ and ninja; torch's version can be set."""
    for name in ("g++", "ninja"):
        program(tmp_path, name, "")
    program(tmp_path, "nvcc", "release 13.0, compute_80 compute_90")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "python"))
    torch = tmp_path / "torch"
    torch.mkdir()

    def version(torch_version="2.14.0+cu130", cuda="13.0"):
        (torch / "version.py").write_text(f"__version__, cuda = {torch_version!r}, {cuda!r}\n")

    version()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(build, "_package", lambda name, _: tmp_path / name)
    tools.folder, tools.version = tmp_path, version
    return tools


def test_it_finds_what_is_there(tools):
    found = build.find()
    assert found.cuda == (13, 0) and found.known == (80, 90) and found.torch_version.startswith("2")


@pytest.mark.parametrize("name", ["nvcc", "ninja", "g++"])
def test_a_missing_tool_is_named_with_a_remedy(name, tools):
    (tools.folder / name).unlink()
    with pytest.raises(build.BuildError, match=rf"{name.replace('+', '.')} is missing; .*install"):
        build.find()


def test_other_misfits_are_named(tools, monkeypatch):
    tools.version(cuda=None)
    with pytest.raises(build.BuildError, match="without CUDA"):
        build.find()
    tools.version(cuda="12.6")
    with pytest.raises(build.BuildError, match=r"nvcc is of CUDA 13\.0, .*CUDA 12\.6; "):
        build.find()
    tools.version("2.9.1+cu130")
    with pytest.raises(build.BuildError, match=r"2\.9\.1.*older than 2\.11"):
        build.find()
    tools.version()
    (tools.folder / "Python.h").unlink()
    with pytest.raises(build.BuildError, match=r"Python\.h is missing"):
        build.find()


@pytest.mark.parametrize("name", ["torch", "pybind11"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match=f"{name} is not installed; pip install {name}"):
        build._package(name, f"pip install {name}")


def test_architectures():
    assert build._architectures(TOOLCHAIN, None) == ((80, 90), (86, 89, 100, 120))
    assert build._architectures(TOOLCHAIN, [90, 80, 90]) == ((80, 90), ())
    with pytest.raises(build.BuildError, match=r"cannot compile for 12\.0; it knows 8\.0, 9\.0"):
        build._architectures(TOOLCHAIN, [120])
    with pytest.raises(build.BuildError, match=r"need compute capability 8\.0, not 7\.5"):
        build._architectures(TOOLCHAIN, [75])


def test_wheels_come_after_the_toolkit_and_the_runtime_is_static(monkeypatch):
    monkeypatch.setattr(build, "_has_runtime", lambda _: True)
    text = build._ninja(TOOLCHAIN, (80, 90), jobs=2)
    assert "-idirafter,/somewhere/nvidia/cu13/include" in text
    assert "arch=compute_80,code=[sm_80,sm_90,compute_80]" in text
    assert "cudart" not in text  # nvcc links it statically by itself
    assert "/somewhere/nvidia/cu13/lib" not in text
    monkeypatch.setattr(build, "_has_runtime", lambda _: False)
    assert "-L/somewhere/nvidia/cu13/lib" in build._ninja(TOOLCHAIN, (80,), jobs=2)


def test_spills_are_told(tmp_path):
    log = (
        "ptxas info    : Compiling entry function 'good' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 30 registers, used 0 barriers\n"
        "ptxas info    : Compiling entry function 'bad' for 'sm_90'\n"
        "    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 0 barriers\n"
    )
    module = tmp_path / "_C.so"
    module.write_text("")
    report = build.Report(module, (80, 90), (120,), 1.0, {"op": log}, TOOLCHAIN)
    usage = ptxas.usage_of(report)
    assert [(u.kernel, u.arch, u.registers, u.spill_bytes) for u in usage] == [
        ("good", 80, 30, 0),
        ("bad", 90, 255, 24),
    ]
    text = "\n".join(ptxas.describe(report, usage))
    assert "30 to 255 registers, 1 with spills" in text and "24 bytes on 9.0" in text
    assert "without  12.0, which nvcc 13.0 does not know" in text and "good" not in text


def test_a_failing_compiler_is_quoted(tools):
    program(tools.folder, "ninja", "error: expected a semicolon")
    with (tools.folder / "ninja").open("a") as file:
        file.write("exit 1\n")
    with pytest.raises(build.BuildError, match=r"(?s)compiling failed:.*expected a semicolon"):
        build.build(build.find(), architectures=[80], folder=tools.folder / "objects")


@pytest.mark.parametrize("arguments", [["--arch", "ninety"], ["--arch", "7.5"], ["--jobs", "0"]])
def test_the_command_refuses(arguments, tools, capsys):
    try:
        status = cli.main(["build", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == cli.BAD_INPUT
    assert arguments[-1] in capsys.readouterr().err or arguments[0] == "--jobs"


def test_the_sources_are_found_in_a_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    assert (build.csrc() / "bindings.cpp").is_file()
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    (tmp_path / "csrc").mkdir()
    assert build.csrc() == tmp_path / "csrc"


def package(folder: Path, extension: bytes | None) -> Path:
    """A copy of the package by links, with `extension` as its _C or without one."""
    target = folder / "resnet_fast"
    target.mkdir()
    for path in (ROOT / "resnet_fast").iterdir():
        if not path.name.startswith("_C"):
            (target / path.name).symlink_to(path)
    if extension is not None:
        suffix = build.sysconfig.get_config_var("EXT_SUFFIX")
        (target / f"_C{suffix}").write_bytes(extension)
    return folder


USE = """
import sys
# where the checkout is installed to be edited, its finder would give this copy the checkout's _C
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch, resnet_fast
from resnet_fast import machine
from resnet_fast.kernels import cuda
x = torch.randn(2, 8, 4, 4)
assert torch.equal(resnet_fast.ops.add_relu(x, x), torch.relu(x + x))
fact = machine._extension()
print(fact.present, fact.detail, fact.remedy, cuda.missing(), sep="|")
try:
    cuda.module()
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("extension", "reason"),
    [(None, "not built"), (b"not a library", "broken: ImportError")],
    ids=["absent", "broken"],
)
def test_without_a_working_extension_check_says_why_and_the_rest_works(extension, reason, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env=os.environ | {"PYTHONPATH": str(package(tmp_path, extension))},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told, raised = done.stdout.strip().split("\n")
    present, detail, remedy, missing = told.split("|")
    assert present == "False" and reason in detail and remedy == "resnet-fast build"
    assert reason in missing or missing == "torch sees no NVIDIA GPU"
    assert reason in raised and "run `resnet-fast build`" in raised


@pytest.fixture
def loaded(monkeypatch):
    """loaded(attributes): a module with these is what loading the extension gives."""

    def forget():
        cuda.broken.cache_clear()
        cuda.driver_refusal.cache_clear()

    def load(**attributes):
        forget()
        module = types.SimpleNamespace(**attributes)
        monkeypatch.setattr(cuda.importlib, "import_module", lambda name: module)

    monkeypatch.setattr(cuda, "built", lambda: True)
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: True)
    yield load
    forget()


@pytest.mark.parametrize("attributes", [{}, {"sources": "of-another-commit"}], ids=["old", "other"])
def test_an_extension_of_other_sources_is_refused(attributes, loaded):
    """Its ops may have other arguments, which nothing would notice: the kernels are boxed."""
    loaded(**attributes)
    assert cuda.broken() == "broken: it was built from other sources than those in csrc"
    assert "other sources" in cuda.missing() and "resnet-fast build" in cuda.missing()


def test_a_driver_that_is_too_old_for_the_extension_is_told(loaded, monkeypatch):
    facts = {"sources": build.digest(), "built_for": "torch 2.14.0, CUDA 13.0"}
    loaded(**facts, driver_error=lambda: "CUDA driver version is insufficient")
    assert re.search(r"CUDA 13\.0: CUDA driver .*; run `resnet-fast build`", cuda.missing())
    monkeypatch.setattr(machine.ops, "explain_extension", lambda: (True, "for 8.0"))
    monkeypatch.setattr(machine.ops, "explain_extension_on", lambda arch: None)
    monkeypatch.setattr(machine.torch.cuda, "get_device_capability", lambda: (8, 0))
    fact = machine._extension()
    assert not fact.present and "driver version" in fact.detail
    loaded(**facts, driver_error=lambda: "")
    assert cuda.missing() is None


def test_the_digest_is_of_what_the_sources_say(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    source = tmp_path / "csrc" / "op.cu"
    source.parent.mkdir()
    source.write_text("one")
    first = build.digest()
    (source.parent / "notes.txt").write_text("no source")
    assert build.digest() == first
    source.write_text("other")
    assert build.digest() != first


def test_check_names_what_a_gpu_lacks(monkeypatch):
    monkeypatch.setattr(machine.ops, "explain_extension", lambda: (True, "for 8.0"))
    monkeypatch.setattr(machine.ops, "explain_extension_on", lambda arch: f"not for {arch / 10}")
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "get_device_capability", lambda: (7, 5))
    fact = machine._extension()
    assert not fact.present and "not for 7.5" in fact.detail and "Triton" in fact.detail


def test_check_tells_of_the_variables_that_are_set(monkeypatch):
    for name in ("RESNET_FAST_BACKEND", "RESNET_FAST_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    assert not machine._environment()
    monkeypatch.setenv("RESNET_FAST_BACKEND", "triton")
    monkeypatch.setenv("RESNET_FAST_DISABLE", "1")
    disabled, backend = machine._environment()
    assert "plain path" in disabled.detail and backend.detail.startswith("triton is asked first")


def test_what_the_kernels_take_is_a_line_for_each_op(monkeypatch):
    taken = {"registers": 40, "shared_bytes": 512, "local_bytes": 0, "blocks_per_sm": 2}
    extension = types.SimpleNamespace(
        kernels=lambda op: [op, op],
        resources=lambda op, kernel, device: taken | {"registers": 40 + kernel},
    )
    monkeypatch.setattr(cuda, "module", lambda: extension)
    lines = cuda.resources()
    assert [line.partition(":")[0] for line in lines] == list(cuda.OPS)
    assert all("2 kernels of 40 to 41 registers" in line for line in lines)
    assert all("512 to 512 bytes of shared and at most 0 of local" in line for line in lines)


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_a_place_that_cannot_be_written_is_refused_before_compiling(
    kind, tools, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(build, "_run_ninja", lambda *_: pytest.fail("it began to compile"))
    file = tmp_path / "file"
    file.write_text("")
    folder = {"a file": file, "below a file": file / "modules"}[kind]
    assert cli.main(["build", "--arch", "8.0", "--into", str(folder)]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert str(folder) in error and "cannot be written" in error


def wheel(folder: Path) -> Path:
    """A wheel of a package of our name, which holds the recipe alone."""
    info = "resnet_fast-0.1.0.dist-info"
    files = {
        "resnet_fast/__init__.py": "",
        "resnet_fast/build.py": (ROOT / "resnet_fast" / "build.py").read_text(),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: resnet_fast\nVersion: 0.1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    listed = [f"{name},," for name in (*files, f"{info}/RECORD")]
    path = folder / "resnet_fast-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": "\n".join(listed) + "\n"}.items():
            archive.writestr(name, text)
    return path


def test_pip_uninstall_takes_the_built_module_along(tmp_path):
    """What it left would be imported as an empty package."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("no pip is installed here")
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    quiet = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
    quiet["env"] = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel(tmp_path))], **quiet)
    code = """
from resnet_fast import build
module = build.PACKAGE / "_C.so"
for _ in range(2):  # built anew, it is listed once
    build.record(module)
module.write_text("")
print(build.PACKAGE)
"""
    done = subprocess.run([python, "-c", code], **quiet)
    package = Path(done.stdout.strip())
    assert (package / "_C.so").exists()
    (record,) = package.parent.glob("resnet_fast-*/RECORD")
    assert record.read_text().count("_C.so") == 1
    subprocess.run([*pip, "uninstall", "--yes", "resnet_fast"], **quiet)
    assert not package.exists()
