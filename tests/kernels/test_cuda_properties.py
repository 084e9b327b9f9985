# SPDX-License-Identifier: Apache-2.0
"""The CUDA convolution at convolutions that nobody thought of, drawn by hypothesis.

`HYPOTHESIS_PROFILE=slow pytest tests/kernels/test_cuda_properties.py` draws 200 at random.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet_fast.spec import ELEMENT_SIZE, ConvSpec
from tests.kernels import machine
from tests.kernels.machine import Job
from tests.support import cuda_kernels, nvcc

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))

SLOW = os.environ.get("HYPOTHESIS_PROFILE") == "slow"
DRAWS = settings(
    max_examples=200 if SLOW else 25,
    derandomize=not SLOW,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
MAX_PRODUCTS = 2**24  # multiply-adds: the machine takes a fraction of a second


def pairs(low: int, high: int):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw) -> ConvSpec:
    """What `conv_bn_act` accepts from CUDA: channels by eights, any filter up to 15x15."""
    r, s = draw(st.one_of(st.just((1, 1)), st.just((3, 3)), pairs(1, 7), pairs(1, 15)))
    dilation = draw(st.one_of(st.just((1, 1)), pairs(1, 3)))
    padding = draw(st.one_of(st.just((0, 0)), st.just((r // 2, s // 2)), pairs(0, 4)))
    # at least as large as the filter, so that there is an output
    least = [
        max(1, d * (f - 1) + 1 - 2 * p) for d, f, p in zip(dilation, (r, s), padding, strict=True)
    ]
    h, w = (size + draw(st.integers(0, 12)) for size in least)
    spec = ConvSpec(
        draw(st.integers(1, 5)), h, w, 8 * draw(st.integers(1, 20)), 8 * draw(st.integers(1, 20)),
        r, s, draw(pairs(1, 3)), padding, dilation,
        dtype=draw(st.sampled_from(list(nvcc.DTYPES))),
        activation=draw(st.sampled_from(["relu", "none"])),
        residual=draw(st.booleans()),
        norm=draw(st.booleans()),
    )  # fmt: skip
    while spec.m * spec.k * spec.k_gemm > MAX_PRODUCTS and spec.c > 8:
        spec = replace(spec, n=1, c=spec.c // 16 * 8 or 8)
    return spec


@st.composite
def jobs(draw) -> Job:
    spec = draw(convolutions())
    tile = draw(st.sampled_from(cuda_kernels.TILES))
    tile = replace(tile, BLOCK_K=tile.BLOCK_K * 2 // ELEMENT_SIZE[spec.dtype])
    steps = -(-spec.k_gemm // tile.BLOCK_K)
    split = draw(st.integers(1, min(steps, 5)))
    if (split - 1) * -(-steps // split) >= steps:  # the last share would be empty
        split = 1
    options = {
        "seed": draw(st.integers(0, 99)),
        "sliced": draw(st.booleans()),
        "params": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    }
    return Job(
        spec,
        replace(tile, SPLIT_K=split),
        80,
        tuple(options.items()),
        cuda_kernels.conv_kernels,
    )


@DRAWS
@given(job=jobs())
def test_any_convolution(compile_pool, job):
    """Within the tolerance, nothing written beside the output, no fault, no bank conflict."""
    assert not compile_pool.submit(machine.conv_faults, job).result()
