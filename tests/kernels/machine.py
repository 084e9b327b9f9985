# SPDX-License-Identifier: Apache-2.0
"""What the compiling processes run on the PTX machine; each returns what is wrong, as lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from resnet_fast.dispatch import gemm
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig
from softgpu import ptx
from tests.support import compiled, cuda_kernels, sectors
from tests.support.cases import ConvTensors, conv_tensors
from tests.support.tolerance import assert_within

SECTOR = sectors.SECTOR

# Shared-memory wavefronts beyond the minimum, over the minimum: at most so many, measured.
# Tensor-core operands have none. Scalar FMAs read one k of several rows at once: rows of a step lie
# 64 bytes apart, so that every second one begins at the same bank, and Triton swizzles its layout
# for tensor cores, not for that.
IEEE_CONFLICTS = {80: 3.3, 90: 6.5}
# Channels that are no whole 16 bytes are gathered one by one and stored to shared memory from
# registers, in the layout of rows of 16 bytes: some lanes meet in a bank.
GATHERED_CONFLICTS = 0.6


@dataclass(frozen=True)
class Job:
    """One convolution, its tile and architecture, and `options` of `conv_tensors`.

    Args:
        source: makes the kernels: of Triton, or `cuda_kernels.conv_kernels`.
    """

    spec: ConvSpec
    tile: TileConfig
    arch: int
    options: tuple[tuple[str, object], ...] = ()
    source: Callable[..., list[compiled.CompiledKernel]] = compiled.conv_kernels

    def __str__(self) -> str:
        norm = " norm" if self.spec.norm else ""
        options = "".join(f", {name} {value}" for name, value in self.options)
        return f"sm_{self.arch}: {self.spec} {self.spec.precision}{norm}, {self.tile}{options}"


def run(tensors: ConvTensors, job: Job):
    """Run the op on `tensors`, the workspace poisoned: the kernels and their runs, in order."""
    kernels = job.source(tensors, job.tile, job.arch)
    if job.tile.SPLIT_K > 1:
        args = kernels[0].args
        shares = args[0].arrays[-1] if isinstance(args[0], ptx.Struct) else args[2]
        shares.fill_(float("nan"))
    return kernels, [kernel.run() for kernel in kernels]


def check(tensors: ConvTensors) -> None:
    """All of `out`, and nothing beside it, is written, and within the tolerance rule."""
    assert_within(tensors.out, tensors.eager(), tensors.reference(), tensors.spec.k_gemm)
    for guard in tensors.out_guard:
        assert guard.isnan().all(), "wrote outside of out"


def conv_faults(job: Job) -> list[str]:
    """Results, conflicts and spills; and sectors, where the tiles are whole."""
    tensors = conv_tensors(job.spec, **dict(job.options))
    try:
        kernels, runs = run(tensors, job)
        check(tensors)
    except (AssertionError, ptx.PtxError) as error:
        return [f"{job}: {error}"]
    faults = []
    for kernel, done in zip(kernels, runs, strict=True):
        conflicts = done.counters.bank_conflicts
        minimum = sum(done.counters.shared_wavefronts_minimum.values())
        if conflicts > allowed_conflicts(job) * minimum:
            faults.append(f"{kernel.name}: {conflicts} bank conflicts beyond {minimum}")
        if spills(kernel) or done.counters.local_bytes:
            faults.append(f"{kernel.name}: spills")
    if is_whole(job.spec, job.tile) and has_plain_operands(tensors):
        faults += traffic_faults(job, kernels, runs)
    return [f"{job}: {fault}" for fault in faults]


def spills(kernel: compiled.CompiledKernel) -> bool:
    """Whether local memory is touched: LLVM may keep a stack frame that nothing uses."""
    frame = kernel.resources().spill_bytes
    return frame > 0 and any(code.startswith(("STL", "LDL")) for code in kernel.opcodes())


def allowed_conflicts(job: Job) -> float:
    if gemm.is_ieee(job.spec):
        return IEEE_CONFLICTS[job.arch]
    gathered = job.spec.c * ELEMENT_SIZE[job.spec.dtype] % 16 != 0
    return GATHERED_CONFLICTS if gathered else 0


def is_whole(spec: ConvSpec, tile: TileConfig) -> bool:
    """Whether every tile and step is full; one that is cut reads what it does not use."""
    return spec.m % tile.BLOCK_M == 0 and spec.k % tile.BLOCK_N == 0 and spec.c % tile.BLOCK_K == 0


def has_plain_operands(tensors: ConvTensors) -> bool:
    """Whether rows of x lie next to each other, in whole sectors, and the parameters are fp32."""
    dense = tensors.x.is_contiguous(memory_format=torch.channels_last)
    return dense and tensors.scale.dtype == torch.float32


def traffic_faults(job: Job, kernels, runs) -> list[str]:
    """Sectors beyond what suffices: 1.05 times for Triton, 1.02 for us, who place every access."""
    ours = job.source is cuda_kernels.conv_kernels
    readers = 1 if ours else job.tile.NUM_WARPS  # of each vector along channels, in a tile
    minima = [sectors.of_gemm(job.spec, job.tile, readers)]
    for reduction in kernels[1:]:
        # A Triton block reads the vectors of its columns once; a warp of ours, those of 128 sums,
        # which lie in one or two rows, or in several where these are shorter.
        times = job.spec.m * min(job.spec.k, 128) // 128 if ours else reduction.grid[0]
        minima.append(sectors.of_reduction(job.spec, job.tile, times))
    faults = []
    for kernel, done, minimum in zip(kernels, runs, minima, strict=True):
        counters = done.counters
        found = {
            "loads": (counters.global_sectors["load"], minimum.loads),
            "stores": (counters.global_sectors["store"], minimum.stores),
            "distinct loads": (counters.unique_sectors["load"], minimum.unique_loads),
            "distinct stores": (counters.unique_sectors["store"], minimum.stores),
        }
        faults += [
            f"{kernel.name}: {name}: {got} sectors, {enough} suffice"
            for name, (got, enough) in found.items()
            if got > (1.02 if ours else 1.05) * enough
            or (ours and name.startswith("distinct") and got != enough)
        ]
    return faults


def nan_faults(job: Job) -> list[str]:
    """A NaN in x reaches exactly the outputs that torch's reach, through the ReLU."""
    tensors = conv_tensors(job.spec)
    tensors.x[0, 1, 2, 2] = float("nan")
    run(tensors, job)
    reference = tensors.reference()
    assert 0 < reference.isnan().sum() < reference.numel()
    same = torch.equal(tensors.out.isnan(), reference.isnan())
    return [] if same else [f"{job}: NaN was moved or lost"]


