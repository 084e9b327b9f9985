# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels as `CompiledKernel`s: what the extension would launch on CPU tensors.

`conv_kernels` and `join_kernels` have the signatures of Triton's, so one test serves both. A
problem is passed as the struct that the extension's launcher fills; the kernel may only touch the
tensors whose addresses it contains.
"""

from __future__ import annotations

import ctypes

import torch

from resnet_fast import ops
from resnet_fast.dispatch import tiles
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig
from softgpu import ptx
from tests.support import nvcc
from tests.support.cases import ConvTensors
from tests.support.compiled import WARP, CompiledKernel
from tests.support.join_cases import JoinTensors

ADD_RELU, ADD_RELU_THREADS = "cuda/device/add_relu.cuh", 256
CONV, JOIN = "cuda/device/conv_implicit_gemm.cuh", f"cuda/device/{ops.CONV_BN_JOIN.name}.cuh"
WARPS_M = 2  # of every tile: two rows of warps
TILES = tiles.CUDA_TILES[ConvSpec]
REDUCE_THREADS, REDUCE_CHANNELS = 256, 4  # of a block of reduce_splits, and of each thread


def conv_kernels(tensors: ConvTensors, tile: TileConfig, arch: int) -> list[CompiledKernel]:
    """What `conv_bn_act` launches on `tensors`, in order: one kernel, or two with SPLIT_K > 1."""
    spec, element = tensors.spec, nvcc.CPP_TYPE[tensors.spec.dtype]
    problem = conv_problem(tensors, tile)
    tiles = -(-spec.m // tile.BLOCK_M) * -(-spec.k // tile.BLOCK_N)
    pointwise = str(spec.is_pointwise).lower()
    conv = compile_kernel(
        f"conv_bn_act<{element}, {cpp_tile(tile, spec.dtype)}, {pointwise}>(ConvProblem)",
        *(arch, (tiles, tile.SPLIT_K, 1), WARP * tile.NUM_WARPS),
        *(shared_bytes(tile, spec.dtype), problem),
    )
    if tile.SPLIT_K == 1:
        return [conv]
    blocks = -(-spec.m * spec.k // (REDUCE_THREADS * REDUCE_CHANNELS))
    reduction = compile_kernel(
        f"reduce_splits<{element}>(ConvProblem)",
        *(arch, (blocks, 1, 1), REDUCE_THREADS, 0, problem),
    )
    return [conv, reduction]


def join_kernels(tensors: JoinTensors, tile: TileConfig, arch: int) -> list[CompiledKernel]:
    """What a join launches on `tensors`: one kernel."""
    spec = tensors.spec.main
    main, projection = (conv_problem(t, tile) for t in (tensors.main, tensors.projection))
    structs = (nvcc.ConvProblem.from_buffer_copy(part.data) for part in (main, projection))
    problem = ptx.Struct(bytes(nvcc.JoinProblem(*structs)), main.arrays + projection.arrays)
    pointwise = str(spec.is_pointwise).lower()
    tiles = -(-spec.m // tile.BLOCK_M) * -(-spec.k // tile.BLOCK_N)
    instance = f"{nvcc.CPP_TYPE[spec.dtype]}, {cpp_tile(tile, spec.dtype)}, {pointwise}"
    return [
        compile_kernel(
            f"{ops.CONV_BN_JOIN.name}<{instance}>(JoinProblem)",
            *(arch, (tiles, 1, 1), WARP * tile.NUM_WARPS),
            *(shared_bytes(tile, spec.dtype), problem, JOIN),
        )
    ]


class ElementwiseProblem(ctypes.Structure):
    """Mirror of struct ElementwiseProblem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "out")),
        ("numel", ctypes.c_int64),
    )


