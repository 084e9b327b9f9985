# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/device/add_relu.cuh as compiled: run on the PTX machine, and read as machine code."""

from __future__ import annotations

import math

import pytest
import torch

from softgpu import ptx
from tests.support import cuda_kernels, nvcc
from tests.support.compiled import CompiledKernel

pytest.importorskip("triton", reason="Triton's wheel carries the tools that read machine code")
if nvcc.missing():
    pytest.skip(nvcc.missing(), allow_module_level=True)

DTYPES = ("float16", "bfloat16", "float32")
FORMULAS = ("AddRelu", "ReluGradient")
THREADS, SECTOR = cuda_kernels.ADD_RELU_THREADS, 32


def build(formula: str, x, y, out, arch: int = 80) -> CompiledKernel:
    """The launch that the extension makes of these tensors."""
    (kernel,) = cuda_kernels.add_relu_kernels(x, y, out, arch, formula)
    return kernel


def eager(formula: str, x, y):
    """What torch computes."""
    if formula == "AddRelu":
        return torch.relu(x + y)
    return torch.ops.aten.threshold_backward(x, y, 0)


class Operands:
    """x, y and out as the middles of larger tensors of NaN, at any offsets in bytes."""

    def __init__(self, formula: str, dtype: str, numel: int, offsets=(0, 0, 0)):
        self.dtype = getattr(torch, dtype)
        generator = torch.Generator().manual_seed(numel)
        self.whole, self.parts = [], []
        for offset in offsets:
            memory = torch.full((numel + 192,), math.nan, dtype=self.dtype)
            first = (64 - memory.data_ptr()) % 64 + 64 + offset
            assert first % memory.itemsize == 0
            start = first // memory.itemsize
            self.whole.append(memory)
            self.parts.append(memory[start : start + numel])
        for tensor in self.parts[:2]:
            tensor.copy_(torch.randn(numel, generator=generator))
        x, y, _ = self.parts
        if formula == "ReluGradient":
            y.relu_()
        for tensor, place in ((x, 1), (y, 2), (x, 3)):
            if numel > 3:
                tensor[place * numel // 4] = math.nan if place < 3 else math.inf

    def check(self, formula: str) -> None:
        x, y, out = self.parts
        torch.testing.assert_close(out, eager(formula, x, y), rtol=0, atol=0, equal_nan=True)
        memory = self.whole[2]
        start = (out.data_ptr() - memory.data_ptr()) // out.itemsize
        assert memory[:start].isnan().all() and memory[start + len(out) :].isnan().all()


# id -> byte offsets of x, y and out from a multiple of 64
OFFSETS = {
    "aligned": (0, 0, 0),
    "together-off-by-4": (4, 4, 4),
    "together-off-by-a-sector's-half": (16, 16, 16),
    "together-in-16-not-in-32": (28, 12, 44),
    "x-alone": (4, 0, 0),
    "all-apart": (4, 8, 12),
}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_equals_torch_bit_for_bit_and_stays_inside(offsets, dtype, formula):
    for numel in (1, 3, 15, 33, 2047, 4096 + 4, 9001):
        operands = Operands(formula, dtype, numel, offsets)
        build(formula, *operands.parts).run()
        operands.check(formula)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_each_sector_once(dtype, formula):
    operands = Operands(formula, dtype, 3 * 4096 + 512)
    size = len(operands.parts[0]) * operands.parts[0].itemsize
    counters = build(formula, *operands.parts).run().counters
    assert counters.global_sectors["load"] == 2 * size // SECTOR
    assert counters.global_sectors["store"] == size // SECTOR
    assert counters.global_bytes["load"] == 2 * size


def test_out_is_written_by_whole_sectors_wherever_it_begins():
    operands = Operands("AddRelu", "float16", 3 * 4096, (4, 4, 4))
    counters = build("AddRelu", *operands.parts).run().counters
    size = 3 * 4096 * 2
    assert counters.global_sectors["store"] <= size // SECTOR + 3  # a head and a tail


def test_out_may_be_an_input():
    operands = Operands("AddRelu", "float16", 5000, (4, 4, 4))
    x, y, out = operands.parts
    out.copy_(y)
    build("AddRelu", x, out, out).run()
    operands.check("AddRelu")


def test_beyond_32_bits():
    count, tail = 2**31 + 3 * 2**12 + 44, 2**13
    x, y, out = tensors = [
        torch.from_numpy(ptx.sparse_array((count,), "float16")) for _ in range(3)
    ]
    for seed, tensor in enumerate(tensors[:2]):
        tensor[-tail:] = torch.randn(tail, generator=torch.Generator().manual_seed(seed))
    kernel = build("AddRelu", *tensors)
    kernel.run([0, *range(kernel.grid[0] - 2, kernel.grid[0])])  # block 0 has the tail
    written = count - (kernel.grid[0] - 2) * THREADS * 16
    torch.testing.assert_close(
        out[-written:], torch.relu(x[-written:] + y[-written:]), rtol=0, atol=0
    )
    assert not out[-tail:-written].any()


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_has_16_byte_accesses_and_spills_nothing(dtype, formula):
    operands = Operands(formula, dtype, 4096)
    for arch in (80, 90):
        kernel = build(formula, *operands.parts, arch=arch)
        codes = kernel.opcodes()
        assert sum(n for code, n in codes.items() if ".128" in code and "LDG" in code) == 4
        assert sum(n for code, n in codes.items() if ".128" in code and "STG" in code) == 2
        assert kernel.resources().spill_bytes == 0
        assert kernel.resources().registers <= 32  # all threads of an SM at once
