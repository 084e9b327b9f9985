# SPDX-License-Identifier: Apache-2.0
"""Count what the CUDA convolution does, layer by layer, with NVIDIA's CUTLASS beside it.

    python -m benchmarks.counts                       ResNet-50's convolutions, some at all tiles
    python -m benchmarks.counts --layers layer2 --all
    python -m benchmarks.counts --bytes               what the networks move per image

Nothing is timed and no GPU is needed. Registers, spills, blocks per SM and instructions are read
from machine code that nvcc makes in this run; wavefronts, sectors and bytes are counted by running
the compiled PTX, every block of it, on the PTX machine. A row stands for a kernel whose result has
just been checked against float64.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from resnet_fast import _hardware
from resnet_fast._table import Column, Table
from resnet_fast.dispatch import heuristics, tiles
from resnet_fast.measuring import machine
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, JoinSpec, TileConfig
from tests.support import (
    cases,
    cuda_kernels,
    cutlass,
    cutlass_kernels,
    join_cases,
    nvcc,
    sectors,
    stem,
)
from tests.support.tolerance import assert_within

OURS, CUTLASS = "resnet_fast", "CUTLASS"
FULL_BATCH = 32
SWEPT = ("layer1-first-conv2-3x3/1", "layer2-first-downsample-1x1/2", "layer3-next-conv1-1x1/1")
HOW = {
    "compiled": "registers, spills, blocks per SM and SASS per HMMA (in the main loop) are read "
    "from machine code that nvcc made",
    "counted": "wavefronts of shared memory, sectors and DRAM bytes are counted by the PTX "
    "machine, the whole grid; DRAM bytes are the distinct sectors: what a perfect cache would move",
    "minima": "one wavefront for each group of lanes that is served at once; for sectors, that "
    "each tile reads its pixels, filters, residual and BatchNorm vectors once; for DRAM bytes, "
    "that each tensor is moved once, without the pixels that a stride steps over",
    "tiles": "those that the chooser takes for a batch of 32, without a split; some layers have "
    "every tile",
    "CUTLASS": "conv2d fprop, kOptimized, with residual and ReLU; it has no BatchNorm",
}


@dataclass(frozen=True, slots=True)
class Counted:
    """One kernel on one layer; each ratio is to the least that suffices."""

    layer: str
    shape: str
    tile: str
    kernel: str
    registers: int
    spill_bytes: int
    blocks_per_sm: int
    sass_per_hmma: float
    wavefronts: float
    sectors: float
    dram_bytes: int
    dram: float


@dataclass(frozen=True, slots=True)
class Job:
    layer: str
    spec: ConvSpec
    tile: TileConfig
    arch: int
    cutlass: cutlass.Program | None = None  # CUTLASS's kernel instead of ours


def count(job: Job) -> Counted:
    """Compile, run, check and count one kernel; in a worker process."""
    spec = job.spec
    if job.cutlass:
        spec = replace(spec, activation="relu", norm=False)
    tensors = cases.conv_tensors(spec)
    if job.cutlass:
        tensors.scale.fill_(1)
        tensors.shift.zero_()
        kernel = cutlass_kernels.conv_kernel(job.cutlass, tensors)
    else:
        (kernel,) = cuda_kernels.conv_kernels(tensors, job.tile, job.arch)
    counters = kernel.run().counters
    label = f"{job.layer}, {job.tile}"
    assert_within(tensors.out, tensors.eager(), tensors.reference(), spec.k_gemm, label)
    used, minimum = kernel.resources(), sectors.of_gemm(spec, job.tile, 0 if job.cutlass else 1)
    requested = sum(counters.global_sectors.values())
    distinct = sum(counters.unique_sectors.values())
    return Counted(
        layer=job.layer,
        shape=str(job.spec),
        tile=f"{job.tile.BLOCK_M}x{job.tile.BLOCK_N}x{job.tile.BLOCK_K} s{job.tile.NUM_STAGES}",
        kernel=CUTLASS if job.cutlass else OURS,
        registers=used.registers,
        spill_bytes=used.spill_bytes,
        blocks_per_sm=used.blocks_per_sm(_hardware.GPUS[job.arch]),
        sass_per_hmma=kernel.main_loop().per_mma,
        wavefronts=sum(counters.shared_wavefronts.values())
        / sum(counters.shared_wavefronts_minimum.values()),
        sectors=requested / (minimum.loads + minimum.stores),
        dram_bytes=distinct * sectors.SECTOR,
        dram=distinct / (minimum.unique_loads + minimum.stores),
    )


def chosen(spec: ConvSpec, arch: int) -> TileConfig:
    """What the chooser takes at a batch that fills the GPU, without a split."""
    full = replace(spec, n=max(spec.n, FULL_BATCH))
    return replace(heuristics.choose(full, arch, tiles.CUDA[ConvSpec]), SPLIT_K=1)


def jobs_of(options, programs: dict[TileConfig, cutlass.Program]) -> Iterator[Job]:
    """By layer, by tile, ours before CUTLASS's."""
    for name, spec in layers(options, options.depth).items():
        swept = options.all or (name in SWEPT and not options.bytes)
        table = tiles.cuda_tiles(ConvSpec, spec.dtype)
        for tile in table if swept else [chosen(spec, options.arch)]:
            yield Job(name, spec, tile, options.arch)
            if tile in programs:
                yield Job(name, spec, tile, options.arch, programs[tile])


