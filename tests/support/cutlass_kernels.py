# SPDX-License-Identifier: Apache-2.0
"""CUTLASS's convolutions as `CompiledKernel`s on our tensors, to be counted beside our own."""

from __future__ import annotations

from pathlib import Path

from resnet_fast.spec import ConvSpec, TileConfig
from softgpu import ptx
from tests.support import nvcc
from tests.support.cases import ConvTensors
from tests.support.compiled import CompiledKernel
from tests.support.cutlass import SOURCE, Program, compile_program


def compile_tile(tile: TileConfig, folder: Path) -> Program:
    """conv2d fprop for sm_80 and fp16 at the sizes of `tile`, which four warps share."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "NUM_STAGES")
    return compile_program(SOURCE, "80", folder, **{name: getattr(tile, name) for name in names})


def case(spec: ConvSpec) -> tuple[int, ...]:
    """The sizes that the host programs take: N H W C K R S padding stride."""
    return (
        *(spec.n, spec.h, spec.w, spec.c, spec.k, spec.r, spec.s),
        *(spec.padding[0], spec.stride[0]),
    )


def conv_kernel(program: Program, tensors: ConvTensors) -> CompiledKernel:
    """The launch of `compile_tile`'s kernel: relu(conv(x, weight) + residual), no BatchNorm."""
    t = tensors
    arrays = tuple(a for a in (t.x, t.weight, t.residual, t.out) if a is not None)
    addresses = (
        0 if a is None else ptx.address_of(a, publish=False)
        for a in (t.x, t.weight, t.residual, t.out)
    )
    launch = program.launch(*case(t.spec), *addresses)
    return CompiledKernel(
        name=nvcc.entry_name(program.ptx),
        arch=80,
        ptx=program.ptx,
        cubin=nvcc.assemble(program.ptx, 80),
        grid=launch.grid,
        block=(launch.threads, 1, 1),
        shared_bytes=launch.shared_bytes,
        args=(ptx.Struct(launch.params, arrays),),
    )
