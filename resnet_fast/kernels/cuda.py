# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ extension: the schemas of its ops, whether it can be used here, and its module.

The ops are private and write into tensors that the caller has allocated: no allocation and no fake
in C++, and any tile can be called from a test. Schemas stand here, implementations in `csrc/cuda`;
they meet when `resnet_fast._C` is imported, which happens only when something asks for it.

    tile       index in the op's table: `module().tiles[op]`
    workspace  float32 [split_k, N, P, Q, K] where split_k is above 1
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from resnet_fast import build

LIBRARY = torch.library.Library("resnet_fast", "FRAGMENT")

_CONV = (
    "Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? mean, Tensor? var, float eps, "
    "Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, bool relu, int tile, "
    "int split_k, Tensor(b!)? workspace, Tensor(a!) out"
)
OPS = ("add_relu", "conv_bn_act", "conv_bn_join", "stem_pool")
_STEM = (
    "Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? mean, Tensor? var, float eps, "
    "Tensor? image_mean, Tensor? image_std, int tile, Tensor(a!) out"
)
SCHEMAS = (
    "_add_relu_cuda(Tensor x, Tensor y, Tensor(a!) out) -> ()",
    "_add_relu_backward_cuda(Tensor grad, Tensor y, Tensor(a!) out) -> ()",
    f"_conv_bn_act_cuda({_CONV}) -> ()",
    # The struct that _conv_bn_act_cuda would launch, as bytes on the CPU; tensors may be there too.
    f"_conv_problem({_CONV}, Tensor(c!) bytes) -> ()",
    "_conv_bn_join_cuda(Tensor h, Tensor weight, Tensor scale, Tensor shift, Tensor? mean, "
    "Tensor? var, float eps, Tensor x, Tensor proj_weight, Tensor proj_scale, Tensor proj_shift, "
    "Tensor? proj_mean, Tensor? proj_var, float proj_eps, int[2] stride, int tile, "
    "Tensor(a!) out) -> ()",
    f"_stem_pool_cuda({_STEM}) -> ()",
    f"_stem_problem({_STEM}, Tensor(c!) bytes) -> ()",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)

NAME = "resnet_fast._C"
HOW_TO_BUILD = "run `resnet-fast build` (it needs nvcc)"


def module() -> ModuleType:
    """`resnet_fast._C`, whose import registers the kernels.

    Raises:
        RuntimeError: it is not built, or cannot be loaded: with the reason.
    """
    reason = broken()
    if reason is not None:
        raise RuntimeError(f"resnet_fast: the CUDA C++ extension is {reason}; {HOW_TO_BUILD}")
    return importlib.import_module(NAME)


def missing() -> str | None:
    """Why the extension cannot be used on this machine, or None; cheapest questions first."""
    if built() and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if (reason := broken()) is not None:
        return f"the CUDA C++ extension is {reason}; {HOW_TO_BUILD}"
    return driver_refusal()


@functools.cache
def built() -> bool:
    """Whether there is a file to load, working or not."""
    return importlib.util.find_spec(NAME) is not None


@functools.cache
def broken() -> str | None:
    """Why the extension cannot be loaded, or None; a GPU is not asked for."""
    if not built():
        return "not built"
    try:
        extension = importlib.import_module(NAME)
    except Exception as error:
        # A module for another Python or another torch fails in many ways; all have one remedy.
        text = " ".join(str(error).split())
        return f"broken: {type(error).__name__}: {text}"
    if getattr(extension, "sources", "") != build.digest():
        return "broken: it was built from other sources than those in csrc"
    return None


@functools.cache
def driver_refusal() -> str | None:
    """Why the CUDA runtime in the binary, which is not torch's, cannot use the driver, or None."""
    error = module().driver_error()
    if not error:
        return None
    return f"the CUDA C++ extension, built with {module().built_for}: {error}; {HOW_TO_BUILD}"


@functools.cache
def architecture_refusal(arch: int) -> str | None:
    """Why no kernel of the binary runs on compute capability `arch` (90 for 9.0), or None.

    Machine code runs on its own major version, from its own minor version on; PTX is compiled by
    the driver for every capability from its own on.
    """
    if arch < 80:
        return f"compute capability {arch / 10} is below 8.0"
    extension = module()
    held, ptx = extension.architectures, extension.ptx
    if any(have // 10 == arch // 10 and have <= arch for have in held) or ptx <= arch:
        return None
    names = ", ".join(str(have / 10) for have in held)
    return (
        f"the CUDA C++ extension was built for {names} and PTX of {ptx / 10}, not for {arch / 10}; "
        f"run `resnet-fast build --arch {arch / 10}`"
    )


def explain() -> tuple[bool, str]:
    """Whether the extension loads, and what it holds or why it does not, in one line."""
    reason = broken()
    if reason is not None:
        return False, reason
    extension = module()
    held = ", ".join(str(arch / 10) for arch in extension.architectures)
    tiles = ", ".join(f"{op} in {len(table)} tiles" for op, table in extension.tiles.items())
    what = f"for {held}, newer GPUs by PTX of {extension.ptx / 10}; {tiles}"
    return True, f"{what}; built with {extension.built_for}"


def resources(device: int = 0) -> list[str]:
    """What each op's kernels take of a GPU, a line for an op.

    Raises:
        RuntimeError: no GPU, or no extension.
    """
    extension = module()
    lines = []
    for op in OPS:
        count = len(extension.kernels(op))
        taken = [extension.resources(op, i, device) for i in range(count)]

        def spread(key: str, taken=taken) -> str:
            values = sorted(kernel[key] for kernel in taken)
            return f"{values[0]} to {values[-1]}"

        local = max(kernel["local_bytes"] for kernel in taken)
        lines.append(
            f"{op}: {count} kernels of {spread('registers')} registers, "
            f"{spread('shared_bytes')} bytes of shared and at most {local} of local memory, "
            f"{spread('blocks_per_sm')} blocks on an SM"
        )
    return lines
