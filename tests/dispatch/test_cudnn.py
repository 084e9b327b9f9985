# SPDX-License-Identifier: Apache-2.0
"""cuDNN's fused convolution: what it is refused for, and that folding BatchNorm is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from resnet_fast.dispatch import table
from resnet_fast.dispatch.problem import ConvProblem
from resnet_fast.kernels import aten
from resnet_fast.spec import ConvSpec
from tests.support import cases
from tests.support.tolerance import assert_within

SPEC = ConvSpec(4, 28, 28, 64, 64, 3, 3, (1, 1), (1, 1), norm=True, dtype="float16")
PROBLEM = ConvProblem(
    spec=SPEC, device="cuda", arch=80, x="channels_last", weight="channels_last", residual="",
    x_strides=(28 * 28 * 64, 28 * 64, 64), vectors=True, vector_dtypes=("float16",) * 4,
    tracked=True, aligned=True,
)  # fmt: skip

REFUSED = {
    "no-activation": ({"activation": "none"}, "all end in a ReLU"),
    "bfloat16": ({"dtype": "bfloat16"}, "pytorch#58861"),
    "float64": ({"dtype": "float64"}, "no channels_last"),
    "groups": ({"groups": 2}, "pytorch#34977"),
    "7x7": ({"r": 7, "s": 7}, "pytorch#68506"),
    "1x5": ({"s": 5}, "pytorch#68506"),
    "one-channel": ({"c": 1}, "pytorch#62926"),
    "k-12": ({"k": 12}, "pytorch#62926"),
    "small-map": ({"n": 1, "h": 7, "w": 7}, "a quarter of the output"),
}


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setattr("torch.backends.cudnn.is_available", lambda: True)
    return table.row_of("conv_bn_act", "cudnn")


@pytest.mark.parametrize("name", REFUSED)
def test_each_rule_gives_its_reason(name, row):
    changes, reason = REFUSED[name]
    assert reason in row.refusal(replace(PROBLEM, spec=replace(SPEC, **changes)))


def test_layouts_that_torch_would_copy_are_refused(row):
    for x in ("contiguous", "strided", "channels_inner"):
        assert "x is" in row.refusal(replace(PROBLEM, x=x))


def test_it_runs_only_where_it_is_asked_for(row):
    assert table.plan(PROBLEM).backend == "aten"
    assert "NaN" in table.explain(PROBLEM)[1]["cudnn"]
    assert table.plan(PROBLEM, "cudnn").backend == "cudnn"


def test_the_variable_may_ask_for_it(row, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cudnn")
    assert table.plan(PROBLEM).backend == "cudnn"
    assert table.plan(replace(PROBLEM, spec=replace(SPEC, groups=2))).backend == "aten"


def relu(x, weight, bias, stride, padding, dilation, groups):
    """What torch documents of aten::cudnn_convolution_relu, with fp32 sums, rounded once."""
    assert bias.dtype == weight.dtype == x.dtype
    wide = (x.float(), weight.float(), bias.float())
    return F.conv2d(*wide, stride, padding, dilation, groups).relu().to(x.dtype)


def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    """The same of aten::cudnn_convolution_add_relu."""
    wide = (x.float(), weight.float(), bias.float())
    y = F.conv2d(*wide, stride, padding, dilation, groups)
    return (y + alpha * z.float()).relu().to(x.dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("norm", [False, True], ids=["affine", "norm"])
def test_folding_stays_within_the_rule(dtype, residual, norm, row, monkeypatch):
    monkeypatch.setattr(aten, "_cudnn_relu", relu)
    monkeypatch.setattr(aten, "_cudnn_add_relu", add_relu)
    for size, stride in ((28, 1), (27, 2)):
        spec = replace(
            SPEC, n=2, h=size, w=size, stride=(stride, stride), dtype=dtype, residual=residual,
            norm=norm, precision="ieee",
        )  # fmt: skip
        t = cases.conv_tensors(spec)
        launch = row.build(replace(PROBLEM, spec=spec), None)(
            t.weight, t.scale, t.shift, t.mean, t.var, t.eps
        )
        assert_within(launch(t.x, t.residual), t.eager(), t.reference(), spec.k_gemm)
        if residual:
            assert launch(t.x, t.residual, inplace=True) is t.residual
            assert torch.equal(t.residual, t.residual.relu())
