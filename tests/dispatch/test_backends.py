# SPDX-License-Identifier: Apache-2.0
"""The backends table: who takes what, why not, what RESNET_FAST_BACKEND does, what is kept."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from resnet_fast import ops
from resnet_fast.dispatch import table
from resnet_fast.dispatch.problem import ConvProblem
from resnet_fast.kernels import aten
from resnet_fast.ops import _op
from resnet_fast.spec import ConvSpec

SPEC = ConvSpec(n=2, h=6, w=6, c=8, k=12, r=3, s=3, padding=(1, 1), dtype="float32")
ON_CPU = ConvProblem(
    spec=SPEC, device="cpu", arch=0, x="channels_last", weight="channels_last", residual="",
    x_strides=(288, 48, 8), vectors=True, vector_dtypes=("float32", "float32", None, None),
    tracked=True, aligned=True,
)  # fmt: skip
ON_CUDA = replace(ON_CPU, device="cuda", arch=90)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No plan of another test, no variable of the caller's shell; and no gradients."""
    monkeypatch.setattr(ops.CONV_BN_ACT, "_plans", {})
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.no_grad():
        yield


@pytest.fixture
def row():
    """row(name) -> the row of the table."""
    return partial(table.row_of, "conv_bn_act")


def arguments(**changes) -> ops.Call:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    call = ops.Call(x, torch.randn(12, 8, 3, 3), torch.ones(12), torch.zeros(12), padding=(1, 1))
    return call._replace(**changes)


def run(**changes) -> table.Plan:
    ops.CONV_BN_ACT.overload(*arguments(**changes))
    return ops.CONV_BN_ACT.last_plan()


# ---- each refusal and its reason


CPU_REFUSES = {
    "x-contiguous": (replace(ON_CPU, x="contiguous"), "x is contiguous, not channels_last"),
    "x-slice": (replace(ON_CPU, x="channels_inner"), "x is channels_inner, not"),
    "residual": (replace(ON_CPU, residual="strided"), "residual is strided, not channels_last"),
    "weight": (replace(ON_CPU, weight="strided"), "weight is strided, neither contiguous nor"),
    "vectors": (replace(ON_CPU, vectors=False), "scale, shift, mean or var is not contiguous"),
    "untracked": (replace(ON_CPU, tracked=False), "torch.inference_mode.*outside of it"),
    "float64": (replace(ON_CPU, spec=replace(SPEC, dtype="float64")), "no float64"),
    "cuda": (ON_CUDA, "runs on cpu tensors, not cuda"),
}


@pytest.mark.parametrize("name", CPU_REFUSES)
def test_cpu_refuses_with_the_reason(name):
    problem, reason = CPU_REFUSES[name]
    plan = table.plan(problem)
    assert plan.backend == "aten"
    with pytest.raises(ValueError, match=f"^resnet_fast: backend 'cpu' cannot take .*: .*{reason}"):
        table.plan(problem, "cpu")


@pytest.mark.parametrize("weight", ["channels_last", "contiguous"])
@pytest.mark.parametrize("residual", ["", "channels_last"])
def test_cpu_takes_the_rest(weight, residual):
    plan = table.plan(replace(ON_CPU, weight=weight, residual=residual))
    assert plan.backend == "cpu"
    assert plan.why_fallback() == ""


TRITON_REFUSES = {
    "x-contiguous": (replace(ON_CUDA, x="contiguous"), "x is contiguous, not channels_last"),
    "weight": (replace(ON_CUDA, weight="contiguous"), "weight is contiguous, not channels_last"),
    "residual": (replace(ON_CUDA, residual="contiguous"), "residual is contiguous, not"),
    "vectors": (replace(ON_CUDA, vectors=False), "scale, shift, mean or var is not contiguous"),
}


@pytest.mark.parametrize("name", TRITON_REFUSES)
def test_triton_refuses_with_the_reason(name, row):
    problem, reason = TRITON_REFUSES[name]
    assert reason in row("triton").refusal(problem)


def test_triton_refuses_an_old_gpu(row, gpu_is_here):
    assert row("triton").why_not(replace(ON_CUDA, arch=75)) == "compute capability 7.5 is below 8.0"


def test_triton_refuses_tensors_of_the_cpu():
    elsewhere = "runs on cuda tensors, not cpu"
    assert table.plan(ON_CPU).refusals == {"cuda": elsewhere, "triton": elsewhere}


