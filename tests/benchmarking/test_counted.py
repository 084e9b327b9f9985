# SPDX-License-Identifier: Apache-2.0
"""Counts of GPU kernels become modelled rows, and fusion's savings follow from shapes."""

from __future__ import annotations

import pytest

from benchmarks import counted
from benchmarks.counted import Modelled

MODELLED = Modelled(
    where="resnet50.layer1.0.conv2", shape="1x56x56x64 -> 64, 3x3/1 +relu, float16",
    dtype="float16", batch=1, kernel="resnet_fast", tile="128x64x64 s3", arch=80,
    counted_dram_bytes=876544, counted_sectors=1.01, modelled_from="counted",
    modelled_ms={"H100 SXM": 0.0003, "L4": 0.003},
)  # fmt: skip


def test_counts_become_modelled_rows_and_the_rest_speak_by_their_shape(tmp_path):
    shape = "1x56x56x64 -> 64, 3x3/1 +relu, float16"
    (tmp_path / "resnet50.json").write_text(
        '{"title": "ResNet-50, batch 1 at 224x224, float16, sm_80", "rows": [{"layer": "l", '
        f'"shape": "{shape}", "tile": "128x64x64 s3", "kernel": "resnet_fast", "registers": 128, '
        '"spill_bytes": 0, "blocks_per_sm": 2, "sass_per_hmma": 2.2, "wavefronts": 1.0, '
        '"sectors": 1.02, "dram_bytes": 3350000, "dram": 1.0}]}'
    )
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "damaged.json").write_text("")
    found = counted.modelled(("resnet50",), tmp_path)
    first, *rest = found
    assert first.modelled_from == "counted" and first.shape == shape and first.arch == 80
    # 3.35 MB at 3350 GB/s are a microsecond, longer than the arithmetic
    assert first.modelled_ms["H100 SXM"] == pytest.approx(1e-3)
    assert first.counted_dram_bytes == 3350000 and first.counted_sectors == 1.02
    assert all(m.modelled_from == "shape" and m.kernel == "" for m in rest)
    assert all(m.counted_dram_bytes is m.counted_sectors is None for m in rest)
    assert shape not in {m.shape for m in rest} and len(rest) > 20
    nothing = counted.modelled(("resnet50",), tmp_path / "absent")
    assert {m.modelled_from for m in nothing} == {"shape"}


def test_each_level_of_fusion_moves_less():
    """The first and the last of ResNet-18 by hand, in float32 elements of feature maps."""
    levels = counted.bytes_by_fusion("resnet18")
    moved = [activations for activations, _ in levels.values()]
    assert moved == sorted(moved, reverse=True) and len(moved) == 5
    image, full, pooled = 3 * 224 * 224, 64 * 112 * 112, 64 * 56 * 56
    maps = [pooled // 2**i for i in range(4)]
    fused = image + pooled  # stem_pool
    for i, size in enumerate(maps):
        before = size if i == 0 else maps[i - 1]
        if i == 0:  # two blocks of two convolutions, the second with the shortcut
            fused += 2 * (2 * size + 3 * size)
        else:  # the projection reads a quarter of its input's pixels
            fused += (before + size) + (2 * size + before // 4) + (2 * size + 3 * size)
    head = maps[3] + 512 + 512 + 1000
    assert moved[-1] / 4 == pytest.approx(fused + head, rel=0.002)
    eager = image + full + 4 * full + full + pooled
    assert moved[0] / 4 > eager + 16 * 6 * maps[3]