def layers(options, depth: int) -> dict[str, ConvSpec]:
    convs = cases.resnet_convs(depth, options.batch, options.size, dtype=options.dtype)
    return {
        name: spec
        for name, spec in convs.items()
        if spec.c % 8 == 0 and any(part in name for part in options.layers)
    }


def compile_cutlass(options, folder: Path) -> dict[TileConfig, cutlass.Program]:
    """CUTLASS at each of our tiles that it has; nothing where it is not comparable or not there."""
    reason = cutlass.missing() if options.cutlass and not options.bytes else "not asked for"
    if options.arch != 80 or options.dtype != "float16":
        reason = "compared for sm_80 and float16 only"
    if reason:
        say(f"CUTLASS: {reason}")
        return {}

    def compiled(tile: TileConfig) -> cutlass.Program | None:
        place = folder / f"cutlass{cuda_kernels.TILES.index(tile)}"
        place.mkdir()
        try:
            return cutlass_kernels.compile_tile(tile, place)
        except RuntimeError:
            say(f"CUTLASS has no {tile}")
            return None

    say(f"compiling CUTLASS at {len(cuda_kernels.TILES)} tiles")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = zip(cuda_kernels.TILES, pool.map(compiled, cuda_kernels.TILES), strict=True)
        return {tile: program for tile, program in found if program}


def work_in(folder: str) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    nvcc.cache_folder = Path(folder)


def rows_of(jobs: list[Job], folder: Path) -> list[Counted]:
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), spawn, work_in, (str(folder),)) as pool:
        for job, row in zip(jobs, pool.map(count, jobs), strict=True):
            rows.append(row)
            say(f"[{len(rows)}/{len(jobs)}] {job.layer} {row.tile} {row.kernel}")
    return rows


def count_join(arguments: tuple[JoinSpec, int]) -> int:
    """Distinct bytes of a join; in a worker process."""
    spec, arch = arguments
    full = JoinSpec(*(replace(part, n=FULL_BATCH) for part in (spec.main, spec.projection)))
    tile = heuristics.choose(full, arch, tiles.CUDA[JoinSpec])
    tensors = join_cases.join_tensors(spec)
    (kernel,) = cuda_kernels.join_kernels(tensors, tile, arch)
    counters = kernel.run().counters
    assert_within(tensors.out, tensors.eager(), tensors.reference(), tensors.k_gemm, str(spec))
    return sum(counters.unique_sectors.values()) * sectors.SECTOR


