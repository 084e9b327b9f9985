# SPDX-License-Identifier: Apache-2.0
"""Cases come from the models, real providers agree, bad input is refused before any work."""

from __future__ import annotations

import copy
import functools
import itertools
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fast import _hardware, cli, ops
from resnet_fast.benchmarking import cases, command, formulas, plan, providers, rows, suite
from resnet_fast.benchmarking.cases import ModelCase, OpCase
from resnet_fast.benchmarking.suite import Request
from resnet_fast.measuring import clock as clocks
from resnet_fast.measuring import cudnn, peers, protocol
from resnet_fast.measuring import machine as environments
from resnet_fast.measuring.peers import ModelWork, Provider
from resnet_fast.measuring.steadiness import Others
from resnet_fast.profiling.roofline import Roofline
from resnet_fast.spec import ConvSpec, TileConfig
from tests.benchmarking.fakes import ENVIRONMENT, FakeClock
from tests.benchmarking.fakes import row as made_up

SMALL = ConvSpec(2, 9, 7, 8, 16, 3, 3, padding=(1, 1), dtype="float32", norm=True, precision="ieee")
JOIN = ConvSpec(2, 18, 14, 24, 16, 1, 1, (2, 2), dtype="float32", activation="none", norm=True)
ROOF = Roofline("a GPU", 1e3, 1e3, "specified")
STEM = replace(SMALL, h=33, w=31, c=3, r=7, s=7, stride=(2, 2), padding=(3, 3))
SMALL_CASES = {
    "conv": OpCase("conv_bn_act", SMALL, "", "float32"),
    "residual": OpCase("conv_bn_act", replace(SMALL, residual=True), "", "float32"),
    "linear": OpCase("conv_bn_act", replace(SMALL, activation="none"), "", "float32"),
    "bfloat16": OpCase("conv_bn_act", replace(SMALL, dtype="bfloat16"), "", "bfloat16"),
    "add": OpCase("add_relu", SMALL, "", "float32"),
    "join": OpCase(ops.CONV_BN_JOIN.name, SMALL, "", "float32", JOIN),
    "stem": OpCase("stem_pool", STEM, "", "float32"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine threads that wait for each other make small work slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_convolution_of_the_model_is_a_case(name):
    """Against the modules themselves, whose shapes a forward hook sees."""
    from resnet_fast import models

    model, seen = models.get_model(name).eval(), set()

    def note(module, args, out):
        x = args[0]
        geometry = (module.kernel_size, module.stride)
        seen.add((tuple(x.shape[1:]), module.out_channels, *geometry))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    specs = [c.spec for c in cases.op_cases([name], [1], ["float32"], "cpu")
             if c.op == "conv_bn_act"]  # fmt: skip
    found = {((s.c, s.h, s.w), s.k, (s.r, s.s), s.stride) for s in specs}
    assert found == seen
    assert len(specs) == len(set(specs))


def test_roles_of_the_convolutions():
    listed = cases.distinct_ops(("resnet18",))
    by_layer = {case.where: case for case in listed if case.op == "conv_bn_act"}
    first = by_layer["resnet18.layer1.0.conv2 and 1 more"].spec
    assert first.residual and first.activation == "relu"
    shortcut = by_layer["resnet18.layer2.0.downsample"].spec
    assert shortcut.activation == "none" and not shortcut.residual and shortcut.stride == (2, 2)
    joins = [case for case in listed if case.op == ops.CONV_BN_JOIN.name]
    assert len(joins) == 3 and all(j.spec.m == j.projection.m for j in joins)
    assert sum(case.layers for case in listed if case.op == "add_relu") == 8


def test_bytes_and_flops_by_hand():
    add = SMALL_CASES["add"]
    assert (add.flops, add.bytes) == (0, 3 * 2 * 9 * 7 * 16 * 4)
    join = SMALL_CASES["join"]
    m = 2 * 9 * 7
    assert join.flops == 2 * m * 16 * (72 + 24)
    tensors = (
        m * 8 + 16 * 72 + m * 24 + 16 * 24 + m * 16
    )  # h, weights, x without what is skipped, y
    assert join.bytes == tensors * 4 + 2 * 8 * 16
    stem = SMALL_CASES["stem"]
    assert stem.bytes == (2 * 33 * 31 * 3 + 16 * 147 + 2 * 9 * 8 * 16) * 4 + 8 * 16


def test_other_batches_and_dtypes():
    listed = cases.op_cases(["resnet18"], [1, 8], ["float32", "tf32", "float16"], "cuda")
    assert {(c.batch, c.dtype, c.spec.dtype, c.spec.precision) for c in listed} == {
        (b, d, e, p)
        for b in (1, 8)
        for d, e, p in (
            ("float32", "float32", "ieee"), ("tf32", "float32", "tf32"),
            ("float16", "float16", "ieee"),
        )
    }  # fmt: skip
    assert {c.dtype for c in cases.op_cases(["resnet18"], [1], cases.DTYPES, "cpu")} == {
        "float32", "float16", "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("name", SMALL_CASES)
def test_the_real_providers_of_ops_agree_and_are_timed(name):
    case = SMALL_CASES[name]
    wanted = [p.name for p in providers.providers_of("ops") if p.name != "compile"]
    request = Request(device="cpu", seconds=0.01, providers=wanted)
    found, _, interrupted = suite.measure_case(case, request, clocks.Clock(), ENVIRONMENT)
    assert not interrupted
    by_name = {row.provider: row for row in found}
    for provider in ("aten", "resnet_fast"):
        row = by_name[provider]
        assert row.status == protocol.MEASURED, row.reason
        assert row.wall_p20_ms <= row.wall_ms <= row.wall_p80_ms <= row.wall_p99_ms
        assert row.error <= row.error_limit and "L2" in row.inputs
        assert row.device_ms is None
    if case.op != "add_relu":
        assert by_name["aten-folded"].status == protocol.MEASURED
        assert by_name["resnet_fast-aten"].backend == "aten"
        assert by_name["resnet_fast"].backend in ("cpu", "aten")
        assert by_name["resnet_fast-triton"].status == protocol.THREW
        assert "runs on cuda" in by_name["resnet_fast-triton"].reason


@pytest.mark.parametrize("name", ["conv", "join", "stem"])
def test_a_row_tells_the_backend_and_the_tile_of_the_last_plan(name, monkeypatch):
    case = SMALL_CASES[name]
    plan = types.SimpleNamespace(backend="cuda", tile=TileConfig(64, 32, 64, 4, 4, SPLIT_K=2))
    monkeypatch.setattr(ops.OPS[case.op], "last_plan", lambda: plan)
    request = Request(device="cpu", seconds=0.01, providers=["resnet_fast"])
    (row,), *_ = suite.measure_case(case, request, clocks.Clock(), ENVIRONMENT)
    assert (row.backend, row.tile) == ("cuda", "64x32x64 stages 4 warps 4 split 2")


def small_model(monkeypatch):
    """Model cases run on a ResNet-18 with two classes of small photographs."""
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    from resnet_fast import models

    ours = models.resnet18(num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        exact = copy.deepcopy(theirs).double()(pixels.double())
    pictures = types.SimpleNamespace(names=["a", "b"], pixels=pixels)
    monkeypatch.setattr(suite, "_pictures", lambda: pictures)
    monkeypatch.setattr(suite, "_pair", lambda name: (theirs, ours, exact))
    return theirs


def test_the_real_providers_of_models_agree_and_are_timed(monkeypatch):
    small_model(monkeypatch)
    able = ["torchvision-contiguous", "torchvision-channels_last", "resnet_fast", "resnet_fast-cpu"]
    wanted = [*able, "torch-tensorrt", "cudnn-fused", "resnet_fast-cuda-graph"]
    request = Request(device="cpu", seconds=0.01, providers=wanted)
    case = ModelCase("resnet18", 3, "float32")
    found, left_out, _ = suite.measure_case(case, request, clocks.Clock(), ENVIRONMENT)
    by_name = {row.provider: row for row in found}
    assert list(by_name) == [name for name in providers.names() if name in wanted]
    for name in able:
        row = by_name[name]
        assert row.status == protocol.MEASURED, row.reason
        assert row.images_per_s == pytest.approx(3e3 / row.wall_ms)
    assert "9 of 9 blocks fused" in by_name["resnet_fast"].backend
    for name in wanted[len(able) :]:
        assert by_name[name].status == protocol.MISSING and by_name[name].reason, name
    assert left_out == {}


def test_who_was_not_asked_is_told_with_the_reason():
    case = ModelCase("resnet18", 1, "float32")
    asked, left_out = providers.choose(case, "cpu", (), cases.QUICK)
    names = {provider.name for provider in asked}
    assert "resnet_fast" in names and "torchvision-cudnn-benchmark" not in names
    assert left_out["torchvision-cudnn-benchmark"] == "runs on cuda, this is cpu"
    assert "without --quick" in left_out["onnxruntime"]
    assert "--full" in left_out["compile-max-autotune"]
    assert "onnxruntime" not in providers.choose(case, "cpu", (), cases.USUAL)[1]
    assert "--full" in providers.choose(case, "cpu", (), cases.USUAL)[1]["compile-max-autotune"]
    assert "compile-max-autotune" not in providers.choose(case, "cpu", (), cases.FULL)[1]
    assert names.isdisjoint(left_out)
    assert names | set(left_out) == {p.name for p in providers.providers_of("models")}


def fake_suite(monkeypatch, *fakes: Provider):
    """The suite with made-up providers, for the identity, on a fake clock."""
    clock = FakeClock()
    x = torch.ones(1, 2)
    shared = protocol.Case([(x,), (x + 1,)], x.double(), x)
    monkeypatch.setattr(suite, "_model", lambda case, request: (shared, None))
    monkeypatch.setattr(suite.clocks, "clock_of", lambda place: clock)
    monkeypatch.setattr(providers, "providers_of", lambda suite: fakes)
    return clock


def identity(clock_of):
    def build(work):
        def call(x):
            clock_of().seconds += 1e-3
            return x

        return protocol.Entrant(call)

    return build


def test_one_row_per_case_and_provider_whatever_happens(monkeypatch):
    box = {}

    def broken(work):
        raise RuntimeError("no such library")

    fakes = (Provider("good", "", identity(lambda: box["clock"])), Provider("bad", "", broken))
    box["clock"] = fake_suite(monkeypatch, *fakes)
    request = Request(suites=("models",), device="cpu", models=["resnet18"], batches=[1, 8],
                      dtypes=["float32"], seconds=0.01)  # fmt: skip
    kept = []
    results = suite.run(request, keep=lambda r: kept.append(len(r.rows)))
    assert [(r.batch, r.provider, r.status) for r in results.rows] == [
        (1, "good", protocol.MEASURED), (1, "bad", protocol.THREW),
        (8, "good", protocol.MEASURED), (8, "bad", protocol.THREW),
    ]  # fmt: skip
    assert kept == [2, 4] and results.complete


def test_quick_keeps_to_its_time_and_says_what_it_left_out(monkeypatch):
    """On a machine so slow that a call takes ten seconds."""
    box = {}

    def build(work):
        def call(x):
            box["clock"].seconds += 10
            return x

        return protocol.Entrant(call)

    box["clock"] = fake_suite(monkeypatch, Provider("slow", "", build))
    request = Request(suites=("models",), device="cpu", extent="quick", models=["resnet18"])
    results = suite.run(request)
    assert len(results.rows) == 4 and results.complete
    assert {row.status for row in results.rows} <= {protocol.LEFT_OUT, protocol.MEASURED}
    assert results.rows[-1].status == protocol.LEFT_OUT
    assert protocol.TIME_IS_UP in results.rows[-1].reason
    assert box["clock"].seconds < suite.QUICK_SECONDS["models"] + 100
    told = command.untimed(results, request)
    late = sum(row.status == protocol.LEFT_OUT for row in results.rows)
    assert told[0].startswith(f"{late} of 4 rows have no time") and "without --quick" in told[-1]


SKIPS = {
    "threw": (RuntimeError("no such library"), (), cli.SKIPPED, "1 threw: RuntimeError: no such"),
    "memory": (MemoryError("not enough memory"), (), cli.SKIPPED, "too little memory"),
    "not installed": (protocol.Missing("pip install it"), (), cli.AGREES, ""),
    "named": (
        protocol.Missing("get it[all]"),
        ("openvino",),
        cli.SKIPPED,
        "1 missing: get it[all]",
    ),
    "by rule": (protocol.LeftOut("takes too long"), ("openvino",), cli.AGREES, ""),
}


@pytest.mark.parametrize("name", SKIPS)
def test_rows_that_lost_their_time_are_told_by_text_and_status(name, monkeypatch, tmp_path, capsys):
    error, named, status, text = SKIPS[name]
    box = {}

    def broken(work):
        raise error

    good = Provider("resnet_fast", "", identity(lambda: box["clock"]))
    box["clock"] = fake_suite(monkeypatch, good, Provider("openvino", "", broken))
    wanted = ["--providers", "resnet_fast", *named] if named else []
    arguments = ["bench", "models", "--device", "cpu", "--models", "resnet18", "--batch", "1",
                 "--dtype", "float32", "--seconds", "0.01", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*arguments, *wanted]) == status
    said = capsys.readouterr().err
    assert ("1 of 2 rows have no time" in said) == bool(text) and text in said


def on(device: str, **asked) -> Request:
    """A request of a device that need not be there."""
    request = Request(device="cpu", **asked)
    object.__setattr__(request, "place", torch.device(device))
    return request


def test_a_full_run_is_asked_for_and_the_usual_one_takes_minutes():
    usual, full = on("cuda"), on("cuda", extent="full")
    assert len(full.cases("models")) >= 10 * 5 * 4 and len(full.cases("ops")) > 800
    assert 5 * 60 < plan.estimate(usual) < 45 * 60 < 86400 < plan.estimate(full)
    assert plan.estimate(on("cpu", extent="quick")) <= plan.QUICK_SECONDS["ops"]
    assert re.fullmatch(
        r"\d+ cases, \d+ rows: about \d+ min; all by --full", plan.announced(usual)[0]
    )
    assert re.search(r"about [\d.]+ days$", plan.announced(full)[0])
    assert list(plan.QUICK_SECONDS) == list(cases.SUITES)  # each begins after the one before
    with pytest.raises(ValueError, match="unknown extent 'half'; known are quick, usual, full"):
        Request(device="cpu", extent="half")


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "1 s"), (80, "80 s"), (750, "12 min"), (5400, "1.5 h"), (200000, "2.3 days")],
)
def test_times_are_told_as_people_do(seconds, text):
    assert plan.duration(seconds) == text


