# SPDX-License-Identifier: Apache-2.0
"""What is known of GPU kernels without a GPU: counts of their compiled code, and rooflines.

Counts come from files that `python -m benchmarks.counts --json FILE` writes, where the compiled PTX
was run and its traffic counted. A roofline turns bytes and FLOPs into the least time that a GPU
could need: a bound, modelled, and never in a column with measured numbers.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resnet_fast import _hardware
from resnet_fast.benchmarking import cases
from resnet_fast.measuring.machine import ROOT
from resnet_fast.profiling.layers import layers_of
from resnet_fast.profiling.roofline import roofline_of_gpu

COUNTS = ROOT / "benchmarks" / "results" / "counts"
DTYPE = "float16"  # of the modelled layers that were not counted

# Levels of fusion, each with what it no longer moves.
EAGER = "layer by layer"
FOLDED = "BatchNorm folded"
RELU = "ReLU in the convolution"
FUSED = "shortcut too"
JOINED = "projections and stem too"


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """One layer under one kernel: what was counted, and what rooflines make of it.

    Args:
        where, shape, dtype, batch: the layer.
        kernel, tile: whose compiled code was counted, for `arch`; empty where nothing was counted
            and only the shape speaks.
        counted_dram_bytes: distinct 32-byte sectors of global memory, in bytes.
        counted_sectors: sectors requested, over the fewest that this tile can do with.
        counted_wavefronts: of shared memory, over the fewest.
        counted_sass_per_hmma: instructions per tensor-core product in the main loop.
        modelled_from: whether the bytes are "counted" ones, or those of the "shape" alone.
        modelled_ms: per GPU, max(bytes / bandwidth, FLOPs / peak): no kernel can be faster.
    """

    where: str
    shape: str
    dtype: str
    batch: int
    kernel: str = ""
    tile: str = ""
    arch: int | None = None
    counted_dram_bytes: int | None = None
    counted_sectors: float | None = None
    counted_wavefronts: float | None = None
    counted_sass_per_hmma: float | None = None
    modelled_from: str = "shape"
    modelled_ms: dict[str, float] = field(default_factory=dict)


def modelled(models: Sequence[str], folder: Path = COUNTS) -> list[Modelled]:
    """A row per counted kernel and layer, and one per layer that was not counted.

    Args:
        models: whose convolutions are listed, at batch 1.
        folder: of the counts' JSON files.
    """
    layers = {}
    for dtype in ("float16", "bfloat16", "float32"):
        listed = cases.op_cases(models, [1], [dtype], "cuda")
        layers |= {case.shape: case for case in listed if case.op == "conv_bn_act"}
    found = []
    for row in counts(folder):
        case = layers.get(row["shape"])
        if case is not None:
            found.append(_of(case, row["dram_bytes"], row))
    counted = {row.where for row in found}
    for case in layers.values():
        if case.dtype == DTYPE and case.where not in counted:
            found.append(_of(case, case.bytes, None))
    return found


def counts(folder: Path = COUNTS) -> list[dict]:
    """The rows of all counts files, each with its "arch"; other files are skipped."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text())
        except ValueError:
            continue
        arch = re.search(r"sm_(\d+)", str(data.get("title", "")))
        for row in data.get("rows", ()) if arch else ():
            found.append({**row, "arch": int(arch.group(1))})
    return found


def _of(case: cases.OpCase, moved: int, row: dict | None) -> Modelled:
    times = {
        gpu.name: roofline_of_gpu(gpu, case.dtype).time_floor(case.flops, moved).seconds * 1e3
        for gpu in _hardware.GPUS.values()
    }
    base = {"where": case.where, "shape": case.shape, "dtype": case.dtype, "batch": case.batch}
    if row is None:
        return Modelled(**base, modelled_ms=times)
    return Modelled(
        **base,
        kernel=row["kernel"],
        tile=row["tile"],
        arch=row["arch"],
        counted_dram_bytes=row["dram_bytes"],
        counted_sectors=row.get("sectors"),
        counted_wavefronts=row.get("wavefronts"),
        counted_sass_per_hmma=row.get("sass_per_hmma"),
        modelled_from="counted",
        modelled_ms=times,
    )


@functools.cache
def bytes_by_fusion(model: str) -> dict[str, tuple[int, int]]:
    """Per level of fusion the bytes that one float32 image moves, and those of the weights.

    Counted from the shapes of the model's layers: each tensor once for every layer that reads or
    writes it.
    """
    layers = layers_of(model, fused=False)
    moved = sum(layer.bytes - layer.weight_bytes for layer in layers)
    weights = sum(layer.weight_bytes for layer in layers)
    found = {EAGER: (moved, weights)}

    def less(level: str, saved: int) -> None:
        nonlocal moved
        moved -= saved
        found[level] = (moved, weights)

    less(FOLDED, sum(la.bytes - la.weight_bytes for la in layers if la.kind == "norm"))
    after_add, after_norm = [], []
    for before, layer in itertools.pairwise(layers):
        if layer.kind == "relu":
            (after_add if before.kind == "add" else after_norm).append(layer)
    less(RELU, sum(layer.bytes for layer in after_norm))
    adds = [layer for layer in layers if layer.kind == "add"]
    # The last convolution still reads the shortcut: one tensor of the addition's three.
    less(FUSED, sum(la.bytes - la.bytes // 3 for la in adds) + sum(la.bytes for la in after_add))
    maps = 0
    for layer in layers:
        if layer.spec is None:
            continue
        if "downsample" in layer.name or "." not in layer.name:  # projections, and the stem
            maps += layer.spec.m * layer.spec.k * 4
    less(JOINED, 2 * maps)  # neither written nor read again
    return found
