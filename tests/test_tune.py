# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast tune`: only what is right is timed, the fastest is kept and then chosen.

No GPU is needed: the functions and the timer are stand-ins, and the operands lie on the CPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from resnet_fast import _hardware, cli, ops, recording, tune
from resnet_fast.dispatch import heuristics, table, tiles, tuning
from resnet_fast.measuring.steadiness import Timing
from resnet_fast.recording import Work
from resnet_fast.spec import ConvSpec, JoinSpec, StemSpec
from resnet_fast.tune import Contender
from tests.dispatch import conftest
from tests.support import cases, join_cases

# the fixtures of the tests of dispatch: an extension that is there, a folder of its own
extension, cache = conftest.extension, conftest.cache
gpu_is_here, built = conftest.gpu_is_here, conftest.built

GPU = "NVIDIA A100-SXM4-80GB"
SPEC = ConvSpec(2, 7, 7, 64, 64, 3, 3, (1, 1), (1, 1), norm=True)
CONV, JOIN = ops.CONV_BN_ACT.name, ops.CONV_BN_JOIN.name
WORK = Work(CONV, SPEC)
PROBLEM = tune.problem_of(WORK, 80, GPU)
USUAL = Contender("cuda", heuristics.choose(SPEC, 80, tiles.CUDA[ConvSpec]))
TRITON = Contender("triton", heuristics.choose(SPEC, 80, tiles.TRITON[ConvSpec]))
ATEN = Contender("aten")


@pytest.fixture(autouse=True)
def gpu(built, monkeypatch):
    """A GPU, as far as anyone asks."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: GPU)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr("resnet_fast._hardware.gpu_of", lambda device: _hardware.GPUS[80])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)


def exact(contender, problem, call):
    """A right answer, whoever gives it."""
    return lambda: ops.OPS[problem.op].reference(call)


class Clock:
    """A timer that says what it is told, and remembers whom it was asked to time."""

    def __init__(self, times: dict[Contender, float], noise: float = 0.01) -> None:
        self.times, self.noise, self.asked = times, noise, []

    def __call__(self, functions, seconds):
        self.asked += functions
        return {c: timing(self.times.get(c, 100.0), self.noise) for c in functions}


def timing(median: float, noise: float = 0.01) -> Timing:
    return Timing(median, median * (1 - noise), median * (1 + noise))


def measure(found, clock, function_of=exact) -> tune.Result:
    call = tune.sample(WORK, torch.device("cpu"))
    return tune.measure(PROBLEM, call, found, timer=clock, seconds=0.1, function_of=function_of)


# ---- which ops, which candidates


def joined(depth: int) -> dict[str, JoinSpec]:
    return join_cases.resnet_joins(depth, 2, dtype="float16")


@pytest.mark.parametrize("depth", [18, 50])
def test_a_models_ops_are_those_that_it_runs_on_a_gpu(depth):
    """Its stem with the pool, its projection blocks' ends as joins, and all other convolutions."""
    found = recording.works(f"resnet{depth}", [2], ["float16"])
    by_op = Counter()
    for work, count in found.items():
        by_op[work.op] += count
    convs = set(cases.resnet_convs(depth, 2, dtype="float16").values())
    joins = {18: 3, 50: 4}[depth]
    assert by_op == {"stem_pool": 1, JOIN: joins, CONV: {18: 13, 50: 44}[depth]}
    (stem,) = (work.spec for work in found if work.op == "stem_pool")
    assert stem == StemSpec(next(spec for spec in convs if spec.r == 7))
    assert {work.spec for work in found if work.op == JOIN} == set(joined(depth).values())
    assert {work.spec for work in found if work.op == CONV} <= convs


def test_batches_and_dtypes_multiply_and_leave_no_trace():
    before = torch.get_default_dtype()
    found = recording.works("resnet18", [1, 3], ["bfloat16", "float32"])
    specs = [work.spec for work in found if work.op == CONV]
    assert {(s.n, s.dtype) for s in specs} == {
        (n, d) for n in (1, 3) for d in ("bfloat16", "float32")
    }
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize(
    "work",
    [Work(JOIN, joined(50)["layer2"]),
     Work("stem_pool", StemSpec(ConvSpec(2, 64, 64, 3, 64, 7, 7, (2, 2), (3, 3), norm=True)))],
    ids=lambda work: work.op,
)  # fmt: skip
def test_joins_and_stems_are_measured_kept_and_then_chosen(work, monkeypatch):
    """By the same way, their tiles included."""
    problem = tune.problem_of(work, 80, GPU)
    found = tune.candidates(problem)
    assert {contender.backend for contender in found} == {"cuda", "triton", "aten"}
    tried = [contender for contender in found if contender.backend == "triton"][-1]
    clock = Clock({tried: 5.0})
    call = tune.sample(work, torch.device("cpu"))
    result = tune.measure(problem, call, found, timer=clock, seconds=0.1, function_of=exact)
    assert result.work == work and set(clock.asked) == set(found)
    tuning.store(GPU, {work: result.choices})
    plan = table.plan(problem)
    assert (plan.backend, plan.tile, plan.why) == ("triton", tried.tile, "measured: 5.0 us")


