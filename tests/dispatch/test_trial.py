# SPDX-License-Identifier: Apache-2.0
"""What is missing is asked once, and a backend whose first launch fails makes way for the next."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import resnet_fast
from resnet_fast import ops
from resnet_fast.dispatch import table
from resnet_fast.dispatch.problem import Runner
from tests.support import cases

NO_COMPILER = RuntimeError("Failed to find C compiler.\nPlease specify via CC.")
SPEC = cases.ODD["k-24"]


class Gpu:
    """The backends `cuda` and `triton` as rows that take the CPU's tensors.

    Args:
        errors: by name, what a launch raises; without one it computes as aten does.
        launched: the names of those whose launch was tried, in order.
    """

    def __init__(self):
        self.errors, self.launched = {}, []

    def run(self, name):
        self.launched.append(name)
        if name in self.errors:
            raise self.errors[name]

    def rows(self):
        """The table, its rows of the two broken where `errors` says so."""
        for row in table.ROWS:
            if row.backend not in ("cuda", "triton"):
                yield row
                continue
            build = self.build(row.backend, table.row_of(row.op, "aten").build)
            yield replace(row, device="cpu", missing=nothing, refusal=nothing, family=None,
                          build=build)  # fmt: skip

    def build(self, name, correct):
        def build(problem, tile=None):
            bind = correct(problem)

            def guarded(*tensors):
                runner = bind(*tensors)

                def function(*arguments):
                    self.run(name)
                    return runner(*arguments)

                return Runner(function)

            return guarded

        return build


def nothing(*_):
    return None


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(table, "ROWS", tuple(gpu.rows()))
    for op in ops.OPS.values():
        monkeypatch.setattr(op, "_plans", {})
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    with torch.inference_mode():
        yield gpu


def call(**changes) -> ops.Call:
    t = cases.conv_tensors(replace(SPEC, dtype="float32"))
    return ops.Call(t.x, t.weight, t.scale, t.shift, t.residual, padding=(1, 1), mean=t.mean,
                    var=t.var)._replace(**changes)  # fmt: skip


def run(asked: ops.Call):
    """The result, the plan and the warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        y = ops.CONV_BN_ACT.overload(*asked)
    return y, ops.CONV_BN_ACT.last_plan(), [str(warning.message) for warning in found]


