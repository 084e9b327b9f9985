# SPDX-License-Identifier: Apache-2.0
"""What this machine has, which backend serves which op here, and why the others do not."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from resnet_fast import _env, ops


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that matters for speed: whether it is there, what it is, and how to get it.

    Args:
        name: what was looked for.
        present: whether it was found.
        detail: what was found, or what follows from its absence.
        remedy: what to do about it; empty where there is nothing to do.
    """

    name: str
    present: bool
    detail: str
    remedy: str = ""


def facts() -> list[Fact]:
    """All facts, in the order in which they matter; nothing is compiled and no GPU is set up."""
    return [
        _torch(),
        _gpu(),
        _triton(),
        _compiler(),
        _nvcc(),
        _extension(),
        *_cpu(),
        _torchvision(),
        *_environment(),
    ]


def _torch() -> Fact:
    return Fact("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def _gpu() -> Fact:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"this torch was built for CUDA {built}" if built else "this torch is a CPU build"
        return Fact("NVIDIA GPU", False, f"none that torch can use; {why}")
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if major < 8:
        return Fact("NVIDIA GPU", True, name, "the kernels need 8.0 or newer; aten is used")
    return Fact("NVIDIA GPU", True, name)


def _triton() -> Fact:
    if find_spec("triton") is None:
        detail = "not installed: GPU convolutions run unfused"
        return Fact("Triton", False, detail, "pip install triton (Linux)")
    return Fact("Triton", True, _version("triton"))


def _compiler() -> Fact:
    found = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if found:
        return Fact("C compiler", True, str(shutil.which(found)))
    detail = "Triton needs one to build its launcher, once; nothing else does"
    return Fact("C compiler", False, detail, "install gcc or clang, or set CC")


def _nvcc() -> Fact:
    found = shutil.which("nvcc")
    return Fact("nvcc", found is not None, found or "only `resnet-fast build` needs it")


def _extension() -> Fact:
    name, (loads, detail) = "CUDA C++ extension", ops.explain_extension()
    if not loads:
        return Fact(name, False, f"{detail}; Triton serves the GPU", "resnet-fast build")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        refusal = ops.explain_extension_on(major * 10 + minor) or ops.explain_extension_missing()
        if refusal:
            return Fact(name, False, f"{refusal}; Triton serves the GPU", "resnet-fast build")
        detail = "; ".join((detail, *ops.explain_extension_resources()))
    return Fact(name, True, detail)


def _cpu() -> list[Fact]:
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [Fact("CPU", True, f"{capability}")]
    if not torch.backends.mkldnn.is_available():
        detail = "this build of torch has none: CPU convolutions run unfused"
        return [*rows, Fact("oneDNN", False, detail)]
    rows.append(Fact("oneDNN", True, "fused convolutions in float32"))
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    amx = torch.cpu._is_amx_tile_supported()
    detail = f"{'AMX tiles' if amx else 'AVX-512 or AVX2'}" if bf16 else "no instructions for it"
    rows.append(Fact("oneDNN bfloat16", bf16, detail, "" if bf16 else "use float32"))
    fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    rows.append(Fact("oneDNN float16", fp16, "AVX-512 FP16 or AMX" if fp16 else "none here"))
    rows.append(Fact("AMX", amx, "bfloat16 matrix tiles" if amx else "not on this CPU"))
    return rows


def _torchvision() -> Fact:
    if find_spec("torchvision") is None:
        detail = "not installed: everything but weights= works"
        return Fact("torchvision", False, detail, 'pip install "resnet_fast[vision]"')
    return Fact("torchvision", True, _version("torchvision"))


def _environment() -> list[Fact]:
    """The variables that are set and that `services` does not look at."""
    rows = []
    if _env.disabled():
        detail = "models take their plain path, whatever serves the ops"
        rows.append(Fact("RESNET_FAST_DISABLE", True, detail, "unset it"))
    if name := _env.backend():
        detail = f"{name} is asked first wherever an op has it, before those that serve below"
        rows.append(Fact("RESNET_FAST_BACKEND", True, detail))
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        module = sys.modules.get(package)
        return getattr(module, "__version__", "of unknown version")


@dataclass(frozen=True, slots=True)
class Service:
    """Which backend serves an op here.

    Args:
        op, device, dtype: what is asked.
        backend: the backend that runs.
        others: for each other backend, why it does not.
    """

    op: str
    device: str
    dtype: str
    backend: str
    others: dict[str, str]


def services() -> list[Service]:
    """For each op, device and dtype the backend that runs, asked with typical tensors."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return [
        Service(name, device, dtype, *op.explain(device, dtype))
        for name, op in ops.OPS.items()
        for device in devices
        for dtype in ("float32", "bfloat16", "float16")
    ]