def in_place_faults(job: Job) -> list[str]:
    """`out` may be the residual itself."""
    tensors = conv_tensors(job.spec)
    kept = tensors.residual
    tensors.residual = tensors.out.copy_(kept)
    run(tensors, job)
    tensors.residual = kept
    check(tensors)
    return []


# Another norm than the one that the result is checked for, by what is wrong with it.
WRONG_NORMS = {
    "eps is left out": lambda t: {"eps": 0.0},
    "eps is another": lambda t: {"eps": 2 * t.eps},
    "the scale's sign is lost": lambda t: {"scale": t.scale.abs()},
    "shift is left out": lambda t: {"shift": 0 * t.shift},
    "mean is left out": lambda t: {"mean": 0 * t.mean},
}


def unseen_norms(tensors, launch: Callable, check: Callable) -> list[str]:
    """What `check`, which raises AssertionError, does not see though the norm of `launch` is wrong.

    Args:
        launch: runs the kernels on a copy of `tensors` whose norm is wrong; `out` is the same.
        check: judges `tensors`.
    """
    unseen = []
    for fault, wrong in WRONG_NORMS.items():
        tensors.out.fill_(float("nan"))
        launch(replace(tensors, **wrong(tensors)))
        assert not tensors.out.isnan().all()
        try:
            check(tensors)
        except AssertionError:
            continue
        unseen.append(f"{fault}, and nobody sees it")
    return unseen


def norm_faults(job: Job) -> list[str]:
    """The operands tell every wrong norm from the right one."""
    faults = unseen_norms(conv_tensors(job.spec), lambda wrong: run(wrong, job), check)
    return [f"{job}: {fault}" for fault in faults]


def far_images(job: Job, images: int) -> ConvTensors:
    """Operands of which only the last `images` images are there; the others take no memory."""
    spec = job.spec
    near = conv_tensors(replace(spec, n=images))

    def far(tensor):
        _, channels, height, width = tensor.shape
        whole = ptx.sparse_array((spec.n, height, width, channels), "float16")
        whole = torch.from_numpy(whole).permute(0, 3, 1, 2)
        whole[-images:] = tensor
        return whole

    x, residual, out = map(far, (near.x, near.residual, near.out))
    return replace(near, spec=spec, x=x, residual=residual, out=out)


