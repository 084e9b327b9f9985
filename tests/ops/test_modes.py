# SPDX-License-Identifier: Apache-2.0
"""The ops under torch's modes: grad, inference, autocast, flop counting, vmap, deterministic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast.agreement import compare
from resnet_fast.kernels import packed
from resnet_fast.ops import (
    CONV_BN_ACT,
    ArgumentError,
    Call,
    conv_bn_act,
    conv_bn_act_,
    packed_bytes,
)
from resnet_fast.ops.conv_bn_act import reference
from resnet_fast.spec import ConvSpec
from tests.support.tolerance import assert_within

SPEC = ConvSpec(
    n=2, h=9, w=9, c=16, k=24, r=3, s=3, padding=(1, 1), residual=True, norm=True, dtype="float32"
)
TENSORS = ("x", "weight", "scale", "shift", "residual", "mean", "var")
DIFFERENTIABLE = TENSORS[:5]
LONGEST_SUM = max(SPEC.m, SPEC.k * SPEC.r * SPEC.s)  # of the gradients along weight and x


def run(call: Call, op=conv_bn_act):
    return op(*call[:10], mean=call.mean, var=call.var, eps=call.eps, backend=call.backend)


# ---- gradients


def gradients(function, call) -> list[torch.Tensor]:
    """Of the sum of squares, along the tensors that have a gradient in torch."""
    tensors = [getattr(call, name) for name in DIFFERENTIABLE]
    wanted = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        y = function(call._replace(**dict(zip(DIFFERENTIABLE, wanted, strict=True))))
        return torch.autograd.grad(y.square().sum(), wanted)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradients_are_those_of_torchs_own_functions(activation, arguments):
    call = arguments(SPEC)._replace(activation=activation)
    exact = gradients(reference, call._replace(**{n: t.double() for n, t in tensors_of(call)}))
    eager, ours = gradients(reference, call), gradients(run, call)
    for name, mine, theirs, right in zip(DIFFERENTIABLE, ours, eager, exact, strict=True):
        assert compare(mine, theirs, right, LONGEST_SUM).agrees, name


def tensors_of(call: Call) -> list[tuple[str, torch.Tensor]]:
    return [(name, getattr(call, name)) for name in TENSORS]


@pytest.mark.parametrize("name", TENSORS)
def test_the_op_that_writes_over_its_residual_refuses_a_gradient(name, arguments):
    call = arguments(SPEC)
    before = call.residual.clone()
    call = call._replace(**{name: getattr(call, name).detach().requires_grad_()})
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"conv_bn_act_ has no gradient"):
        run(call, conv_bn_act_)
    assert torch.equal(call.residual, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_are_taken_where_no_gradient_is_needed(mode, arguments):
    call = arguments(SPEC)
    expected = run(call)
    call = call._replace(weight=call.weight.detach().requires_grad_())
    with mode():
        y = run(call)
    assert torch.equal(y, expected)
    assert not y.requires_grad


def test_grad_mode_without_a_need_is_no_error(arguments):
    with torch.enable_grad():
        assert not run(arguments(SPEC)).requires_grad


# ---- autocast


@pytest.mark.parametrize("norm", [False, True], ids=["affine", "statistics"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_maps(dtype, norm, arguments, definition, eager):
    call = arguments(replace(SPEC, norm=norm, activation="none"))
    with torch.autocast("cpu", dtype):
        y = run(call)
    names = ("x", "weight", "residual")
    rounded = call._replace(**{name: getattr(call, name).to(dtype) for name in names})
    assert y.dtype == dtype
    assert_within(y, eager(rounded), definition(rounded), SPEC.k_gemm)


BESIDE_ONE = 1 + 2.0**-12  # 1 in bf16 and in fp16
ONES = torch.ones(1, 1, 1, 1)


@pytest.mark.parametrize(
    ("backend", "scale", "shift", "mean"),
    [
        ("cpu", 1.0, -BESIDE_ONE, None),
        ("cpu", 1.0, 0.0, BESIDE_ONE),
        ("aten", 1.0, -BESIDE_ONE, None),
        ("aten", BESIDE_ONE, -1.0, None),
        ("aten", 1.0, 0.0, BESIDE_ONE),
    ],
    ids=["cpu-shift", "cpu-mean", "aten-shift", "aten-scale", "aten-mean"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_round_the_vectors(dtype, backend, scale, shift, mean, needs_cpu_backend):
    """The difference from one is all that is left of the sum, if it was not rounded away."""
    if backend == "cpu":
        needs_cpu_backend(dtype)
    scale, shift = torch.tensor([scale]), torch.tensor([shift])
    statistics = {} if mean is None else {"mean": torch.tensor([mean]), "var": torch.ones(1)}
    with torch.autocast("cpu", dtype):
        y = conv_bn_act(
            ONES,
            ONES,
            scale,
            shift,
            None,
            1,
            0,
            1,
            1,
            "none",
            **statistics,
            eps=0.0,
            backend=backend,
        )
    assert abs(y.item()) == 2.0**-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_packs_the_master_weight_once(dtype, arguments, monkeypatch, needs_cpu_backend):
    needs_cpu_backend(dtype)
    call = arguments(SPEC)
    packs = []
    pack = packed.PackedWeight.pack
    monkeypatch.setattr(
        packed.PackedWeight, "pack", lambda self, *args: packs.append(1) or pack(self, *args)
    )
    with torch.autocast("cpu", dtype):
        first = run(call)
        assert CONV_BN_ACT.last_plan().backend == "cpu"
        assert torch.equal(run(call), first)
    assert len(packs) == 1
    assert packed_bytes([call.weight]) > 0
    call.weight.mul_(2)
    with torch.autocast("cpu", dtype):
        assert not torch.equal(run(call), first)
    assert len(packs) == 2


def test_autocast_folds_the_master_weight_before_it_rounds(
    arguments, definition, needs_cpu_backend
):
    """weight * g is rounded once, from fp32: better than rounding the weight first."""
    needs_cpu_backend(torch.bfloat16)
    call = arguments(replace(SPEC, residual=False, activation="none"))
    call = call._replace(x=call.x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        y = run(call)
    exact = definition(call)
    twice = run(call._replace(x=call.x.bfloat16(), weight=call.weight.bfloat16()))
    assert (y.double() - exact).norm() < (twice.double() - exact).norm()


def test_autocast_leaves_float64_alone(arguments, definition):
    call = arguments(replace(SPEC, dtype="float64"), vector_dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(call)
    assert y.dtype == torch.float64
    assert torch.allclose(y, definition(call), rtol=1e-12, atol=1e-12)


def test_autocast_casts_what_is_narrow_already(arguments):
    call = arguments(replace(SPEC, dtype="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(call), run(call))
    half = arguments(replace(SPEC, dtype="float16"))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(half).dtype == torch.bfloat16


def test_autocast_inplace_writes_into_residual_or_refuses(arguments):
    call = arguments(SPEC)
    narrow = call._replace(residual=call.residual.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(narrow)
        assert run(narrow, conv_bn_act_) is narrow.residual
        with pytest.raises(ArgumentError, match="residual must be of x's dtype bfloat16, got"):
            run(call, conv_bn_act_)
    assert torch.equal(narrow.residual, expected)


# ---- counting, vmap, determinism


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("op", [conv_bn_act, conv_bn_act_], ids=lambda op: op.__name__)
def test_flops_are_those_of_conv2d(op, groups, arguments):
    spec = replace(SPEC, groups=groups, stride=(2, 1))
    call = arguments(spec)
    with FlopCounterMode(display=False) as ours:
        run(call, op)
    with FlopCounterMode(display=False) as torchs:
        F.conv2d(call.x, call.weight, None, *call[5:9])
    assert ours.get_total_flops() == torchs.get_total_flops() == spec.flops > 0


def test_flops_on_the_meta_device():
    x, weight, vector = (torch.empty(s, device="meta") for s in ((2, 8, 9, 9), (4, 8, 3, 3), (4,)))
    with FlopCounterMode(display=False) as counter:
        conv_bn_act(x, weight, vector, vector)
    assert counter.get_total_flops() == 2 * 2 * 7 * 7 * 4 * 8 * 9


def test_vmap_over_x(arguments):
    call = arguments(replace(SPEC, residual=False))
    xs = torch.stack([call.x, call.x + 1, call.x * 2])
    ys = torch.vmap(lambda x: conv_bn_act(x, *call[1:4], padding=1))(xs)
    for x, y in zip(xs, ys, strict=True):
        expected = conv_bn_act(x, *call[1:4], padding=1)
        assert_within(y, expected, F.relu(_affine(x, call)), SPEC.k_gemm)


def _affine(x, call):
    y = F.conv2d(x.double(), call.weight.double(), padding=1)
    return y * call.scale.double()[:, None, None] + call.shift.double()[:, None, None]


def test_deterministic_algorithms_change_nothing(arguments):
    call = arguments(SPEC)
    expected = run(call)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(run(call), expected)
    finally:
        torch.use_deterministic_algorithms(False)