def test_triton_is_missing_without_a_gpu(row, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert row("triton").missing(80) == "torch sees no NVIDIA GPU"


def test_triton_is_missing_where_it_is_not_installed(row, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in row("triton").missing(80)


def test_aten_refuses_nothing(row):
    for problem, _ in (*CPU_REFUSES.values(), *TRITON_REFUSES.values()):
        assert row("aten").refusal(problem) is None
        assert row("aten").why_not(problem) is None


def test_why_fallback_speaks_of_the_problems_own_device():
    plan = table.plan(replace(ON_CPU, x="strided"))
    assert plan.why_fallback() == "x is strided, not channels_last"
    elsewhere = table.plan(replace(ON_CPU, device="xpu"))
    assert elsewhere.backend == "aten"
    assert elsewhere.why_fallback() == "no fused kernel for xpu"


@pytest.fixture
def layout_warnings(built):
    """layout_warnings(problem) -> what is warned of when it is planned on a GPU."""

    def said(problem, backend="auto"):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert table.plan(problem, backend).backend == "aten"
        return [str(warning.message) for warning in found]

    table._warn_of_contiguous_weights.cache_clear()
    yield said
    table._warn_of_contiguous_weights.cache_clear()


def test_contiguous_weights_on_a_gpu_are_warned_of_once(layout_warnings):
    (text,) = layout_warnings(replace(ON_CUDA, weight="contiguous"))
    assert "contiguous weights" in text
    assert "model.to(memory_format=torch.channels_last)" in text
    assert layout_warnings(replace(ON_CUDA, weight="contiguous", arch=80)) == []


QUIET = {
    "asked": (replace(ON_CUDA, weight="contiguous"), "aten"),
    "strided": (replace(ON_CUDA, weight="strided"), "auto"),
    "of-no-use": (replace(ON_CUDA, weight="contiguous", x="contiguous"), "auto"),
    "old-gpu": (replace(ON_CUDA, weight="contiguous", arch=75), "auto"),
    "groups": (replace(ON_CUDA, weight="contiguous", spec=replace(SPEC, groups=4)), "auto"),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_channels_last_would_not_help_is_not_warned_of(layout_warnings, name):
    assert layout_warnings(*QUIET[name]) == []


# ---- what the op tells of its tensors


FACTS = {
    "channels-last": ({}, {"x": "channels_last", "weight": "contiguous", "residual": ""}),
    "contiguous": ({"x": torch.randn(2, 8, 6, 6)}, {"x": "contiguous"}),
    "channel-slice": (
        {"x": torch.randn(2, 6, 6, 11).permute(0, 3, 1, 2)[:, 1:9]}, {"x": "channels_inner"},
    ),
    "strided": ({"x": torch.randn(2, 8, 6, 12)[..., ::2]}, {"x": "strided"}),
    "strided-scale": ({"scale": torch.ones(24)[::2]}, {"vectors": False}),
    "contiguous-residual": ({"residual": torch.randn(2, 12, 6, 6)}, {"residual": "contiguous"}),
    "narrow-vectors": (
        {"mean": torch.zeros(12), "var": torch.ones(12)}, {"vector_dtypes": ("float32",) * 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_the_problem_describes_the_tensors(name):
    changes, facts = FACTS[name]
    problem = run(**changes).problem
    assert {key: getattr(problem, key) for key in facts} == facts
    assert (problem.device, problem.arch) == ("cpu", 0)


def test_the_spec_is_the_calls():
    call = arguments(
        groups=1, stride=(2, 1), dilation=(1, 2), padding=(1, 2), activation="none",
        mean=torch.zeros(12), var=torch.ones(12),
    )  # fmt: skip
    assert ops.CONV_BN_ACT.plan_of(call).problem.spec == replace(
        SPEC, stride=(2, 1), dilation=(1, 2), padding=(1, 2), activation="none", norm=True,
        precision="ieee",
    )  # fmt: skip


@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_tf32_follows_torchs_flag(value):
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = value
        assert ops.precision() == value
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


# ---- asking for a backend


def test_an_argument_is_obeyed():
    assert run().backend == "cpu"
    assert run(backend="aten").backend == "aten"
    assert run(backend="cpu").backend == "cpu"


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(ValueError) as caught:
        table.plan(ON_CPU, "cutlass")
    for name in ("'cutlass'", "cuda", "triton", "cpu", "aten", "auto"):
        assert name in str(caught.value)


def test_a_backend_that_is_not_here_raises_with_its_reason():
    with pytest.raises(ValueError, match=r"'triton' cannot take .*: runs on cuda tensors, not cpu"):
        run(backend="triton")


def test_the_variable_asks_for_a_backend(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "aten")
    plan = run()
    assert plan.backend == "aten"


def test_the_argument_beats_the_variable(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "aten")
    assert run(backend="cpu").backend == "cpu"


def test_the_variable_falls_back_where_its_backend_refuses_and_says_why(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "triton")
    plan = run()
    assert plan.backend == "cpu"
    assert plan.refusals["triton"] == "runs on cuda tensors, not cpu"


@pytest.mark.parametrize("value", ["", "auto"])
def test_the_variable_may_ask_for_nothing(value, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", value)
    assert run().backend == "cpu"


def test_a_misspelt_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "atne")
    with pytest.raises(ValueError, match="'atne'; did you mean aten"):
        run()


# ---- what is kept


def test_calls_are_counted_by_problem():
    for _ in range(3):
        run()
    run(x=torch.randn(3, 8, 6, 6).contiguous(memory_format=torch.channels_last))
    assert sorted(plan.calls for plan in ops.CONV_BN_ACT.plans()) == [1, 3]
    assert ops.CONV_BN_ACT.last_plan().problem.spec.n == 3


def test_the_second_call_plans_nothing(monkeypatch):
    first = run()
    monkeypatch.setattr(table, "plan", lambda *_: pytest.fail("planned again"))
    monkeypatch.setattr(ops.CONV_BN_ACT, "check_args", lambda *_: pytest.fail("checked again"))
    assert run() is first


DIFFERENCES = {
    "x-shape": {"x": torch.randn(2, 8, 7, 6).contiguous(memory_format=torch.channels_last)},
    "x-layout": {"x": torch.randn(2, 8, 6, 6)},
    "x-dtype": {
        "x": torch.randn(2, 8, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(12, 8, 3, 3).bfloat16(),
    },
    "weight-shape": {"weight": torch.randn(12, 8, 1, 3)},
    "weight-layout": {
        "weight": torch.randn(12, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    },
    "residual": {"residual": torch.randn(2, 12, 6, 6)},
    "statistics": {"mean": torch.zeros(12), "var": torch.ones(12)},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (2, 1)},
    "dilation": {"dilation": (1, 2)},
    "groups": {"groups": 2, "weight": torch.randn(12, 4, 3, 3)},
    "activation": {"activation": "none"},
    "backend": {"backend": "aten"},
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_makes_another_problem_makes_another_plan(name):
    assert run() is not run(**DIFFERENCES[name])
    assert len(ops.CONV_BN_ACT.plans()) == 2


def test_values_and_eps_make_no_other_plan():
    assert run() is run(eps=0.1, scale=torch.randn(12), weight=torch.randn(12, 8, 3, 3))


def test_switching_onednn_off_is_noticed():
    assert run().backend == "cpu"
    with torch.backends.mkldnn.flags(enabled=False):
        assert run().backend == "aten"
    assert run().backend == "cpu"


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(_op, "MAX_PLANS", 4)
    for size in range(3, 13):
        x = torch.randn(1, 8, size, 6).contiguous(memory_format=torch.channels_last)
        assert run(x=x).problem.spec.h == size
        assert len(ops.CONV_BN_ACT.plans()) <= 4


def test_a_refused_call_is_not_kept():
    for _ in range(2):
        with pytest.raises(ops.ArgumentError):
            run(groups=3)
    assert ops.CONV_BN_ACT.plans() == []


def test_the_last_plan_is_each_threads_own():
    from concurrent.futures import ThreadPoolExecutor

    mine = run()
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        theirs = pool.submit(lambda: torch.set_grad_enabled(False) and run(activation="none"))
        theirs.result()
    assert ops.CONV_BN_ACT.last_plan() is mine


# ---- add_relu


def test_add_relu_takes_the_fused_path_only_for_dense_equal_layouts():
    dense = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    pairs = [(dense, dense), (dense, dense.contiguous()), (dense[:, ::2], dense[:, ::2])]
    pairs += [(dense.double(), dense.double())]
    plans = [ops.ADD_RELU.plan_of(ops.ADD_RELU.Call(*pair)) for pair in pairs]
    assert [plan.backend for plan in plans] == ["cpu", "aten", "aten", "aten"]
    assert "not dense" in plans[1].refusals["cpu"] and "float64" in plans[3].refusals["cpu"]


def test_the_variable_asks_for_add_relus_backend_too(monkeypatch):
    monkeypatch.setattr(ops.ADD_RELU, "_plans", {})
    monkeypatch.setenv("RESNET_FAST_BACKEND", "aten")
    x = torch.randn(3, 7)
    assert torch.equal(ops.add_relu(x, -2 * x), aten.add_relu(x, -2 * x))
    plan = ops.ADD_RELU.last_plan()
    assert (plan.backend, plan.calls, plan.why) == ("aten", 1, "asked for")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "atne")
    with pytest.raises(ValueError, match="'atne'; did you mean aten"):
        ops.add_relu(x[:2], x[:2])


def test_a_second_addition_plans_nothing(monkeypatch):
    x = torch.randn(3, 7)
    ops.add_relu(x, x)
    monkeypatch.setattr(table, "plan", lambda *_: pytest.fail("planned again"))
    ops.add_relu(x + 1, x)