def test_candidates_are_a_short_list_of_what_runs_here():
    found = tune.candidates(PROBLEM)
    by_backend = Counter(candidate.backend for candidate in found)
    assert set(by_backend) == {"cuda", "triton", "aten"} and by_backend["aten"] == 1
    assert max(by_backend.values()) <= tune.SHORTLIST
    assert USUAL in found and TRITON in found
    assert len(set(found)) == len(found)


def test_the_usual_choice_is_always_compared_with():
    found = tune.candidates(PROBLEM, ["triton"])
    assert found[0] == USUAL
    assert {candidate.backend for candidate in found[1:]} == {"triton"}


def test_what_refuses_is_no_candidate():
    grouped = tune.problem_of(Work(CONV, replace(SPEC, groups=2)), 80, GPU)
    assert tune.candidates(grouped) == [ATEN]
    stem = tune.problem_of(Work(CONV, replace(SPEC, c=3)), 80, GPU)
    assert {candidate.backend for candidate in tune.candidates(stem)} == {"triton", "aten"}


# ---- only what is right is timed


def test_the_fastest_is_kept_and_then_chosen():
    clock = Clock({USUAL: 20.0, TRITON: 15.0, ATEN: 60.0})
    result = measure([USUAL, TRITON, ATEN], clock)
    assert [choice.backend for choice in result.choices] == ["triton", "cuda", "aten"]
    assert table.explain(PROBLEM)[0] == "cuda"
    tuning.store(GPU, {WORK: result.choices})
    assert table.explain(PROBLEM)[0] == "triton"


def wrong(y):
    y[1, 5, 3, 2] += 1
    return y