def beyond_32_bits_faults(job: Job) -> list[str]:
    """The last tiles of tensors beyond 2^31 elements: the right values, in the right place."""
    images, spec, tile = 2, job.spec, job.tile
    tensors = far_images(job, images)
    kernels = job.source(tensors, tile, job.arch)
    rows = images * spec.p * spec.q
    done = []
    for kernel in kernels:
        block_rows = spec.m // kernel.grid[0]
        first = (spec.m - rows) // block_rows
        blocks = [(i, j, 0) for i in range(first, kernel.grid[0]) for j in range(kernel.grid[1])]
        done.append(kernel.run(blocks))
    near = replace(
        tensors,
        spec=replace(spec, n=images),
        **{name: getattr(tensors, name)[-images:] for name in ("x", "residual", "out")},
    )
    assert_within(near.out, near.eager(), near.reference(), spec.k_gemm, str(job))
    written = done[-1].counters.unique_sectors["store"]
    expected = near.out.numel() * 2 // SECTOR
    return [] if written == expected else [f"{job}: wrote {written} sectors, not {expected}"]


def far_apart_faults(job: Job) -> list[str]:
    """The last image of x lies 2^31 elements behind the first, every stride within 32 bits."""
    tensors = conv_tensors(job.spec)
    near, stride_n = tensors.x, 2**31 // (job.spec.n - 1) + 64
    memory = torch.from_numpy(ptx.sparse_array(((job.spec.n - 1) * stride_n + near.numel(),), "f2"))
    tensors.x = memory.as_strided(near.shape, (stride_n, *near.stride()[1:]))
    tensors.x.copy_(near)
    run(tensors, job)
    tensors.x = near
    check(tensors)
    return []


def add_relu_faults(arch: int, dtype: torch.dtype, numel: int, start: int) -> list[str]:
    """relu(x + y) as eager's, bit for bit, NaN included; whole sectors, each once."""
    count = numel + start
    generator = torch.Generator().manual_seed(0)
    x, y, out = (torch.full((count + 64,), float("nan"), dtype=dtype) for _ in range(3))
    for tensor in (x, y):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    x[start + numel // 2] = float("nan")
    x, y, inner = (tensor[start:count] for tensor in (x, y, out))
    (kernel,) = compiled.add_relu_kernels(x, y, inner, arch)
    counters = kernel.run().counters
    torch.testing.assert_close(inner, torch.relu(x + y), rtol=0, atol=0, equal_nan=True)
    assert out[:start].isnan().all() and out[count:].isnan().all(), "wrote outside of out"
    size = numel * dtype.itemsize
    sectors = -(-size // SECTOR)
    faults = []
    for kind, tensors in (("load", 2), ("store", 1)):
        if counters.global_bytes[kind] != tensors * size:
            faults.append(f"{kind} of {counters.global_bytes[kind]} bytes, not {tensors * size}")
        if start == 0 and counters.global_sectors[kind] > 1.05 * tensors * sectors:
            got = counters.global_sectors[kind]
            faults.append(f"{kind} of {got} sectors, {tensors * sectors} suffice")
    return [f"sm_{arch}, {dtype}: {fault}" for fault in faults]


def add_relu_beyond_32_bits_faults(arch: int) -> list[str]:
    """The last blocks of 2^31 elements and some."""
    count, tail = 2**31 + 3 * 2**12 + 40, 2**13
    tensors = [torch.from_numpy(ptx.sparse_array((count,), "float16")) for _ in range(3)]
    x, y, out = tensors
    for seed, tensor in enumerate((x, y)):
        tensor[-tail:] = torch.randn(tail, generator=torch.Generator().manual_seed(seed))
    (kernel,) = compiled.add_relu_kernels(x, y, out, arch)
    block = 128 * 16  # elements: 32 bytes for each thread
    kernel.run(range(kernel.grid[0] - tail // block, kernel.grid[0]))
    written = count - (kernel.grid[0] - tail // block) * block
    expected = torch.relu(x[-written:] + y[-written:])
    torch.testing.assert_close(out[-written:], expected, rtol=0, atol=0)
    return [f"sm_{arch}: wrote before its blocks"] if out[-tail:-written].any() else []