def test_what_is_left_follows_from_what_is_done():
    clock = FakeClock()
    one = {"suites": ("models",), "models": ["resnet18"], "dtypes": ["float32"]}
    (case,) = on("cpu", batches=[1], **one).cases("models")
    whole = plan.estimate(on("cpu", batches=[1], **one))
    left = plan.TimeLeft(on("cpu", batches=[1, 1, 1], **one), clock.now)
    assert left.said() == f"about {plan.duration(3 * whole)} left"
    clock.seconds += 4 * whole  # four times as slow as was thought
    left.done(case)
    assert left.said() == f"about {plan.duration(8 * whole)} left"


def test_bench_tells_before_it_starts_how_long_it_takes(monkeypatch, tmp_path, capsys):
    def measure(request, folder, progress):
        assert "about" in capsys.readouterr().err
        return rows.Results(), []

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(plan.steadiness, "busy_now", lambda threads: 0.9)
    assert "too busy to time on" in plan.announced(Request(device="cpu"))[1]
    for words in ([], ["--quick"], ["--full"]):
        assert cli.main(["bench", "--out", str(tmp_path), "--device", "cpu", *words]) == cli.AGREES
    assert cli.main(["bench", "--quick", "--full"]) == cli.BAD_INPUT
    assert "not allowed with" in capsys.readouterr().err


