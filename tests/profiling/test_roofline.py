# SPDX-License-Identifier: Apache-2.0
"""The roofline's floors, and that nothing measured stays above it."""

from __future__ import annotations

import pytest
import torch

from resnet_fast._hardware import GPUS
from resnet_fast.profiling import roofline
from resnet_fast.profiling.roofline import Roofline, roofline_of, roofline_of_gpu

PLAIN = Roofline("a device", 1.0, 100.0, "specified", launch_seconds=2e-6)
CACHED = Roofline("a cpu", 1.0, 10.0, "measured", caches=((1000, 100.0), (100000, 50.0)))


@pytest.mark.parametrize(
    ("flops", "moved", "seconds", "bound"),
    [
        pytest.param(10**9, 10**6, 1e-3, "arithmetic", id="arithmetic"),
        pytest.param(10**6, 10**7, 1e-4, "memory", id="memory"),
        pytest.param(0, 10**7, 1e-4, "memory", id="no-flops"),
        pytest.param(10**3, 10**3, 1e-8, "launch", id="launch"),
    ],
)
def test_the_longer_of_the_two_binds(flops, moved, seconds, bound):
    floor = PLAIN.time_floor(flops, moved)
    assert (floor.seconds, floor.bound) == (pytest.approx(seconds), bound)


@pytest.mark.parametrize(("moved", "rate"), [(10, 100.0), (1001, 50.0), (10**6, 10.0)])
def test_a_cpu_is_faster_where_it_fits_a_cache(moved, rate):
    assert CACHED.bandwidth_at(moved) == rate


@pytest.mark.parametrize("base", [PLAIN, CACHED], ids=["plain", "cached"])
def test_what_runs_faster_than_a_ceiling_raises_it(base):
    measured = [
        ("slow", 10**6, 10**6, 1.0),
        ("in cache", 10, 500, 1e-9),
        ("middle", 10, 50000, 1e-7),
        ("memory", 10, 10**7, 1e-5),
        ("arithmetic", 10**13, 10, 1.0),
        ("nothing", 0, 0, 0.0),
    ]
    raised = base.raised(measured)
    for _, flops, moved, seconds in measured[:-1]:
        assert raised.time_floor(flops, moved).seconds <= seconds * 1.0001
    assert raised.tflops == 10.0 and 2 <= len(raised.notes) <= 4
    rates = [rate for _, rate in raised.caches] + [raised.bandwidth_gbs]
    assert rates == sorted(rates, reverse=True)
    assert base.raised(measured[:1]) == base


def test_gpus_that_are_not_here_have_the_rooflines_of_their_data_sheets():
    half = roofline_of_gpu(GPUS[90], "bfloat16")
    assert (half.tflops, half.bandwidth_gbs, half.source) == (989, 3350, "specified")
    assert roofline_of_gpu(GPUS[90], "tf32").tflops == 989 / 2
    for gpu in GPUS.values():
        single = roofline_of_gpu(gpu, "float32")
        assert 0 < single.tflops < gpu.tflops_fp16 and gpu.name in single.name


def test_this_cpu_is_measured_once(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(roofline, "SECONDS_PER_CEILING", 0.001)
    monkeypatch.setattr(roofline, "_measured", {})
    threads = torch.get_num_threads()
    first = roofline_of("cpu", torch.float32, told.append)
    assert roofline_of("cpu", "float32", told.append) is first
    assert len(told) == 1 and "float32" in told[0]
    assert first.source == "measured" and first.tflops > 0 and first.launch_seconds > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["int8", "complex64"])
def test_an_unknown_dtype_lists_the_known(name):
    with pytest.raises(ValueError, match=r"bfloat16.*float64"):
        roofline_of("cpu", name)
    with pytest.raises(ValueError, match="known are"):
        roofline_of_gpu(GPUS[80], name)


def test_an_unknown_device_lists_the_known():
    with pytest.raises(ValueError, match="known: cpu, cuda"):
        roofline_of("meta", "float32")
