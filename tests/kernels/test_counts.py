# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/counts.py` prints one table and writes what the README reads."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from resnet_fast.spec import ELEMENT_SIZE
from tests.kernels import join_checks
from tests.support import cases, join_cases, nvcc, sectors

COMMAND = Path(__file__).parents[2] / "benchmarks" / "counts.py"
COUNTS = runpy.run_path(str(COMMAND))


def moved(depth: int, dtype: str = "float16") -> list[float]:
    """Bytes per image where every convolution moves its tensors once."""
    options = SimpleNamespace(batch=1, size=224, dtype=dtype, layers=[""])
    rows = []
    for name, spec in COUNTS["layers"](options, depth).items():
        tile = COUNTS["chosen"](spec, 80)
        minimum = sectors.of_gemm(spec, tile, readers=1)
        count = (minimum.unique_loads + minimum.stores) * sectors.SECTOR
        rows.append(SimpleNamespace(layer=name, dram_bytes=count))
    fused = {}
    for name, spec in join_cases.resnet_joins(depth, dtype=dtype).items():
        loads, stores = join_checks.distinct_sectors(spec)
        fused[name] = (loads + stores) * sectors.SECTOR
    size = ELEMENT_SIZE[dtype]
    image, pooled = 224 * 224 * 3, 56 * 56 * 64
    fused["stem"] = (image + pooled + 64 * 147) * size + 4 * 64 * 4
    return list(COUNTS["bytes_per_image"](options, depth, rows, fused).values())


def test_bytes_per_image():
    convolutions, layers, fused = moved(50)
    assert 46 > fused > convolutions - 10 and layers > convolutions > fused - 1
    assert moved(50, "float32") == pytest.approx([2 * convolutions, 2 * layers, 2 * fused])
    assert moved(18)[2] < fused


def test_a_basic_block_moves_its_tensors():
    """Layer 1 of ResNet-18: four 3x3 convolutions on 56x56x64, every second one with a residual."""
    layers = cases.resnet_layers(18)
    assert sum(repeats for *_, repeats in layers) == 20
    first = [s for name, s, repeats in layers if name.startswith("layer1") for _ in range(repeats)]
    assert sum(2 + s.residual for s in first) == 10


@pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))
def test_the_command(tmp_path):
    path = tmp_path / "counts.json"
    argv = ["--layers", "layer4-next-conv1", "--size", "64", "--no-cutlass", "--json", str(path)]
    printed = nvcc.run(sys.executable, "-m", "benchmarks.counts", *argv)
    assert "layer4-next-conv1-1x1/1" in printed and "counted: " in printed
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["spill_bytes"] == 0 and row["wavefronts"] == row["dram"] == 1
    assert f"| {row['registers']} | 0 |" in COUNTS["markdown"](result)
