# SPDX-License-Identifier: Apache-2.0
"""The recipe of the CUDA C++ extension resnet_fast._C, shared by setup.py and `resnet-fast build`.

    csrc/cuda/*.cu, csrc/bindings.cpp  --nvcc, by ninja-->  resnet_fast/_C.<python>.so

Only the standard library is used and torch is not imported: setup.py loads this file alone, before
there is a package. nvcc compiles and links everything: it knows its own headers, and links CUDA's
runtime statically, so that the module loads on a machine without a GPU or a driver. torch is met
through its stable headers, so the module serves every release from `TORCH_TARGET` on.

The front end runs once: the PTX of the first architecture, which the tests run on the PTX machine,
is assembled for all. The kernels use nothing newer, and it saves more than half of the time. That
PTX is in the module too, so a GPU newer than all of the list can run it.

ptxas says of every kernel what it takes; it is kept beside each object and becomes the report.
"""

from __future__ import annotations

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
        host_compiler: what nvcc is told to use, or "" for its own choice.
        cuda: nvcc's version, (13, 0).
        torch: the folder of the installed torch.
        torch_version: its version.
        pybind11: its include folder.
        wheels: NVIDIA's wheels, searched for what the toolkit lacks: folders with include and lib.
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
class Usage:
    """What ptxas says of one kernel for one architecture."""

    source: str
    kernel: str
    arch: int
    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class Report:
    """A finished build.

    Args:
        path: the module.
        architectures: compute capabilities times ten; of the first there is PTX as well.
        left_out: default architectures that this nvcc does not know.
        seconds: wall clock.
        usage: of every kernel and architecture.
        toolchain: with what it was built.
    """

    path: Path
    architectures: tuple[int, ...]
    left_out: tuple[int, ...]
    seconds: float
    usage: tuple[Usage, ...]
    toolchain: Toolchain


def find() -> Toolchain:
    """Look for all that a build needs; no GPU is asked for.

    Raises:
        BuildError: what is missing or does not fit, and what to do.
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
        folder: where objects are kept between builds; default: build/ beside csrc in a checkout;
            a temporary folder where the package is installed or `output` is given.
        output: the module's file; default: in the package.
        progress: called at every step.
        verbose: called with every line that the tools print, commands included.

    Raises:
        BuildError: the output cannot be written, an architecture is not known, or a tool failed:
            with its messages.
    """
    if folder is None and output is None and csrc().parent == PACKAGE.parent:
        folder = PACKAGE.parent / "build" / "extension"
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return build(
                toolchain, architectures=architectures, jobs=jobs, folder=Path(temporary),
                output=output, progress=progress, verbose=verbose,
            )  # fmt: skip
    begun = time.monotonic()
    wanted, left_out = _architectures(toolchain, architectures)
    output = output or PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    _check_writable(output.parent)
    record(output)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs or len(os.sched_getaffinity(0))
    _write(folder / "build.ninja", _ninja(toolchain, wanted, jobs))
    _write(folder / "build_facts.h", _facts(toolchain, wanted))
    _run_ninja(toolchain, folder, jobs, progress, verbose)
    # A copy beside it and a rename: processes that have the old module loaded keep it whole.
    beside = output.with_name(output.name + ".new")
    shutil.copyfile(folder / "_C.so", beside)
    os.replace(beside, output)
    usage = tuple(u for log in sorted(folder.glob("*.log")) for u in _usage(log, toolchain))
    return Report(output, wanted, left_out, time.monotonic() - begun, usage, toolchain)


