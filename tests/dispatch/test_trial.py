# SPDX-License-Identifier: Apache-2.0
"""What is missing is asked once, and a backend whose first launch fails makes way for the next."""

from __future__ import annotations

import importlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import resnet_fast
from resnet_fast import ops
from resnet_fast.dispatch import backends, join, stem
from tests.support import cases

op_module = importlib.import_module("resnet_fast.ops.conv_bn_act")  # ops.conv_bn_act is the op
join_module = importlib.import_module("resnet_fast.ops.conv_bn_join")
stem_module = importlib.import_module("resnet_fast.ops.stem_pool")

NO_COMPILER = RuntimeError("Failed to find C compiler.\nPlease specify via CC.")
SPEC = cases.ODD["k-24"]
TABLES = {backends: "BACKENDS", join: "JOIN_BACKENDS"}


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

    def table(self, rows):
        """The rows, the first two of them broken where `errors` says so."""
        aten = rows[-1] if rows[-1].name == "aten" else rows[-2]

        def row(row):
            if row.name not in ("cuda", "triton"):
                return row
            return replace(row, device="cpu", missing=nothing, refusal=nothing,
                           build=self.build(row.name, aten.build), choose=nothing)  # fmt: skip

        return tuple(map(row, rows))

    def build(self, name, correct):
        def build(problem, tile=None):
            bind = correct(problem)

            def guarded(*tensors):
                launch = bind(*tensors)

                def function(*arguments):
                    self.run(name)
                    return launch.function(*arguments)

                return type(launch)(function, *launch.tensors)

            return guarded

        return build

    def stems(self, rows):
        *_, aten = rows

        def build(name):
            def build(asked):
                def run(*arguments):
                    self.run(name)
                    return stem.reference(*arguments)

                return run, None

            return build

        broken = [stem.StemBackend(name, nothing, build(name)) for name in ("cuda", "triton")]
        return (*broken, aten)


def nothing(*_):
    return None


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for module, name in TABLES.items():
        monkeypatch.setattr(module, name, gpu.table(getattr(module, name)))
    monkeypatch.setattr(stem, "BACKENDS", gpu.stems(stem.BACKENDS))
    monkeypatch.setattr(join, "may_be_one_kernel", lambda *_: True)
    monkeypatch.setattr(ops, "has_stem_kernels", lambda device: True)
    for module in (op_module, join_module, stem_module):
        monkeypatch.setattr(module, "_plans", {})
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
        y = ops.conv_bn_act_op(*asked)
    return y, ops.last_plan(), [str(warning.message) for warning in found]


def test_a_first_launch_that_fails_is_served_by_the_next(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    asked = call()
    y, plan, said = run(asked)
    assert torch.equal(y, ops.reference(asked))
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
    assert torch.equal(y, ops.reference(asked)) and len(said) == 2
    assert plan.refusals.keys() >= {"cuda", "triton"} and "no ptxas" in plan.refusals["triton"]


def test_a_residual_that_is_written_over_is_still_whole_for_the_next(gpu):
    gpu.errors["cuda"] = NO_COMPILER
    asked = call()
    expected = ops.reference(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops.conv_bn_act_op_(*asked)
    assert torch.equal(asked.residual, expected)


def test_a_later_launch_that_fails_is_an_error(gpu):
    asked = call()
    run(asked)
    gpu.errors["cuda"] = NO_COMPILER
    with pytest.raises(RuntimeError, match="C compiler"):
        run(asked)
    assert ops.last_plan().backend == "cuda"


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
    expected, plan = ops.reference(asked), ops.plan_of(asked)
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


@pytest.fixture
def add_relu(gpu, monkeypatch):
    """Additions by `gpu`: its two backends, then torch."""
    monkeypatch.setattr(backends, "_add_relu_failed", {})
    monkeypatch.setattr(backends.cuda, "add_relu_missing", nothing)

    def by(name):
        def add(x, y):
            gpu.run(name)
            return torch.relu(x + y)

        return add

    monkeypatch.setattr(backends.cuda, "add_relu", by("cuda"))
    monkeypatch.setattr(backends, "_triton_add_relu", by("triton"))
    backends.explain_add_relu.cache_clear()
    yield ops.add_relu
    backends.explain_add_relu.cache_clear()


def test_an_addition_is_passed_on_as_well(add_relu, gpu):
    gpu.errors["cuda"] = NO_COMPILER
    x = torch.randn(2, 8)
    expected = torch.relu(x + x)
    with pytest.warns(UserWarning, match="'cuda' cannot run add_relu, 'triton' does: its first"):
        assert torch.equal(add_relu(x, x), expected)
    add_relu(x, x)
    assert gpu.launched == ["cuda", "triton", "triton"]
    assert "Failed to find C compiler" in backends.explain_add_relu("cpu", "float32")[1]["cuda"]
    gpu.errors["triton"] = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        add_relu(x, x)
    assert backends.explain_add_relu("cpu", "float32")[0] == "triton"


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
    (row,) = (row for row in backends.BACKENDS if row.name == "triton")
    reasons = {row.missing() for _ in range(3)}
    assert reasons == {
        "Triton's driver cannot be loaded: RuntimeError: Failed to find C compiler. Please "
        "specify via CC."
    }
    assert found.asked == 1
    (row,) = (row for row in join.JOIN_BACKENDS if row.name == "triton")
    assert {row.missing()} == reasons and found.asked == 1


def test_a_driver_that_loads_is_asked_once_as_well(driver):
    found = driver(None)
    (row,) = (row for row in backends.BACKENDS if row.name == "triton")
    assert row.missing() is None is row.missing() and found.asked == 1
