# SPDX-License-Identifier: Apache-2.0
"""What the interpreting and the compiling processes run on a join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from resnet_fast.spec import ELEMENT_SIZE, JoinSpec, TileConfig
from softgpu import ptx
from tests.kernels import machine
from tests.support import join_cases
from tests.support.join_cases import JoinTensors, join_tensors
from tests.support.tolerance import assert_within

SECTOR = 32  # bytes
ARCH = 80  # only a compiled kernel is of an architecture


def check(tensors: JoinTensors, label: str) -> None:
    """All of `out`, and nothing beside it, is written, and within the tolerance rule."""
    assert_within(tensors.out, tensors.eager(), tensors.reference(), tensors.k_gemm, label)
    for guard in tensors.main.out_guard:
        assert guard.isnan().all(), f"{label}: wrote outside of out"


def launch(tensors: JoinTensors, tile: TileConfig) -> None:
    run = join_cases.kernel.build(tensors.spec, tile, tensors.operands(), arch=ARCH)
    run(*tensors.arguments())


def interpreted(spec: JoinSpec, tile: TileConfig, **options) -> None:
    """The kernel is within the tolerance rule, wrote all of `out` and nothing beside it."""
    tensors = join_tensors(spec, **options)
    launch(tensors, tile)
    check(tensors, f"{spec}, {tile}")


def interpreted_nan(spec: JoinSpec, tile: TileConfig) -> None:
    """A NaN in h and one in x reach exactly the outputs that torch's reach."""
    tensors = join_tensors(spec)
    tensors.main.x[0, 1, 2, 2] = float("nan")
    tensors.projection.x[-1, 3, 0, 0] = float("nan")
    launch(tensors, tile)
    reference = tensors.reference()
    assert 0 < reference.isnan().sum() < reference.numel()
    assert torch.equal(tensors.out.isnan(), reference.isnan()), f"{spec}: NaN was moved or lost"


@dataclass(frozen=True)
class Job:
    """One join on the PTX machine, and `options` of `join_tensors`."""

    spec: JoinSpec
    tile: TileConfig
    arch: int
    options: tuple[tuple[str, object], ...] = ()
    source: Callable = join_cases.join_kernels

    def __str__(self) -> str:
        return f"sm_{self.arch}: {self.spec} {self.spec.main.precision}, {self.tile}"


def machine_faults(job: Job) -> list[str]:
    """Results, conflicts and spills; and the distinct sectors, where the tiles are whole."""
    tensors = join_tensors(job.spec, **dict(job.options))
    (kernel,) = job.source(tensors, job.tile, job.arch)
    try:
        done = kernel.run()
        check(tensors, "")
    except (AssertionError, ptx.PtxError) as error:
        return [f"{job}: {error}"]
    counters, main = done.counters, job.spec.main
    faults = []
    vectors = all(part.c * ELEMENT_SIZE[part.dtype] % 16 == 0 for part in parts(job.spec))
    ieee = main.dtype == "float32" and main.precision == "ieee"
    if counters.bank_conflicts and vectors and not ieee:
        faults.append(f"{counters.bank_conflicts} bank conflicts")
    if counters.local_bytes:
        faults.append("spills")
    tile = job.tile
    whole = main.m % tile.BLOCK_M == 0 and main.k % tile.BLOCK_N == 0
    if whole and all(part.c % tile.BLOCK_K == 0 for part in parts(job.spec)):
        loads, stores = distinct_sectors(job.spec)
        found = counters.unique_sectors
        if (found["load"], found["store"]) != (loads, stores):
            faults.append(f"distinct sectors {dict(found)}, not {loads} loaded and {stores} stored")
    return [f"{job}: {fault}" for fault in faults]


def parts(spec: JoinSpec):
    return (spec.main, spec.projection)