def count_stem(arguments: tuple[ConvSpec, int]) -> int:
    """Distinct bytes of a stem; in a worker process."""
    spec, arch = arguments
    tensors = stem.stem_tensors(spec.n, spec.h, spec.w, spec.k, getattr(torch, spec.dtype))
    kernel = stem.stem_kernel(tensors, stem.TILES[0], arch)
    counters = kernel.run().counters
    label = f"the stem of {spec}"
    assert_within(tensors.out, tensors.eager(), tensors.reference(), spec.k_gemm, label)
    return sum(counters.unique_sectors.values()) * sectors.SECTOR


def fused_bytes(options, depth: int, folder: Path) -> dict[str, int]:
    """Distinct bytes of each stage's join, and of the stem, counted."""
    joins = join_cases.resnet_joins(depth, options.batch, options.size, dtype=options.dtype)
    _, first, _ = cases.resnet_layers(depth, options.batch, options.size, dtype=options.dtype)[0]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, work_in, (str(folder),)) as pool:
        counted = pool.map(count_join, [(spec, options.arch) for spec in joins.values()])
        stem_counted = pool.submit(count_stem, (first, options.arch))
        found = dict(zip(joins, counted, strict=True))
        found["stem"] = stem_counted.result()
    say(f"ResNet-{depth}: joins and stem counted")
    return found