def test_a_first_launch_that_fails_is_served_by_the_next(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    asked = call()
    y, plan, said = run(asked)
    assert torch.equal(y, ops.CONV_BN_ACT.reference(asked))
    assert plan.backend == "triton" and gpu.launched == ["cuda", "triton"]
    reason = "its first launch failed: RuntimeError: Failed to find C compiler."
    assert plan.refusals["cuda"] == reason and plan.why_fallback() == f"cuda: {reason}"
    assert len(said) == 1 and "'cuda'" in said[0] and "'triton'" in said[0] and reason in said[0]


def test_it_is_not_tried_again(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    asked = call()
    run(asked)
    _, plan, said = run(asked)
    assert gpu.launched == ["cuda", "triton", "triton"] and said == [] and plan.calls == 2


def test_several_may_fail_and_aten_is_left(gpu):
    gpu.errors |= {"cuda": NO_COMPILER, "triton": OSError("no ptxas")}
    asked = call()
    y, plan, said = run(asked)
    assert torch.equal(y, ops.CONV_BN_ACT.reference(asked)) and len(said) == 2
    assert plan.refusals.keys() >= {"cuda", "triton"} and "no ptxas" in plan.refusals["triton"]


def test_a_residual_that_is_written_over_is_still_whole_for_the_next(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    asked = call()
    expected = ops.CONV_BN_ACT.reference(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops.CONV_BN_ACT.inplace(*asked)
    assert torch.equal(asked.residual, expected)


def test_a_later_launch_that_fails_is_an_error(gpu):
    asked = call()
    run(asked)
    gpu.errors["cuda"] = NO_COMPILER
    with pytest.raises(RuntimeError, match="C compiler"):
        run(asked)
    assert ops.CONV_BN_ACT.last_plan().backend == "cuda"


def test_what_was_asked_for_by_name_fails_by_name(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    with pytest.raises(RuntimeError, match="C compiler"):
        run(call(backend="cuda"))
    assert gpu.launched == ["cuda"]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")],
    ids=["torch", "driver"],
)
def test_a_lack_of_memory_is_no_fault_of_the_backend(gpu, error):
    gpu.errors["cuda"] = error
    asked = call()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(asked)
    gpu.errors.clear()
    assert run(asked)[1].backend == "cuda"


def test_a_failure_while_a_graph_is_recorded_is_the_recordings(gpu, monkeypatch):
    gpu.errors["cuda"] = RuntimeError("operation not permitted when stream is capturing")
    asked = call()
    with monkeypatch.context() as recording, pytest.raises(RuntimeError, match="capturing"):
        recording.setattr(torch.cuda, "is_initialized", lambda: True)
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        run(asked)
    gpu.errors.clear()
    assert run(asked)[1].backend == "cuda"


def test_threads_that_fail_together_agree_on_the_next(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    asked = call()
    expected, plan = ops.CONV_BN_ACT.reference(asked), ops.CONV_BN_ACT.plan_of(asked)
    launches = [plan.bind(*asked[1:4], asked.mean, asked.var, asked.eps) for _ in range(4)]
    with warnings.catch_warnings(record=True) as found, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        results = list(pool.map(lambda launch: launch(asked.x, asked.residual), launches))
    assert all(torch.equal(y, expected) for y in results)
    assert plan.backend == "triton" and len(found) == 1


@pytest.mark.parametrize("broken", [("cuda",), ("cuda", "triton")], ids=["one", "both"])
@pytest.mark.filterwarnings("ignore:resnet_fast. backend")
def test_a_model_runs_and_its_report_says_why(gpu, broken):
    """Convolutions, joins and the stem alike, in the first call and by kept programs."""
    gpu.errors |= dict.fromkeys(broken, NO_COMPILER)
    model = resnet_fast.models.resnet18(num_classes=10).eval()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    with resnet_fast.disabled():
        expected = model(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    tried = len(gpu.launched)
    model(x)
    again = gpu.launched[tried:]
    assert set(again) == {"cuda", "triton"} - set(broken)
    rows = list(resnet_fast.report(model))
    assert all("its first launch failed: RuntimeError: Failed to find" in r.reason for r in rows)
    assert not any("cuda" in row.backend for row in rows)


@pytest.mark.filterwarnings("ignore:resnet_fast. backend")
def test_an_addition_is_passed_on_as_well(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    x = torch.randn(2, 8)
    expected = torch.relu(x + x)
    with pytest.warns(UserWarning, match="'cuda' cannot run .*, 'triton' does: its first"):
        assert torch.equal(ops.add_relu(x, x), expected)
    ops.add_relu(x, x)
    assert gpu.launched == ["cuda", "triton", "triton"]
    assert "Failed to find C compiler" in ops.ADD_RELU.last_plan().failed
    gpu.errors["triton"] = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        ops.add_relu(x[:1], x[:1])
    assert ops.ADD_RELU.plan_of(ops.ADD_RELU.Call(x, x)).backend == "triton"


def test_its_gradient_too(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match="'cuda' cannot run .*, 'triton' does: its first"):
        masked = torch.ops.resnet_fast._add_relu_backward(x, x)
    assert torch.equal(masked, x.clamp(min=0)) and gpu.launched == ["cuda", "triton"]


# ---- what is missing


class Driver:
    """Triton's choice of a driver, counted."""

    def __init__(self, error):
        self.error, self.asked = error, 0

    @property
    def active(self):
        self.asked += 1
        if self.error:
            raise self.error


@pytest.fixture
def driver(monkeypatch):
    """driver(error): Triton's, which cannot be loaded for that reason."""
    triton = pytest.importorskip("triton")
    from resnet_fast.kernels import launch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def driver(error):
        found = Driver(error)
        monkeypatch.setattr(triton.runtime, "driver", found)
        launch.driver_fault.cache_clear()
        return found

    yield driver
    launch.driver_fault.cache_clear()


def test_without_a_c_compiler_triton_is_missing_with_the_reason_and_asked_once(driver):
    found = driver(NO_COMPILER)
    reasons = {table.row_of("conv_bn_act", "triton").missing(80) for _ in range(3)}
    assert reasons == {
        "Triton's driver cannot be loaded: RuntimeError: Failed to find C compiler. Please "
        "specify via CC."
    }
    assert found.asked == 1
    assert {row.missing(80) for row in table.ROWS if row.backend == "triton"} == reasons
    assert found.asked == 1


def test_a_driver_that_loads_is_asked_once_as_well(driver):
    found = driver(None)
    row = table.row_of("conv_bn_act", "triton")
    assert row.missing(80) is None is row.missing(80) and found.asked == 1