FAULTS = {
    "one-value": wrong,
    "nan": lambda y: y.masked_fill_(y == y.max(), float("nan")),
    "shape": lambda y: y[:, :32],
    "unwritten": lambda y: torch.full_like(y, float("nan")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_candidate_gets_no_time(name):
    def bind(candidate, problem, tensors):
        function = exact(candidate, problem, tensors)
        return (lambda: FAULTS[name](function())) if candidate == TRITON else function

    clock = Clock({USUAL: 20.0, TRITON: 1.0, ATEN: 60.0})
    result = measure([TRITON, USUAL, ATEN], clock, bind)
    assert clock.asked == [USUAL, ATEN]
    assert list(result.faults) == [TRITON] and TRITON not in result.timings
    assert [choice.backend for choice in result.choices] == ["cuda", "aten"]


def test_a_candidate_that_fails_is_named_and_the_others_go_on():
    def bind(candidate, problem, tensors):
        if candidate == USUAL:
            raise RuntimeError("out of resources")
        return exact(candidate, problem, tensors)

    result = measure([USUAL, ATEN], Clock({}), bind)
    assert result.faults == {USUAL: "RuntimeError: out of resources"}
    assert [choice.backend for choice in result.choices] == ["aten"]


def test_where_none_is_right_nothing_is_chosen():
    result = measure([USUAL], Clock({}), lambda *_: lambda: torch.zeros(1))
    assert result.choices == () and result.timings == {}


# ---- what follows from times

OTHER = Contender("cuda", replace(USUAL.tile, SPLIT_K=2))


@pytest.mark.parametrize(
    ("usual", "other", "first"),
    [
        pytest.param(timing(20), timing(15), "triton", id="faster"),
        pytest.param(timing(20, 0.001), timing(19.8, 0.001), "cuda", id="one-percent"),
        pytest.param(timing(20, 0.2), timing(17, 0.2), "cuda", id="within-the-noise"),
        pytest.param(timing(20), timing(20), "cuda", id="tie"),
        pytest.param(timing(20), timing(25), "cuda", id="slower"),
    ],
)
def test_another_backend_must_be_faster_beyond_the_noise(usual, other, first):
    choices = tune.choose({TRITON: other, USUAL: usual, ATEN: timing(90)}, USUAL)
    assert choices[0].backend == first and choices[-1].backend == "aten"


def test_another_tile_must_be_too():
    assert USUAL.tile != OTHER.tile
    close = tune.choose({USUAL: timing(20), OTHER: timing(19.9)}, USUAL)
    clear = tune.choose({USUAL: timing(20), OTHER: timing(12)}, USUAL)
    assert [choice.tile for choice in (*close, *clear)] == [str(USUAL.tile), str(OTHER.tile)]
    assert clear[0].microseconds == 12


def test_without_the_usual_choice_the_fastest_is_first():
    choices = tune.choose({ATEN: timing(9), TRITON: timing(8.99)}, USUAL)
    assert [choice.backend for choice in choices] == ["triton", "aten"]


# ---- the command


@pytest.fixture
def device(monkeypatch):
    """A GPU that is timed by a clock: its tensors lie on the CPU, each candidate is right."""
    clock = Clock({})
    sample = tune.sample
    monkeypatch.setattr(tune, "event_timer", lambda device: clock)
    monkeypatch.setattr(tune, "sample", lambda work, _: sample(work, torch.device("cpu")))
    monkeypatch.setattr(tune, "_function_of", exact)
    specs = {SPEC: 2, replace(SPEC, n=1): 1, replace(SPEC, groups=2): 3}
    small = Counter({Work(CONV, spec): count for spec, count in specs.items()})
    monkeypatch.setattr(recording, "works", lambda *_: small)
    return clock


def command(capsys, *arguments):
    status = cli.main(["tune", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_measures_reports_and_keeps(device, capsys):
    device.times = {TRITON: 5.0, USUAL: 10.0}
    status, out, _ = command(capsys, "resnet18")
    assert status == cli.AGREES
    for text in ("Measured on", GPU, "0.50", "tuned.json", "no other"):
        assert text in out
    assert tuning.measured(GPU, CONV, SPEC)[0] == tuning.Choice("triton", str(TRITON.tile), 5.0)
    assert tuning.measured(GPU, CONV, replace(SPEC, groups=2)) == ()


def test_an_interrupted_command_keeps_what_it_measured(device, capsys, monkeypatch):
    measure = tune.measure

    def interrupted(problem, *arguments, **keywords):
        if problem.spec != SPEC:
            raise KeyboardInterrupt
        return measure(problem, *arguments, **keywords)

    monkeypatch.setattr(tune, "measure", interrupted)
    status, out, err = command(capsys, "resnet18")
    assert status == cli.INTERRUPTED and "was kept" in err
    assert "Measured on" in out and str(SPEC) in out
    assert tuning.measured(GPU, CONV, SPEC) and not tuning.measured(GPU, CONV, replace(SPEC, n=1))


def test_a_wrong_kernel_is_reported(device, capsys, monkeypatch):
    def bind(candidate, problem, tensors):
        function = exact(candidate, problem, tensors)
        return (lambda: function() + 1) if candidate.backend == "cuda" else function

    monkeypatch.setattr(tune, "_function_of", bind)
    status, _, err = command(capsys, "resnet18")
    assert status == cli.DISAGREES and "cuda" in err and "wrong: error" in err


def test_a_dry_run_is_headed_modelled_and_keeps_nothing(device, capsys):
    status, out, _ = command(capsys, "--dry-run", "--arch", "90")
    assert status == cli.AGREES
    assert "sm_90" in out and "modelled" in out and "Measured" not in out
    assert "cuda 64x" in out and "triton" in out and device.asked == []
    assert tuning.clear() == []


def test_clear_forgets(device, capsys):
    tuning.store(GPU, {WORK: (tuning.Choice("aten", "", 1.0),)})
    assert "removed" in command(capsys, "--clear")[1]
    assert "nothing was kept" in command(capsys, "--clear")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--batch", "0"], ["--batch"], id="batch"),
        pytest.param(["--seconds", "0"], ["--seconds"], id="seconds"),
        pytest.param(["--dtype", "int8"], ["int8", "bfloat16"], id="dtype"),
        pytest.param(["--backend", "cudnn"], ["cudnn", "NaN"], id="cudnn"),
        pytest.param(["--backend", "cpu"], ["cpu", "GPU"], id="cpu"),
        pytest.param(["--backend", "wonder"], ["wonder", "triton"], id="backend"),
        pytest.param(["--device", "cpu"], ["'cpu'", "--dry-run"], id="device"),
        pytest.param(["--device", "cuda:3"], ["cuda:3", "1 GPU"], id="index"),
        pytest.param(["--device", "tpu9"], ["tpu9"], id="no-device"),
    ],
)
def test_bad_input_is_two_and_one_sentence(arguments, words, device, capsys):
    status, out, err = command(capsys, *arguments)
    assert status == cli.BAD_INPUT and out == ""
    assert len(err.strip().splitlines()) == 1
    assert all(word in err for word in words)


def test_an_unknown_model_lists_the_known(capsys):
    status, _, err = command(capsys, "resnet5")
    assert status == cli.BAD_INPUT and "resnet50" in err


def test_without_a_gpu_one_sentence_and_two(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = command(capsys)
    assert status == 2 and out == ""
    assert "no NVIDIA GPU" in err and "--dry-run" in err and len(err.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_named(device, capsys, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(file / "cache"))
    status, _, err = command(capsys)
    assert status == cli.BAD_INPUT and "cannot be kept" in err