def bytes_per_image(
    options, depth: int, rows: Iterable[Counted], fused: dict[str, int]
) -> dict[str, float]:
    """MB that a network moves per image beside its weights; whole tensors, once per kernel.

    Args:
        rows: of every convolution but the stem.
        fused: from `fused_bytes`.
    """
    size = ELEMENT_SIZE[options.dtype]
    names = {spec: name for name, spec in layers(options, depth).items()}
    counted = {row.layer: row.dram_bytes for row in rows}
    listed = cases.resnet_layers(depth, options.batch, options.size, dtype=options.dtype)
    stem_spec, last = listed[0][1], listed[-1][1]

    def moved(spec: ConvSpec) -> int:
        return counted[names[spec]] - parameters(spec)

    convs = sum(repeats * moved(spec) for _, spec, repeats in listed[1:])
    joins = join_cases.resnet_joins(depth, options.batch, options.size, dtype=options.dtype)
    apart = sum(
        moved(replace(spec.main, residual=True)) + moved(spec.projection) for spec in joins.values()
    )
    joined = sum(
        fused[name] - parameters(spec.main) - parameters(spec.projection)
        for name, spec in joins.items()
    )
    stem_moved = fused["stem"] - parameters(stem_spec)
    tail = last.m * last.k * size  # what average pooling reads
    image = stem_spec.n * stem_spec.h * stem_spec.w * 3
    mapped = stem_spec.m * stem_spec.k
    two_kernels = (image + 2 * mapped + (stem_moved // size - image)) * size
    apart_moved = convs + two_kernels + tail
    fused_moved = convs - apart + joined + stem_moved + tail
    found = {
        "convolutions, counted": convs,
        "with stem, max-pool and average pool as kernels of their own, these modelled": apart_moved,
        "with fused stem and joins, counted, and the average pool's input": fused_moved,
    }
    return {name: value / options.batch / 1e6 for name, value in found.items()}


def parameters(spec: ConvSpec) -> int:
    """Bytes of a convolution's weight and BatchNorm."""
    weight = spec.k * spec.k_gemm * ELEMENT_SIZE[spec.dtype]
    return weight + sectors.vectors(spec) * sectors.SECTOR


HEADINGS = {
    "layer": "layer",
    "tile": "tile",
    "kernel": "kernel",
    "registers": "registers",
    "spill_bytes": "spills (B)",
    "blocks_per_sm": "blocks/SM",
    "sass_per_hmma": "SASS/HMMA",
    "wavefronts": "wavefronts/ideal",
    "sectors": "sectors/min",
    "dram_bytes": "DRAM (B)",
    "dram": "DRAM/tensors",
}


def cells(row: Counted) -> list[str]:
    values = asdict(row)
    decimals = {"sass_per_hmma": 2, "wavefronts": 3, "sectors": 3, "dram": 4}
    return [
        f"{values[name]:.{decimals[name]}f}" if name in decimals else str(values[name])
        for name in HEADINGS
    ]


def show(rows: list[Counted]) -> None:
    """The table, one line a row."""
    table = Table("", [Column(name, right=i > 2) for i, name in enumerate(HEADINGS.values())])
    for row in rows:
        table.add(*cells(row))
    print(table)


def markdown(result: dict, layers: tuple[str, ...] = ("",)) -> str:
    """The README's table of a result that `--json` wrote; ours and CUTLASS's share a line.

    Args:
        layers: parts of the names of the layers that are shown.
    """
    if "rows" not in result:
        lines = ["| network | MB per image | |", "|---|---|---|"]
        for network, moved in result["moved"].items():
            lines += [f"| {network} | {value:.1f} | {what} |" for what, value in moved.items()]
    else:
        shown = [n for n in HEADINGS if n not in ("layer", "tile", "kernel", "dram_bytes")]
        both: dict[tuple[str, str], dict[str, list[str]]] = {}
        rows = [row for row in result["rows"] if any(part in row["layer"] for part in layers)]
        for row in (Counted(**fields) for fields in rows):
            kernels = both.setdefault((row.layer, row.tile), {})
            kernels[row.kernel] = dict(zip(HEADINGS, cells(row), strict=True))
        heads = ["layer", "tile", *(HEADINGS[name] for name in shown)]
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for place, kernels in both.items():
            values = (" / ".join(found[name] for found in kernels.values()) for name in shown)
            lines.append("| " + " | ".join((*place, *values)) + " |")
    made = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    note = result["title"] + "; ours / CUTLASS" * ("rows" in result)
    return "\n".join(lines) + f"\n\n{note}. {made}, commit {result['commit']}."


def versions() -> dict[str, str]:
    release = nvcc.run("nvcc", "--version").rpartition("release ")[2].partition(",")[0]
    found = {"python": platform.python_version(), "nvcc": release}
    if not cutlass.missing():
        found["CUTLASS"] = machine.version_of("nvidia-cutlass")
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=80, choices=(80, 90), help="compute capability")
    parser.add_argument("--dtype", default="float16", choices=nvcc.DTYPES)
    parser.add_argument("--depth", type=int, default=50, choices=cases.BLOCKS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--layers", nargs="+", default=[""], help="parts of names of layers")
    parser.add_argument("--all", action="store_true", help="every tile on every layer")
    parser.add_argument("--no-cutlass", dest="cutlass", action="store_false")
    parser.add_argument("--bytes", action="store_true", help="bytes per image of ResNet-18 and -50")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if reason := nvcc.missing():
        say(f"nothing can be counted: {reason}")
        return 1
    commit = machine.commit()  # before a long run, during which it may move
    where = f"batch {options.batch} at {options.size}x{options.size}"
    title = f"ResNet-{options.depth}, {where}, {options.dtype}, sm_{options.arch}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.bytes:
            options.layers = [""]
            moved = {}
            for depth in (18, 50):
                options.depth = depth
                found = rows_of(list(jobs_of(options, {})), folder)
                fused = fused_bytes(options, depth, folder)
                moved[f"ResNet-{depth}"] = bytes_per_image(options, depth, found, fused)
            result = {"title": title.partition(", ")[2], "moved": moved}
            for network, values in moved.items():
                for what, value in values.items():
                    print(f"{network}: {value:6.1f} MB per image, {what}")
        else:
            rows = rows_of(list(jobs_of(options, compile_cutlass(options, folder))), folder)
            print(title)
            show(rows)
            result = {"title": title, "how": HOW, "rows": [asdict(row) for row in rows]}
    for name, text in HOW.items():
        print(f"{name}: {text}.")
    if options.json:
        result = {"versions": versions(), "commit": commit, **result}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
