# SPDX-License-Identifier: Apache-2.0
"""The recipe of the CUDA C++ extension resnet_fast._C, shared by setup.py and `resnet-fast build`.

    csrc/cuda/*.cu, csrc/bindings.cpp  --nvcc, by ninja-->  resnet_fast/_C.<python>.so

Only the standard library is used and torch is not imported: setup.py loads this file alone, before
there is a package. nvcc compiles and links everything: it knows its own headers, and links CUDA's
runtime statically, so that the module loads on a machine without a GPU or a driver. Only torch's
stable headers are used, so the module works with every release from `TORCH_TARGET` on.

The sources are compiled once, to the PTX of the first architecture, which is then assembled for
all: the kernels use nothing newer, and this saves more than half of the time. The module contains
that PTX too, so GPUs newer than the whole list can run it.

ptxas reports the registers and spills of every kernel; its output is kept beside each object.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TORCH_TARGET = (2, 11)
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
Progress = Callable[[int, int, str], None]  # steps done, steps in all, the last one


class BuildError(Exception):
    """The extension cannot be built; the text says why, and what to do."""


@dataclass(frozen=True)
class Toolchain:
    """What a build needs, found on this machine.

    Args:
        nvcc, ninja: the programs.
        host_compiler: the C++ compiler that nvcc must use, or "" for nvcc's own choice.
        cuda: nvcc's version, (13, 0).
        torch: the folder of the installed torch.
        torch_version: its version.
        pybind11: its include folder.
        wheels: folders of NVIDIA's wheels (include and lib), for what the toolkit lacks.
        known: compute capabilities times ten that nvcc compiles for.
    """

    nvcc: str
    ninja: str
    host_compiler: str
    cuda: tuple[int, int]
    torch: Path
    torch_version: str
    pybind11: Path
    wheels: tuple[Path, ...]
    known: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """A finished build.

    Args:
        path: the module.
        architectures: compute capabilities times ten; of the first there is PTX as well.
        left_out: default architectures that this nvcc does not know.
        seconds: wall clock.
        logs: what ptxas said while each .cu was compiled, by its name without the suffix.
        toolchain: what it was built with.
    """

    path: Path
    architectures: tuple[int, ...]
    left_out: tuple[int, ...]
    seconds: float
    logs: dict[str, str]
    toolchain: Toolchain


def find() -> Toolchain:
    """Find everything a build needs; a GPU is not part of it.

    Raises:
        BuildError: something is missing or does not fit; the text says what to do.
    """
    nvcc = _program("nvcc", "install NVIDIA's CUDA toolkit, or put its bin folder on PATH")
    torch = _package("torch", "pip install torch, and let pip see it: --no-build-isolation")
    version = runpy.run_path(str(torch / "version.py"))
    text, cuda = str(version["__version__"]), version.get("cuda")
    if not cuda:
        raise BuildError(f"torch {text} is a build without CUDA; install one with it")
    if tuple(map(int, re.findall(r"\d+", text)[:2])) < TORCH_TARGET:
        wanted = ".".join(map(str, TORCH_TARGET))
        raise BuildError(f"torch {text} is older than {wanted}; pip install -U torch")
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if release is None:
        raise BuildError(f"{nvcc} does not say its version; reinstall the CUDA toolkit")
    own = int(release[1]), int(release[2])
    if own[0] != int(cuda.partition(".")[0]):
        major = cuda.partition(".")[0]
        raise BuildError(
            f"nvcc is of CUDA {own[0]}.{own[1]}, torch {text} of CUDA {cuda}; "
            f"put a toolkit of CUDA {major} first on PATH, or install another torch"
        )
    chosen = os.environ.get("NVCC_CCBIN", "")
    if not shutil.which(chosen or "g++"):
        raise BuildError(
            f"the host compiler {chosen or 'g++'} is missing; install it, or set NVCC_CCBIN"
        )
    ninja = _program("ninja", "pip install ninja")
    pybind11 = _package("pybind11", "pip install pybind11") / "include"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise BuildError(f"{header} is missing; install Python's headers (python3-dev)")
    wheels = tuple(sorted(torch.parent.glob(f"nvidia/cu{own[0]}"), reverse=True))
    listed = _output(nvcc, "--list-gpu-arch")
    known = tuple(sorted({int(arch) for arch in re.findall(r"compute_(\d+)\b", listed)}))
    return Toolchain(nvcc, ninja, chosen, own, torch, text, pybind11, wheels, known)


def build(
    toolchain: Toolchain,
    *,
    architectures: Sequence[int] | None = None,
    jobs: int | None = None,
    folder: Path | None = None,
    output: Path | None = None,
    progress: Progress = lambda *_: None,
    verbose: Callable[[str], None] | None = None,
) -> Report:
    """Compile, link, and put the module where it is imported from.

    Args:
        toolchain: of `find`.
        architectures: compute capabilities times ten; default: those of `ARCHITECTURES` that nvcc
            knows.
        jobs: processes at a time; default: the usable cores.
        folder: where objects are kept between builds; default: build/ beside csrc in a checkout,
            a temporary folder if the package is installed or `output` is given.
        output: the module's file; default: in the package.
        progress: called at every step.
        verbose: called with every line that the tools print, commands included.

    Raises:
        BuildError: the output cannot be written, an architecture is not known, or a tool failed;
            the text has the tool's messages.
    """
    begun = time.monotonic()
    wanted, left_out = _architectures(toolchain, architectures)
    module = output or PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    _check_writable(module.parent)
    record(module)
    if folder is None and output is None and csrc().parent == PACKAGE.parent:
        folder = PACKAGE.parent / "build" / "extension"
    jobs = jobs or len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "build.ninja", _ninja(toolchain, wanted, jobs))
        _write(folder / "build_facts.h", _facts(toolchain, wanted))
        _run_ninja(toolchain, folder, jobs, progress, verbose)
        # A copy and a rename: processes that have the old module loaded keep it whole.
        beside = module.with_name(module.name + ".new")
        shutil.copyfile(folder / "_C.so", beside)
        os.replace(beside, module)
        logs = {log.stem: log.read_text() for log in sorted(folder.glob("*.log"))}
    return Report(module, wanted, left_out, time.monotonic() - begun, logs, toolchain)


def csrc() -> Path:
    """The sources: beside the package in a checkout, inside it where it was installed."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def digest() -> str:
    """A hash of the current sources; a module that has another one was built from other sources."""
    files = sorted(path for path in csrc().rglob("*") if path.suffix in SUFFIXES)
    content = hashlib.sha256()
    for path in files:
        content.update(f"{path.relative_to(csrc()).as_posix()}\n".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def record(module: Path) -> None:
    """Add the module to pip's list of the installed package's files.

    `pip uninstall` removes what is listed there. A module left behind would keep the folder
    `resnet_fast`, which Python would import as an empty package. An editable installation has no
    such list, and pip leaves its folder alone.
    """
    try:
        files = importlib.metadata.distribution("resnet_fast").files or ()
    except importlib.metadata.PackageNotFoundError:
        return
    listed = {Path(file.locate()).resolve(): file for file in files}
    if PACKAGE / "__init__.py" not in listed or module.resolve().parent != PACKAGE:
        return
    own = next((path for path in listed if path.name == "RECORD"), None)
    if own is None or module.resolve() in listed:
        return
    try:
        with open(own, "a", newline="") as file:
            name = f"{PACKAGE.name}/{module.name}"
            csv.writer(file, lineterminator="\n").writerow((name, "", ""))
    except OSError as error:
        raise BuildError(f"{own} cannot be written: {error.strerror}") from error


def _check_writable(folder: Path) -> None:
    """Raise BuildError before anything is compiled."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}; name another folder with --into"
        raise BuildError(text) from error


def _architectures(
    toolchain: Toolchain, asked: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The architectures to build, and the default ones that this nvcc does not know."""
    for arch in asked or ():
        if arch < 80:
            raise BuildError(f"the kernels need compute capability 8.0, not {arch / 10}")
        if arch not in toolchain.known:
            known = ", ".join(str(a / 10) for a in toolchain.known if a >= 80)
            raise BuildError(f"nvcc cannot compile for {arch / 10}; it knows {known}")
    if asked:
        return tuple(sorted(set(asked))), ()
    wanted = tuple(arch for arch in ARCHITECTURES if arch in toolchain.known)
    return wanted, tuple(arch for arch in ARCHITECTURES if arch not in wanted)


def _ninja(toolchain: Toolchain, architectures: Sequence[int], jobs: int) -> str:
    """The text of build.ninja: one object for each source, and the link."""
    sources = sorted((csrc() / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    sources.append(csrc() / "bindings.cpp")
    first = architectures[0]
    code = ",".join([*(f"sm_{arch}" for arch in architectures), f"compute_{first}"])
    gencode = f"-gencode 'arch=compute_{first},code=[{code}]'"
    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}"
    flags = [
        "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden",
        f"-DUSE_CUDA -DTORCH_TARGET_VERSION={target}",
        f"-isystem {_quoted(toolchain.torch / 'include')}",
        f"-isystem {_quoted(toolchain.pybind11)}",
        f"-isystem {_quoted(sysconfig.get_paths()['include'])}",
        *(f"-Xcompiler -idirafter,{_quoted(w / 'include')}" for w in toolchain.wheels),
    ]
    if toolchain.host_compiler:
        flags.append(f"-ccbin {_quoted(toolchain.host_compiler)}")
    libraries = [f"-L{_quoted(toolchain.torch / 'lib')} -ltorch_cpu -ltorch_cuda -lc10"]
    libraries += [
        f"-L{_quoted(w / 'lib')}" for w in toolchain.wheels if not _has_runtime(toolchain)
    ]
    objects = " ".join(f"{path.stem}.o" for path in sources)
    lines = [
        f"nvcc = {_quoted(toolchain.nvcc)}",
        f"flags = {' '.join(flags)}",
        f"gencode = {gencode} --threads {jobs} -Xptxas -v",
        f"libraries = {' '.join(libraries)}",
        "rule compile",
        "  command = $nvcc $flags $more -MD -MF $out.d -c $in -o $out > $log 2>&1 "
        "|| (cat $log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $name",
        "rule link",
        "  command = $nvcc -shared $in -o $out $libraries",
        "  description = link",
    ]
    for path in sources:
        is_cuda = path.suffix == ".cu"
        lines += [
            f"build {path.stem}.o: compile {_escaped(path)}",
            f"  name = {path.name}",
            f"  log = {path.stem}.{'log' if is_cuda else 'out'}",
            f"  more = {'$gencode' if is_cuda else '-I.'}",
        ]
    lines += [f"build _C.so: link {objects}", "default _C.so", ""]
    return "\n".join(lines)


def _facts(toolchain: Toolchain, architectures: Sequence[int]) -> str:
    """The header that tells bindings.cpp what was built."""
    cuda = ".".join(map(str, toolchain.cuda))
    return (
        "#pragma once\n"
        f"#define RESNET_FAST_ARCHITECTURES {', '.join(map(str, architectures))}\n"
        f"#define RESNET_FAST_PTX {architectures[0]}\n"
        f'#define RESNET_FAST_SOURCES "{digest()}"\n'
        f'#define RESNET_FAST_BUILT_FOR "torch {toolchain.torch_version}, CUDA {cuda}"\n'
    )


def _write(path: Path, text: str) -> None:
    """Write a file unless it has this text already: ninja rebuilds what depends on a new one."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _run_ninja(toolchain, folder: Path, jobs: int, progress: Progress, verbose) -> None:
    command = [toolchain.ninja, "-C", str(folder), "-j", str(jobs), *(["-v"] if verbose else [])]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            for line in process.stdout:
                said.append(line)
                if verbose:
                    verbose(line.rstrip())
                if step := re.match(r"\[(\d+)/(\d+)\] (.*)", line):
                    progress(int(step[1]), int(step[2]), step[3])
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        errors = [line for line in said if not line.startswith("ninja: Entering")]
        raise BuildError("compiling failed:\n" + "".join(errors[-60:]).rstrip())


def toolkit(toolchain: Toolchain) -> Path:
    """The folder of the CUDA toolkit: nvcc on PATH may be a script outside of it."""
    said = subprocess.run(
        [toolchain.nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull],
        capture_output=True, text=True,
    )  # fmt: skip
    top = re.search(r"#\$ TOP=(.*)", said.stderr)
    return Path(top[1]) if top else Path(toolchain.nvcc).resolve().parent.parent


def _has_runtime(toolchain: Toolchain) -> bool:
    top = toolkit(toolchain)
    places = ("lib*", "targets/*/lib")
    return any(any(top.glob(f"{place}/libcudart_static.a")) for place in places)


def _program(name: str, remedy: str) -> str:
    # pip puts programs beside Python, which is not on PATH where the environment is not activated
    beside = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside) if os.access(beside, os.X_OK) else None)
    if found is None:
        raise BuildError(f"{name} is missing; {remedy}")
    return found


def _package(name: str, remedy: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"{name} is not installed; {remedy}")
    return Path(spec.submodule_search_locations[0])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _quoted(path) -> str:
    """A path in a command of build.ninja."""
    text = str(path).replace("$", "$$")
    return f"'{text}'" if re.search(r"[^\w@%+=:,./$-]", text) else text


def _escaped(path: Path) -> str:
    """A path as an input of build.ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))
