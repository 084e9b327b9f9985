# SPDX-License-Identifier: Apache-2.0
"""One table: what a new backend costs is rows, what a new op costs is its own file and rows.

A backend that only logs, and an op that doubles, are made here and nowhere else. All that asks the
table then knows them: plans, names, order, explanations, measured choices, reports.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import resnet_fast
from resnet_fast import machine, ops, tune
from resnet_fast.dispatch import table, tuning
from resnet_fast.dispatch.heuristics import Candidate, Family
from resnet_fast.dispatch.problem import Problem, binder
from resnet_fast.dispatch.row import Row
from resnet_fast.recording import Work
from resnet_fast.spec import ConvSpec, SumSpec, TileConfig
from resnet_fast.tune import Contender, Timing

GPU = "NVIDIA A100-SXM4-80GB"
SPEC = ConvSpec(2, 8, 8, 16, 16, 3, 3, (1, 1), (1, 1), dtype="float32", norm=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for op in ops.OPS.values():
        monkeypatch.setattr(op, "_plans", {})
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    with torch.no_grad():
        yield


def test_each_op_and_backend_meet_in_one_row():
    assert len({(row.op, row.backend) for row in table.ROWS}) == len(table.ROWS)
    for op in ops.OPS.values():
        last = table.row_of(op.name, "aten")
        assert last.device is None and last.family is None and not last.by_name
        assert op.backends == ["auto", *(row.backend for row in table.of(op.name))]


# ---- a backend that only logs


@pytest.fixture
def logged(monkeypatch):
    """By op, how often it was launched: the backend `log`, first in the table."""
    launched = Counter()

    def row(row):
        def build(problem, tile):
            bind = row.build(problem, tile)

            def bind_and_log(*tensors):
                run = bind(*tensors)

                def kernel(*inputs):
                    launched[problem.op] += 1
                    return run(*inputs)

                return binder(kernel)()

            return bind_and_log

        return replace(row, backend="log", build=build)

    rows = [row(r) for r in table.ROWS if r.backend == "aten"]
    monkeypatch.setattr(table, "ROWS", (*rows, *table.ROWS))
    return launched


def call(**changes) -> ops.Call:
    return ops.CONV_BN_ACT.sample(SPEC, torch.device("cpu"))._replace(**changes)


def test_a_backend_is_planned_named_and_explained(logged, monkeypatch):
    conv = ops.CONV_BN_ACT
    assert torch.equal(conv.overload(*call()), conv.reference(call()))
    assert conv.last_plan().backend == "log" and logged == {"conv_bn_act": 1}
    assert conv.explain("cpu", "float32")[0] == "log"
    assert all("log" in op.backends for op in ops.OPS.values())
    assert {row.backend for row in machine.services() if row.device == "cpu"} == {"log"}
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cpu")
    assert conv.plan_of(call(eps=0.1, stride=(2, 2))).backend == "cpu"
    assert conv.plan_of(call(backend="log")).backend == "log"
    monkeypatch.setenv("RESNET_FAST_BACKEND", "lgo")
    with pytest.raises(ValueError, match="'lgo'; did you mean log"):
        conv.plan_of(call(stride=(3, 3)))


def test_a_model_runs_by_it_and_its_report_says_so(logged):
    model = resnet_fast.models.resnet18(num_classes=10).eval()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 40, 40).to(memory_format=torch.channels_last)
    with resnet_fast.disabled():
        expected = model(x)
    torch.testing.assert_close(model(x), expected)
    assert logged["conv_bn_act"] == 20
    assert {row.backend for row in resnet_fast.report(model)} == {"log"}


@pytest.mark.parametrize("op", ops.OPS)
def test_it_is_measured_for_every_op_and_then_chosen(op, logged, built):
    spec = SumSpec(64, "float32") if op == "add_relu" else ops.OPS[op].typical("float32")
    problem = tune.problem_of(Work(op, spec), 80, GPU)
    assert Contender("log") in tune.candidates(problem)
    tuning.store(GPU, {(op, spec): (tuning.Choice("aten", "", 1.0),)})
    assert table.plan(problem).backend == "aten"
    tuning.store(GPU, {(op, spec): (tuning.Choice("log", "", 1.0),)})
    plan = table.plan(problem)
    assert (plan.backend, plan.why) == ("log", "measured: 1.0 us")


# ---- an op that doubles


@dataclass(frozen=True, slots=True)
class DoubleProblem(Problem):
    op = "double"
    spec: SumSpec
    device: str
    arch: int = 0
    gpu: str = ""
    hardware: object = None

    @classmethod
    def usual(cls, spec, **where):
        return cls(spec, **where)


class DoubleCall(NamedTuple):
    x: Tensor
    times: int = 1
    backend: str = "auto"


class Double(ops.Op):
    name, Call, Problem = "double", DoubleCall, DoubleProblem

    def reference(self, call):
        return call.x * 2**call.times

    def check_args(self, call):
        if call.times < 0:
            raise ops.ArgumentError("times")

    def output(self, call):
        self.check_args(call)
        return torch.empty_like(call.x)

    def key_of(self, call):
        return call.x.shape, call.x.dtype, call.times, call.backend

    def spec_of(self, call):
        return SumSpec(call.x.numel(), str(call.x.dtype).removeprefix("torch."))

    def problem_of(self, call):
        return DoubleProblem(self.spec_of(call), call.x.device.type)

    def layer(self, call):
        return (call.times,)

    def inputs(self, call):
        return (call.x,)

    def typical(self, dtype):
        return SumSpec(64, dtype)

    def sample(self, spec, device):
        return DoubleCall(torch.randn(spec.numel, device=device).to(getattr(torch, spec.dtype)))


DOUBLE = Double()
TILES = (TileConfig(64, 64, 64, 3, 4), TileConfig(32, 64, 64, 3, 4), TileConfig(16, 64, 64, 3, 4))
FAMILY = Family(
    "Toy",
    lambda arch, dtype: TILES,
    lambda spec, tile, gpu: Candidate(tile, None, float(tile.BLOCK_M), "latency"),
    lambda spec, tile, gpu: "too large" if tile.BLOCK_M == 64 else None,
)


@pytest.fixture
def double(monkeypatch):
    """The tiles that its kernel was built with."""
    found = []

    def build(problem, tile):
        found.append(tile)
        return binder(lambda times, x: x * 2**times)

    rows = (
        Row("double", "toy", build, device="cuda", family=FAMILY, fuses=True, tried=True),
        Row("double", "aten", lambda problem, tile: binder(lambda times, x: x.mul(2**times))),
    )
    monkeypatch.setattr(table, "ROWS", (*table.ROWS, *rows))
    monkeypatch.setitem(ops.OPS, "double", DOUBLE)
    monkeypatch.setattr(DOUBLE, "_plans", {})
    return found


def test_an_op_has_schema_plans_gradient_and_explanation(double):
    x = torch.randn(3, 5, requires_grad=True)
    assert str(DOUBLE.overload._schema).endswith(
        'double(Tensor x, int times=1, str backend="auto") -> Tensor'
    )
    with torch.enable_grad():
        y = torch.ops.resnet_fast.double(x, 3)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, 8 * x) and torch.equal(grad, torch.full_like(x, 8))
    assert (DOUBLE.last_plan().backend, DOUBLE.last_plan().calls) == ("aten", 1)
    torch.library.opcheck(DOUBLE.overload, (x.detach(), 2))
    with pytest.raises(ops.ArgumentError):
        torch.ops.resnet_fast.double(x, -1)
    with pytest.raises(ValueError, match=r"'toy' cannot take .*: runs on cuda tensors, not cpu"):
        torch.ops.resnet_fast.double(x, 1, "toy")
    chosen, others = DOUBLE.explain("cpu", "float32")
    assert (chosen, others) == ("aten", {"toy": "runs on cuda tensors, not cpu"})
    assert "double" in {row.op for row in machine.services()}


def test_its_tiles_are_candidates_and_the_best_is_taken(double):
    problem = tune.problem_of(Work("double", SumSpec(64, "float32")), 80, GPU)
    row = table.row_of("double", "toy")
    assert [c.refusal for c in row.candidates(problem)] == ["too large", None, None]
    assert table.plan(problem).tile == TILES[2] and double == [TILES[2]]
    assert DOUBLE.may_fuse("cuda") and not DOUBLE.may_fuse("cpu")
    assert tune.modelled(Work("double", SumSpec(64, "float32")), 90) == {
        Contender("toy", TILES[2]): 16.0, Contender("toy", TILES[1]): 32.0,
    }  # fmt: skip


def test_it_is_measured_kept_and_then_chosen(double):
    work = Work("double", SumSpec(64, "float32"))
    problem = tune.problem_of(work, 80, GPU)
    slow, fast = Contender("toy", TILES[2]), Contender("toy", TILES[1])
    times = {slow: Timing(9, 8.9, 9.1), fast: Timing(3, 2.9, 3.1)}
    result = tune.measure(
        problem, tune.sample(work, torch.device("cpu")), [slow, fast], seconds=0.1,
        timer=lambda functions, seconds: {c: times[c] for c in functions},
    )  # fmt: skip
    assert result.usual == slow and not result.faults
    tuning.store(GPU, {work: result.choices})
    plan = table.plan(problem)
    assert (plan.backend, plan.tile, plan.why) == ("toy", TILES[1], "measured: 3.0 us")
