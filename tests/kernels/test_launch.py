# SPDX-License-Identifier: Apache-2.0
"""A launch as a value: what the compiler is told, and what a bound launch passes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast.kernels import add_relu, conv_bn_act
from resnet_fast.kernels.launch import Launch
from resnet_fast.spec import ConvSpec, TileConfig

SPEC = ConvSpec(2, 7, 7, 64, 48, 3, 3, (1, 1), (1, 1), residual=True)
TILE = TileConfig(32, 32, 32, 3, 4)
STRIDES = (7 * 7 * 64, 7 * 64, 64)
OPERANDS = conv_bn_act.Operands(STRIDES, (torch.float32, torch.float16, None, None), True)


def test_a_bound_launch_compiles_once_and_passes_all_arguments(monkeypatch):
    (launch,) = conv_bn_act.launches(SPEC, TILE, OPERANDS)
    compiled, calls = [], []

    def fake_compile(self, arch):
        compiled.append(arch)
        return {self.grid: lambda *args: calls.append(args)}

    monkeypatch.setattr(Launch, "compile", fake_compile)
    run = launch.bind(90)
    leading = ("x", "weight", "y", "residual", "scale", "shift", None, None, 1e-5)
    run(*leading)
    run(*leading)
    assert compiled == [90]
    assert calls == [leading + launch.trailing] * 2
    passed = dict(zip(launch.kernel.arg_names, calls[0], strict=True))
    assert (passed["eps"], passed["c"], passed["stride_h"], passed["R"]) == (1e-5, 64, 448, 3)


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