def test_ctrl_c_keeps_rows_and_writes_them(monkeypatch, tmp_path, capsys):
    box, calls = {}, []

    def build(work):
        calls.append(work)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return identity(lambda: box["clock"])(work)

    box["clock"] = fake_suite(monkeypatch, Provider("good", "", build))
    arguments = ["bench", "models", "--device", "cpu", "--models", "resnet18", "--batch", "1", "8",
                 "--dtype", "float32", "--seconds", "0.01", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(arguments) == cli.INTERRUPTED
    kept = rows.read(tmp_path)
    assert [row.status for row in kept.rows] == [protocol.MEASURED, protocol.INTERRUPTED]
    assert not kept.complete
    assert "interrupted" in capsys.readouterr().out


def test_too_little_memory_for_a_batch_is_said_and_the_rest_go_on(monkeypatch):
    box = {}
    box["clock"] = fake_suite(monkeypatch, Provider("good", "", identity(lambda: box["clock"])))
    need = [suite.needed_bytes(ModelCase("resnet18", batch, "float32")) for batch in (1, 256)]
    assert need[0] < 1e9 < 2e9 < need[1]
    monkeypatch.setattr(_hardware, "free_bytes", lambda place: 1_500_000_000)
    request = Request(suites=("models",), device="cpu", models=["resnet18"], batches=[256, 1],
                      dtypes=["float32"], seconds=0.01)  # fmt: skip
    big, small = suite.run(request).rows
    assert big.status == protocol.MEMORY and "1.5 are free" in big.reason and big.wall_ms is None
    assert small.status == protocol.MEASURED


UNKNOWN = {
    "provider": (["--providers", "nobody"], "resnet_fast-cuda-graph"),
    "model": (["--models", "resnet19"], "wide_resnet101_2"),
    "dtype": (["--dtype", "int3"], "bfloat16"),
    "device": (["--device", "abacus"], "known here are auto, cpu"),
    "not-waited-for": (["--device", "meta"], "nothing is timed on meta; known here are auto, cpu"),
    "seconds": (["--seconds", "nan"], "seconds must be positive"),
    "of-another-suite": (["ops", "--providers", "openvino"], "known are aten, "),
    "tf32": (["--dtype", "tf32", "--device", "cpu"], "a GPU's way"),
    "batch": (["--batch", "0"], "positive"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_list_the_known_ones_before_any_work(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "measure", lambda *args: pytest.fail("work was begun"))
    arguments, text = UNKNOWN[name]
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == cli.BAD_INPUT
    assert text in capsys.readouterr().err


def test_a_suite_without_a_named_provider_is_not_begun(monkeypatch):
    """Inputs and references of models take long, and nobody would run them."""
    seen = []

    def measure_case(case, *args):
        seen.append(type(case))
        return [], {}, False

    monkeypatch.setattr(suite, "measure_case", measure_case)
    some = {"models": ["resnet18"], "batches": [1], "dtypes": ["float32"], "device": "cpu"}
    suite.run(Request(providers=["aten"], **some))
    assert set(seen) == {OpCase}
    with pytest.raises(ValueError, match=r"no provider of ops is named; known are aten, "):
        Request(suites=["ops"], providers=["openvino"], **some)


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_an_unwritable_directory_is_refused_before_any_work(kind, monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(suite, "measure_case", lambda *args: asked.append(args))
    file = tmp_path / "file"
    file.write_text("")
    folder = {"a file": file, "below a file": file / "results", "read-only": Path("/proc/results")}
    if kind == "read-only" and not Path("/proc").is_dir():
        pytest.skip("no /proc, which nobody may write to")
    assert cli.main(["bench", "--out", str(folder[kind])]) == cli.BAD_INPUT
    assert "cannot be written" in capsys.readouterr().err and asked == []


def test_compare_says_by_its_status_whether_something_is_slower(tmp_path, capsys):
    from tests.benchmarking.test_rows import run

    for name, scale in (("old", {}), ("same", {}), ("slow", {"resnet_fast": 1.3})):
        (tmp_path / name).mkdir()
        rows.write(run(scale, seed=3), tmp_path / name)
    old, same, slow = (str(tmp_path / name) for name in ("old", "same", "slow"))
    assert cli.main(["bench", "--compare", old, same]) == cli.AGREES
    assert "6 in common, 6 the same" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", old, slow]) == cli.DISAGREES
    assert "slower" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", old, str(tmp_path / "none")]) == cli.BAD_INPUT


def test_compare_says_what_the_runs_have_not_in_common(tmp_path, capsys):
    for name in ("old", "new", "other"):
        (tmp_path / name).mkdir()
    old, new, other = (tmp_path / name for name in ("old", "new", "other"))
    rows.write(rows.Results(rows=[made_up(), made_up("aten")]), old)
    elsewhere = replace(ENVIRONMENT, device="Another Processor")
    rows.write(rows.Results(rows=[made_up(environment=elsewhere)]), new)
    rows.write(rows.Results(rows=[made_up(batch=99)]), other)
    assert cli.main(["bench", "--compare", str(old), str(new)]) == cli.AGREES
    printed = capsys.readouterr().out
    assert "device differs: old Test Processor, new Another Processor" in printed
    assert "1 of the old run's times have no row" in printed
    assert cli.main(["bench", "--compare", str(old), str(other)]) == cli.BAD_INPUT
    assert "in common" in capsys.readouterr().err


def test_cudnns_fused_model_is_the_same_function(monkeypatch):
    """Its calls exist on GPUs only: here they are played by their definitions."""
    play_cudnn(monkeypatch)
    import torchvision

    for build in (torchvision.models.resnet18, torchvision.models.resnet50):
        model = build(num_classes=5).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        x = torch.randn(1, 3, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(cudnn.CudnnFused(model)(x), model(x), rtol=1e-3, atol=1e-4)


def play_cudnn(monkeypatch):
    """cuDNN's fused calls, which exist on GPUs only, by their definitions."""
    import torch.nn.functional as F

    def relu(x, w, b, *geometry):
        assert x.shape[1] > 3, "the stem, which cuDNN's fused call makes 17 times slower"
        return F.relu(F.conv2d(x, w, b, *geometry))

    def add_relu(x, w, z, alpha, b, *geometry):
        return F.relu(F.conv2d(x, w, b, *geometry) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)


@pytest.mark.parametrize("name", ["conv", "residual", "linear", "bfloat16"])
def test_cudnns_fused_op_is_the_same_function(name, monkeypatch):
    play_cudnn(monkeypatch)
    monkeypatch.setattr(cudnn, "check_available", lambda device: None)
    request = Request(device="cpu", seconds=0.01, providers=["aten", "cudnn-fused"])
    found, *_ = suite.measure_case(SMALL_CASES[name], request, clocks.Clock(), ENVIRONMENT)
    row = found[-1]
    assert row.provider == "cudnn-fused"
    assert row.status == (protocol.LEFT_OUT if name == "linear" else protocol.MEASURED), row.reason


def test_cudnn_benchmark_is_on_within_the_call_and_off_after_it():
    before = torch.backends.cudnn.benchmark
    model = nn.Identity()
    work = ModelWork(model, model, torch.zeros(1, 3, 8, 8))
    for name, value in (("torchvision-cudnn-benchmark", True), (providers.EAGER["models"], False)):
        (row,) = (p for p in peers.MODEL_PROVIDERS if p.name == name)
        with row.build(work).around():
            assert torch.backends.cudnn.benchmark is value and torch.is_inference_mode_enabled()
        assert torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize("dtype, value", [("tf32", "tf32"), ("float32", "ieee")])
def test_float32_on_a_gpu_is_multiplied_as_the_case_says(dtype, value, monkeypatch):
    def flags():
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return cudnn.allow_tf32, matmul.allow_tf32, ops.precision()

    before = flags()
    asked = []
    monkeypatch.setattr(suite, "roofline_of", lambda *a: asked.append(ops.precision()) or ROOF)
    with suite._precision(dtype, torch.device("cuda")):
        assert flags() == (value == "tf32", value == "tf32", value)
        # Inductor asks for it, and it throws where the two sets of flags disagree.
        assert torch.get_float32_matmul_precision() == {"tf32": "high", "ieee": "highest"}[value]
    assert flags() == before
    timed = made_up("aten", suite="ops", dtype=dtype, flops=10**9)
    suite.roofs_of([timed], torch.device("cuda"), lambda text: None)
    assert asked == [value] and flags() == before


def test_compilers_are_asked_for_what_their_names_say(monkeypatch):
    asked = []

    def compile(model, **options):
        asked.append(options["mode"])
        return model

    monkeypatch.setattr(torch, "compile", compile)
    model = nn.Identity()
    work = ModelWork(model, model, torch.zeros(1, 3, 8, 8))
    (tuned,) = (p for p in peers.MODEL_PROVIDERS if p.name == "compile-max-autotune")
    assert tuned.build(work).graphable  # on a CPU it is no graph
    asked.clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    built = {p.name: p.build(work) for p in peers.MODEL_PROVIDERS if "compile" in p.name}
    assert asked == [None, "reduce-overhead", "max-autotune"]
    assert [c.graphable for c in built.values()] == [True, False, False]  # they are graphs already
    with built["compile"].around():
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_model_is_compiled_once_whoever_else_is_compiled(monkeypatch):
    """And asks for freezing only then: later calls are the compiled model's alone."""
    from torch._inductor import config

    compiled, ran = [], []

    def backend(graph, inputs):
        compiled.append(config.freezing)

        def run(*args):
            ran.append(config.freezing)
            return graph.forward(*args)

        return run

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    x = torch.zeros(1, 3, 5, 5)
    with torch.no_grad():
        first = peers.compiled(nn.Conv2d(3, 4, 1).eval())
        first(x), first(x)
        second = peers.compiled(nn.Conv2d(3, 4, 1).eval())
        second(x), first(x), second(x)
    assert compiled == [True, True] and ran == [True, False, True, False, False]


def test_who_does_not_search_has_a_thread_of_its_own(monkeypatch):
    """torch keeps a convolution's plan per thread, whichever flag it was found under."""
    gpu, seen = torch.device("cuda"), []
    case = SMALL_CASES["conv"]
    op = providers.OpWork(case, formulas.module_of(case), gpu)
    built = {p.name: p.build(op) for p in providers.OP_PROVIDERS if "aten" in p.name}
    assert {name: c.own_thread for name, c in built.items()} == {
        "aten": True, "aten-cudnn-benchmark": False, "aten-folded": False,
    }  # fmt: skip
    assert {p.name: p.build(replace(op, device=torch.device("cpu"))).own_thread
            for p in providers.OP_PROVIDERS if p.name == "aten"} == {"aten": False}  # fmt: skip
    for name, candidate in built.items():
        with candidate.around():
            assert torch.backends.cudnn.benchmark == (name != "aten")

    def material(*_):
        seen.append(torch.backends.cudnn.benchmark)
        raise MemoryError("not enough memory")

    before = torch.backends.cudnn.benchmark
    monkeypatch.setattr(suite, "_op", material)
    suite.measure_case(case, Request(device="cpu"), clocks.Clock(), ENVIRONMENT)
    assert seen == [True] and torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize("dtype, off", [("tf32", False), ("float32", True)])
def test_tensorrt_multiplies_float32_as_the_case_says(dtype, off, monkeypatch):
    asked = {}
    fake = types.SimpleNamespace(compile=lambda model, **how: asked.update(how))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    example = types.SimpleNamespace(device=torch.device("cuda"))
    with suite._precision(dtype, torch.device("cuda")):
        peers.torch_tensorrt_call(nn.Identity(), example)
    assert asked["disable_tf32"] is off and asked["use_explicit_typing"]


def test_our_cuda_graph_is_recorded_under_the_protocols_mode(monkeypatch):
    import resnet_fast

    seen = {}

    def cuda_graph(model, **options):
        seen.update(options)
        return model

    monkeypatch.setattr(resnet_fast, "cuda_graph", cuda_graph)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = nn.Identity()
    work = ModelWork(model, model, torch.zeros(1, 3, 8, 8))
    candidate = peers._ours_graph(work)
    assert seen == {"clone": False} and not candidate.graphable


@pytest.mark.parametrize("name", ["conv", "residual", "join", "stem"])
def test_folding_keeps_the_function(name):
    case = SMALL_CASES[name]
    module = formulas.module_of(case)
    inputs = [torch.randn(shape) for shape in formulas.input_shapes(case)]
    with torch.inference_mode():
        folded = formulas.folded(module)(*(t.clone() for t in inputs))
        torch.testing.assert_close(folded, module(*inputs), rtol=1e-4, atol=1e-5)


def test_no_share_of_the_roofline_exceeds_it(monkeypatch):
    """A row that is faster than the ceilings raises them for all; models have no share."""
    low = Roofline("CPU", 0.001, 1.0, "measured")
    monkeypatch.setattr(suite, "roofline_of", lambda place, dtype, progress: low)
    op = {"suite": "ops", "flops": 10**9, "bytes": 10**6}
    found = [made_up(ms=10, **op), made_up("aten", ms=40, **op), made_up()]
    roofs = suite.roofs_of(found, torch.device("cpu"), lambda text: None)
    fast, slow, model = suite.with_shares(found, roofs)
    assert fast.roof_share == pytest.approx(1) and slow.roof_share == pytest.approx(0.25)
    assert fast.bound == "arithmetic" and model.roof_share is None
    with pytest.raises(AssertionError, match="of its roofline"):
        suite.with_shares(found, {"float32": low})


def test_inputs_walk_past_the_second_level_cache(monkeypatch):
    monkeypatch.setattr(clocks, "cache_bytes", lambda: (4 << 20, 400 << 20))
    count, text = suite.rotation(1 << 20, torch.device("cpu"))
    assert count == 9 and "2.2 x L2" in text and "0.02 x last-level" in text
    assert suite.rotation(1 << 10, torch.device("cpu"))[0] == suite.MAX_SETS
    assert suite.rotation(200 << 20, torch.device("cpu"))[0] == 2
    assert "flushed" in suite.rotation(1, torch.device("cuda"))[1]


def test_a_gpu_is_asked_for_by_its_identity(monkeypatch):
    """Not by torch's number, which CUDA_VISIBLE_DEVICES changes."""
    asked = []
    facts = types.SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(environments, "_said", lambda *words: asked.append(words) or "1980 MHz")
    assert environments.clocks_of(torch.device("cuda:0")) == "1980 MHz"
    assert "--id=GPU-1234-abcd" in asked[0]


def test_a_row_has_the_clocks_of_its_own_rounds(monkeypatch):
    monkeypatch.setattr(suite, "clocks_of", lambda place: "warm")
    request = Request(device="cpu", seconds=0.01, providers=["aten"])
    (row,), *_ = suite.measure_case(SMALL_CASES["add"], request, clocks.Clock(), ENVIRONMENT)
    assert row.environment == replace(ENVIRONMENT, clocks="warm")


def test_a_row_says_whether_its_time_may_be_taken_as_a_fact(monkeypatch):
    """By its rounds, and by what others took of the CPU meanwhile."""
    box = {}

    def scattering(work):
        times = itertools.cycle([1e-3, 2e-3])

        def call(x):
            box["clock"].seconds += next(times) if x[0, 0] == 1 else 1e-3
            return x

        return protocol.Entrant(call)

    fakes = (Provider("good", "", identity(lambda: box["clock"])), Provider("wild", "", scattering))
    box["clock"] = fake_suite(monkeypatch, *fakes)
    request = Request(suites=("models",), device="cpu", models=["resnet18"], batches=[1],
                      dtypes=["float32"], seconds=1.0)  # fmt: skip
    good, wild = suite.run(request).rows
    assert (good.stable, good.busy) == (True, 0.0)
    assert not wild.stable and wild.timing.spread > 1 / 3
    crowd = Others(1, box["clock"].now, lambda: 0.0, lambda: (box["clock"].seconds / 2, 1))
    monkeypatch.setattr(FakeClock, "others", crowd)
    results = suite.run(request)
    assert results.rows[0].busy == pytest.approx(0.5) and not results.rows[0].stable
    assert "too busy" in results.warnings[0]


def test_machine_names_have_no_host():
    def named(device, kind="cpu"):
        return environments.machine_name(replace(ENVIRONMENT, device=device, kind=kind))

    assert named("Intel(R) Xeon(R) Processor") == "cpu-xeon-2-threads"
    assert named("AMD EPYC 9654 96-Core Processor @ 2.4GHz") == "cpu-epyc-9654-96-2-threads"
    assert named("NVIDIA H100 80GB HBM3", "cuda") == "gpu-h100-80gb-hbm3"


def test_memory_of_a_call_is_seen():
    """40 MB that are held only within the call."""
    clock = clocks.Clock()
    found = clock.peak_memory_mb(lambda: torch.ones(10_000_000).sum())
    if found is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 30 < found < 120