def describe(report: Report, every_kernel: bool = False) -> list[str]:
    """A report as lines; spills are always told, each kernel's registers on demand."""
    names = ", ".join(str(arch / 10) for arch in report.architectures)
    cuda = ".".join(map(str, report.toolchain.cuda))
    target = ".".join(map(str, TORCH_TARGET))
    size = report.path.stat().st_size / 1e6
    lines = [
        f"built {report.path} ({size:.1f} MB) in {report.seconds:.0f} s",
        f"  GPUs     {names}; newer ones by PTX of {report.architectures[0] / 10}",
        f"  with     nvcc {cuda}, torch {report.toolchain.torch_version}; "
        f"loads with torch {target} and newer",
    ]
    if report.left_out:
        left = ", ".join(str(arch / 10) for arch in report.left_out)
        lines.append(f"  without  {left}, which nvcc {cuda} does not know")
    for source in dict.fromkeys(u.source for u in report.usage):
        usage = [u for u in report.usage if u.source == source]
        registers = [u.registers for u in usage]
        spilled = {u.kernel for u in usage if u.spill_bytes}
        lines.append(
            f"  kernels  {source}: {len({u.kernel for u in usage})}, {min(registers)} to "
            f"{max(registers)} registers, {len(spilled) or 'none'} with spills"
        )
        for kernel in dict.fromkeys(u.kernel for u in usage):
            own = [u for u in usage if u.kernel == kernel]
            if every_kernel or kernel in spilled:
                per_arch = ", ".join(f"{u.arch / 10}: {u.registers}" for u in own)
                spills = [f"{u.spill_bytes} bytes on {u.arch / 10}" for u in own if u.spill_bytes]
                told = f"; spills {', '.join(spills)}" if spills else ""
                lines.append(f"             {kernel}: registers {per_arch}{told}")
    return lines


def csrc() -> Path:
    """The sources: beside the package in a checkout, inside it where it was installed."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def digest() -> str:
    """Of the sources that are here now: a module with another one was built from others."""
    files = sorted(path for path in csrc().rglob("*") if path.suffix in SUFFIXES)
    content = hashlib.sha256()
    for path in files:
        content.update(f"{path.relative_to(csrc()).as_posix()}\n".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def record(module: Path) -> None:
    """Enter a module of the installed package into pip's list of its files.

    `pip uninstall` takes along what is listed there. A module that it left behind would keep a
    folder `resnet_fast`, which Python imports as an empty package. A checkout that is installed to
    be edited has no such list, and pip leaves it alone.
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
    """Before anything is compiled."""
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
    """What to build, and what of the default this nvcc does not know."""
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
    """The header in which bindings.cpp reads what was built."""
    cuda = ".".join(map(str, toolchain.cuda))
    return (
        "#pragma once\n"
        f"#define RESNET_FAST_ARCHITECTURES {', '.join(map(str, architectures))}\n"
        f"#define RESNET_FAST_PTX {architectures[0]}\n"
        f'#define RESNET_FAST_SOURCES "{digest()}"\n'
        f'#define RESNET_FAST_BUILT_FOR "torch {toolchain.torch_version}, CUDA {cuda}"\n'
    )


def _write(path: Path, text: str) -> None:
    """Write a file unless it says so already: what depends on it would be built again."""
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


def _usage(log: Path, toolchain: Toolchain) -> list[Usage]:
    """What ptxas said while one source was compiled."""
    found = []
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers in pattern.findall(log.read_text()):
        spilled = max(int(stack), int(stores), int(loads))
        found.append(Usage(log.stem, name, int(arch), int(registers), spilled))
    names = _demangled([u.kernel for u in found], toolchain)
    return [
        Usage(u.source, name, u.arch, u.registers, u.spill_bytes)
        for u, name in zip(found, names, strict=True)
    ]


def _demangled(names: list[str], toolchain: Toolchain) -> list[str]:
    """C++ names without namespaces and parameters; as they are where no tool can read them."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        beside = _toolkit(toolchain) / "bin" / "cu++filt"
        tool = str(beside) if beside.is_file() else None
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if len(lines) != len(names):
        return names
    return [_plain(line) for line in lines]


def _plain(signature: str) -> str:
    """`void resnet_fast::f<__half, resnet_fast::Tile<(int)64> >(P)` -> `f<float16, Tile<64> >`."""
    text = re.sub(r"\((?:int|bool)\)", "", signature).replace("resnet_fast::", "")
    text = re.sub(r"^void ", "", text.rpartition("(")[0] or text)
    return text.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16").strip()


def _toolkit(toolchain: Toolchain) -> Path:
    """The folder of the CUDA toolkit; nvcc on PATH may be a script that lies elsewhere."""
    said = subprocess.run(
        [toolchain.nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull],
        capture_output=True, text=True,
    )  # fmt: skip
    top = re.search(r"#\$ TOP=(.*)", said.stderr)
    return Path(top[1]) if top else Path(toolchain.nvcc).resolve().parent.parent


def _has_runtime(toolchain: Toolchain) -> bool:
    top = _toolkit(toolchain)
    return any(top.glob("lib*/libcudart_static.a")) or any(
        top.glob("targets/*/lib/libcudart_static.a")
    )


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
