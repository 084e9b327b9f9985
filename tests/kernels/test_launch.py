# SPDX-License-Identifier: Apache-2.0
"""A launch as a value: what the compiler is told, and what a bound launch passes on."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from resnet_fast.kernels import add_relu, conv_bn_act
from resnet_fast.kernels import launch as launch_module
from resnet_fast.kernels.launch import Launch
from resnet_fast.spec import ConvSpec, TileConfig

SPEC = ConvSpec(2, 7, 7, 64, 48, 3, 3, (1, 1), (1, 1), residual=True)
TILE = TileConfig(32, 32, 32, 3, 4)
STRIDES = (7 * 7 * 64, 7 * 64, 64)
OPERANDS = conv_bn_act.Operands(STRIDES, (torch.float32, torch.float16, None, None), True)


LEADING = ("x", "weight", "y", "residual", "scale", "shift", None, None, 1e-5)


class Gpu:
    """A device that is not there: which is current, what was compiled, unloaded and run."""

    def __init__(self):
        self.current, self.compiled, self.unloaded, self.calls = 0, [], [], []

    def compile(self, launch, arch):
        gpu, name = self, (launch.num_warps, arch)
        gpu.compiled.append(name)

        class Compiled:
            def __getitem__(self, grid):
                return lambda *args: gpu.calls.append(args)

            def __del__(self):
                gpu.unloaded.append(name)

        return Compiled()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(Launch, "compile", lambda launch, arch: gpu.compile(launch, arch))
    monkeypatch.setattr(launch_module, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.current)
    return gpu


def test_a_bound_launch_compiles_once_and_passes_all_arguments(gpu):
    (launch,) = conv_bn_act.launches(SPEC, TILE, OPERANDS)
    run = launch.bind(90)
    run(*LEADING)
    run(*LEADING)
    assert gpu.compiled == [(4, 90)]
    assert gpu.calls == [LEADING + launch.trailing] * 2
    calls = gpu.calls
    passed = dict(zip(launch.kernel.arg_names, calls[0], strict=True))
    assert (passed["eps"], passed["c"], passed["stride_h"], passed["R"]) == (1e-5, 64, 448, 3)


def test_kernels_stay_loaded_whoever_drops_their_launches(gpu):
    """As plans do that are forgotten: recorded graphs launch their kernels still."""
    wide = replace(TILE, NUM_WARPS=8)
    for tile in (TILE, wide, TILE, wide, TILE):
        (launch,) = conv_bn_act.launches(SPEC, tile, OPERANDS)
        launch.bind(90)(*LEADING)
        del launch
    gc.collect()
    assert gpu.compiled == [(4, 90), (8, 90)] and gpu.unloaded == []
    assert len(gpu.calls) == 5


def test_other_sizes_of_one_variant_share_its_kernel(gpu):
    for n in (2, 4):
        (launch,) = conv_bn_act.launches(replace(SPEC, n=n), TILE, OPERANDS)
        launch.bind(90)(*LEADING)
    assert gpu.compiled == [(4, 90)]
    assert [args != gpu.calls[0] for args in gpu.calls] == [False, True]


def test_each_device_has_its_own(gpu):
    (launch,) = conv_bn_act.launches(SPEC, TILE, OPERANDS)
    for gpu.current in (0, 1, 0):
        launch.bind(90)(*LEADING)
    assert len(gpu.compiled) == 2


def test_source_states_types_constants_and_divisors():
    (launch,) = conv_bn_act.launches(SPEC, TILE, OPERANDS)
    source = launch.source()
    names = launch.kernel.arg_names
    assert source.signature["x"] == "*fp16" and source.signature["shift"] == "*fp16"
    assert source.signature["scale"] == "*fp32" and source.signature["eps"] == "fp32"
    assert source.signature["mean"] == "constexpr"
    assert source.constants[(names.index("mean"),)] is None
    assert source.attrs[(names.index("c"),)] == [["tt.divisibility", 16]]
    assert source.attrs[(names.index("residual"),)] == [["tt.divisibility", 16]]
    assert (names.index("mean"),) not in source.attrs and (names.index("h"),) not in source.attrs


def test_unaligned_pointers_and_odd_sizes_are_promised_nothing():
    operands = OPERANDS._replace(aligned=False)
    (launch,) = conv_bn_act.launches(replace(SPEC, c=63, k=9), TILE, operands)
    names = launch.kernel.arg_names
    promised = {names[i] for (i,) in launch.source().attrs}
    assert promised == {"stride_n", "stride_h", "stride_w"}


def test_a_launch_that_misses_an_argument_is_refused():
    (launch,) = add_relu.launches(128, torch.float16, True)
    with pytest.raises(ValueError, match="numel"):
        replace(launch, sizes={})


def test_operands_read_what_a_kept_launch_depends_on():
    x = torch.zeros(2, 64, 7, 7).to(memory_format=torch.channels_last)
    weight = torch.zeros(48, 64, 3, 3).to(memory_format=torch.channels_last)
    out = torch.zeros(2, 48, 7, 7).to(memory_format=torch.channels_last)
    scale, shift = torch.zeros(48), torch.zeros(49)[1:]
    aligned = conv_bn_act.operands(x, weight, scale, scale, None, None, None, out)
    assert aligned == (STRIDES, (torch.float32, torch.float32, None, None), True)
    assert not conv_bn_act.operands(x, weight, scale, shift, None, None, None, out).aligned
    assert not conv_bn_act.operands(x, weight, scale, scale, shift, scale, None, out).aligned