def distinct_sectors(spec: JoinSpec) -> tuple[int, int]:
    """(loads, stores) of a kernel that has no shortcut in memory, nor a pixel that it skips."""
    main, projection = parts(spec)
    size = ELEMENT_SIZE[main.dtype]
    elements = main.m * main.c + main.k * main.k_gemm  # h and its filters
    elements += main.m * projection.c + main.k * projection.c  # the sampled pixels, theirs
    vectors = 4 * main.k * ((4 if main.norm else 2) + (4 if projection.norm else 2))
    return (elements * size + vectors) // SECTOR, main.m * main.k * size // SECTOR


def nan_faults(job: Job) -> list[str]:
    """A NaN in h and one in x reach exactly the outputs that torch's reach."""
    tensors = join_tensors(job.spec, **dict(job.options))
    tensors.main.x[0, 1, 2, 2] = float("nan")
    tensors.projection.x[-1, 3, 0, 0] = float("nan")
    (kernel,) = job.source(tensors, job.tile, job.arch)
    kernel.run()
    reference = tensors.reference()
    assert 0 < reference.isnan().sum() < reference.numel()
    same = torch.equal(tensors.out.isnan(), reference.isnan())
    return [] if same else [f"{job}: NaN was moved or lost"]


def norm_faults(job: Job) -> list[str]:
    """The operands tell every wrong norm, of either convolution, from the right one."""
    tensors = join_tensors(job.spec, **dict(job.options))

    def unseen(name: str) -> list[str]:
        def launch(wrong):
            (kernel,) = job.source(replace(tensors, **{name: wrong}), job.tile, job.arch)
            kernel.run()

        part = replace(getattr(tensors, name), out=tensors.out)
        return machine.unseen_norms(part, launch, lambda _: check(tensors, ""))

    faults = [f"{name}: {fault}" for name in ("main", "projection") for fault in unseen(name)]
    return [f"{job}: {fault}" for fault in faults]


def beyond_32_bits_faults(arch: int, source: Callable = join_cases.join_kernels) -> list[str]:
    """The last tiles where x, h and y pass 2^31 elements; the other images take no memory."""
    images, n = 2, 2**19 + 2
    spec = join_cases.join(n, 8, 8, 64, 32, 64, stride=(2, 2))
    near = join_tensors(join_cases.join(images, 8, 8, 64, 32, 64, stride=(2, 2)))

    main = replace(
        near.main, spec=spec.main, x=machine.far(near.main.x, n), out=machine.far(near.main.out, n)
    )
    projection = replace(near.projection, spec=spec.projection, x=machine.far(near.projection.x, n))
    (kernel,) = source(JoinTensors(spec, main, projection), TileConfig(64, 64, 64, 3, 4), arch)
    kernel.run([(i, 0, 0) for i in range(kernel.grid[0] - images, kernel.grid[0])])
    near.out.copy_(main.out[-images:])
    check(near, f"sm_{arch} beyond 32 bits")
    return []


def compiled_faults(job: tuple[JoinSpec, TileConfig, int]) -> list[str]:
    """What is wrong with the machine code of one tile; runs in a worker process."""
    from resnet_fast import _hardware
    from tests.kernels.test_compiled import divides
    from tests.support import sass

    spec, tile, arch = job
    tensors = join_tensors(spec)
    (kernel,) = join_cases.join_kernels(tensors, tile, arch)
    used, loops = kernel.resources(), sass.tensor_loops(kernel.sass())
    ieee = spec.main.precision == "ieee" and spec.main.dtype == "float32"
    faults = {
        f"spills {used.spill_bytes} bytes": machine.spills(kernel),
        "does not fit an SM": used.blocks_per_sm(_hardware.GPUS[arch]) < 1,
        f"{len(loops)} tensor loops, not one for each product": not ieee and len(loops) != 2,
        "divides in a main loop": any(divides(loop.opcodes) for loop in loops),
    }
    return [f"sm_{arch}: {spec}, {tile}: {fault}" for fault, present in faults.items() if present]