def add_relu_kernels(
    x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, arch: int, formula: str = "AddRelu"
) -> list[CompiledKernel]:
    """What `add_relu`, or with "ReluGradient" its gradient, launches on these tensors."""
    aligned = len({tensor.data_ptr() % 16 for tensor in (x, y, out)}) == 1
    element = nvcc.CPP_TYPE[str(x.dtype).removeprefix("torch.")]
    instance = f"elementwise<{formula}, {element}, {str(aligned).lower()}>(ElementwiseProblem)"
    text, cubin = nvcc.compile_unit(nvcc.unit(ADD_RELU, instance, ElementwiseProblem), arch)
    per_block = ADD_RELU_THREADS * (2 * 16 // x.itemsize if aligned else 8)
    problem = ElementwiseProblem(*map(ptx.address_of, (x, y, out)), x.numel())
    grid, block = (-(-x.numel() // per_block), 1, 1), (ADD_RELU_THREADS, 1, 1)
    name = nvcc.entry_name(text)
    return [CompiledKernel(name, arch, text, cubin, grid, block, 0, (bytes(problem),))]


def cpp_tile(tile: TileConfig, dtype: str) -> str:
    """The tile in C++, where BLOCK_K counts 16-bit elements."""
    block_k = tile.BLOCK_K * ELEMENT_SIZE[dtype] // 2
    warps = f"{WARPS_M}, {tile.NUM_WARPS // WARPS_M}"
    return f"Tile<{tile.BLOCK_M}, {tile.BLOCK_N}, {block_k}, {tile.NUM_STAGES}, {warps}>"


def shared_bytes(tile: TileConfig, dtype: str) -> int:
    """Tile::kSharedBytes: the stages, whose space the epilogue uses again, and three numbers a
    column."""
    step = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * ELEMENT_SIZE[dtype]
    return tile.NUM_STAGES * step + 3 * 4 * tile.BLOCK_N


def compile_kernel(
    instance: str,
    arch: int,
    grid: tuple,
    threads: int,
    shared: int,
    problem: ptx.Struct,
    header: str = CONV,
) -> CompiledKernel:
    mirrors = (nvcc.ConvProblem,) if header == CONV else (nvcc.ConvProblem, nvcc.JoinProblem)
    text, cubin = nvcc.compile_unit(nvcc.unit(header, instance, *mirrors), arch)
    name = nvcc.entry_name(text)
    return CompiledKernel(name, arch, text, cubin, grid, (threads, 1, 1), shared, (problem,))


def conv_problem(tensors: ConvTensors, tile: TileConfig) -> ptx.Struct:
    """The struct that the launcher fills; its last array is the workspace where there is one."""
    t, spec = tensors, tensors.spec
    steps = -(-spec.k_gemm // tile.BLOCK_K)
    workspace = None
    if tile.SPLIT_K > 1:
        shares = ptx.sparse_array((tile.SPLIT_K, spec.m, spec.k), "float32")
        workspace = torch.from_numpy(shares)
    operands = (t.x, t.weight, t.residual, t.out, workspace)
    vectors = (t.scale, t.shift, t.mean, t.var)
    stride_n, _, stride_h, stride_w = t.x.stride()
    problem = nvcc.ConvProblem(
        *map(address, operands),
        norm=nvcc.Norm(*map(channel_vector, vectors), t.eps),
        stride_n=stride_n,
        stride_h=stride_h,
        stride_w=stride_w,
        **{name: getattr(spec, name) for name in ("h", "w", "c", "k", "r", "s", "m")},
        pixels=nvcc.Divisor.of(spec.p * spec.q),
        q=nvcc.Divisor.of(spec.q),
        c_of=nvcc.Divisor.of(spec.c),
        s_of=nvcc.Divisor.of(spec.s),
        walk=walk_of(spec, tile.BLOCK_K, stride_h, stride_w),
        tiles_n=nvcc.Divisor.of(-(-spec.k // tile.BLOCK_N)),
        **axes("conv_stride", spec.stride),
        **axes("padding", spec.padding),
        **axes("dilation", spec.dilation),
        split_k=tile.SPLIT_K,
        steps_per_split=-(-steps // tile.SPLIT_K),
        relu=spec.activation == "relu",
    )
    arrays = tuple(a for a in (*vectors, *operands) if a is not None)
    return ptx.Struct(bytes(problem), arrays)


def walk_of(spec: ConvSpec, products: int, stride_h: int, stride_w: int) -> nvcc.Walk:
    """The steps of `products` as digits, as conv_problem.h's walk_of has them."""
    taps, c = divmod(products, spec.c)
    r, s = divmod(taps, spec.s)
    across, down = spec.dilation[1] * stride_w, spec.dilation[0] * stride_h
    offset = c + s * across + r * down
    return nvcc.Walk(c, s, r, offset, across - spec.c, down - spec.s * across)


def axes(name: str, values: tuple[int, int]) -> dict[str, int]:
    return {f"{name}_h": values[0], f"{name}_w": values[1]}


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else ptx.address_of(tensor, publish=False)


def channel_vector(vector: torch.Tensor | None) -> nvcc.ChannelVector:
    dtype = 0 if vector is None else nvcc.DTYPES[str(vector.dtype).removeprefix("torch.")]
    return nvcc.ChannelVector(address(vector), dtype)
