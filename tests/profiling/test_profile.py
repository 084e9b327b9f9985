# SPDX-License-Identifier: Apache-2.0
"""Profiles of plain and fused models: whose time a row is, and that none is lost.

A sleep is planted where one layer runs, and has to show up in that layer's row. Nothing else here
depends on how fast the machine is.
"""

from __future__ import annotations

import json
import time
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

import resnet_fast
from resnet_fast import ops
from resnet_fast.measuring.clock import Clock, CudaClock
from resnet_fast.nn import launches
from resnet_fast.nn.guard import Guard
from resnet_fast.profiling import profile as module
from resnet_fast.profiling import suggest
from resnet_fast.profiling.calls import around_calls
from resnet_fast.profiling.layers import as_run
from resnet_fast.profiling.parts import GAP, LAUNCHES, REMAINDER, Part, peer_rows, places
from resnet_fast.profiling.timeline import Edge, Replay, Timeline
from resnet_fast.spec import TileConfig

SLEEP = 0.06
X = torch.zeros(1, 3, 64, 64).to(memory_format=torch.channels_last)


def profile(model, x=X, **keywords):
    return resnet_fast.profile(model, x, **{"rounds": 3, "warmup": 1} | keywords)


@pytest.fixture
def ours():
    return resnet_fast.models.resnet18().eval().to(memory_format=torch.channels_last)


@pytest.fixture
def theirs():
    return torchvision.models.resnet18().eval().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def found():
    """Of a fused ResNet-18, with torchvision's beside it."""
    torch.manual_seed(0)
    model = resnet_fast.models.resnet18().eval().to(memory_format=torch.channels_last)
    return profile(model, compare="torchvision")


class SlowConv(nn.Conv2d):
    def forward(self, x):
        time.sleep(SLEEP)
        return super().forward(x)


class SlowLaunch:
    """A launch that sleeps first."""

    def __init__(self, launch):
        self.launch, self.growth = launch, launch.growth

    def fresh(self, weight):
        return self.launch.fresh(weight)

    def __call__(self, *args):
        time.sleep(SLEEP)
        return self.launch(*args)


def only_slow(found) -> list[str]:
    return [row.name for row in found.rows if row.seconds > SLEEP and row.name != REMAINDER]


def test_a_sleep_in_a_plain_layer_is_in_its_row(theirs):
    theirs.layer2[0].conv2.__class__ = SlowConv
    found = profile(theirs)
    assert only_slow(found) == ["layer2.0.conv2"]
    assert next(s for s in found.stages if s.name == "layer2").seconds > SLEEP


@pytest.mark.parametrize("name", ["conv1", "layer2.0.downsample.0", "layer2.0.conv2"])
def test_a_sleep_in_a_fused_layer_is_in_its_row(ours, name):
    with torch.inference_mode():
        ours(X), ours(X)
    step = Timeline(ours, X, Clock()).steps[name]
    with torch.inference_mode():
        ours(X)  # whose launches are bound by now
    step.launch = SlowLaunch(step.launch)
    assert only_slow(profile(ours)) == [name]


def test_a_sleep_between_modules_is_in_the_row_of_what_runs_there(theirs):
    class Slow(type(theirs.layer3[1])):
        def forward(self, x):
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            time.sleep(SLEEP)
            return self.relu(y + x)

    theirs.layer3[1].__class__ = Slow
    assert only_slow(profile(theirs)) == ["layer3.1.add"]


def test_a_sleep_between_layers_is_in_the_gap(theirs):
    class Slow(type(theirs)):
        def _forward_impl(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            time.sleep(SLEEP)
            y = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(y)))))
            return self.fc(torch.flatten(self.avgpool(y), 1))

    theirs.__class__ = Slow
    assert only_slow(profile(theirs)) == [GAP]


def test_rows_stages_and_total_add_up(found):
    rows = found.rows
    assert sum(row.seconds for row in rows) == pytest.approx(found.seconds)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert sum(row.seconds for row in found.stages) == pytest.approx(found.seconds)
    assert found.total.seconds == pytest.approx(found.seconds)
    assert found.total.flops == sum(row.flops for row in found.stages) > 2.9e8
    assert [row.name for row in found.gaps] == [GAP, REMAINDER]


def test_each_layer_of_the_fused_model_has_a_row_that_tells_all(found):
    names = [row.name for row in found.layers if row.kind == "conv"]
    assert len(names) == 20 and names[0] == "conv1"
    assert names.index("layer2.0.downsample.0") < names.index("layer2.0.conv2")
    for row in found.layers:
        if row.kind == "conv":
            assert row.backend == "cpu" and row.seconds > 0 and row.peer > 0
            assert row.tflops == pytest.approx(row.flops / row.seconds / 1e12)
            assert row.bandwidth_gbs == pytest.approx(row.bytes / row.seconds / 1e9)
        if row.bytes:
            assert row.bound in ("memory", "arithmetic", "launch") and 0 < row.roof <= 1.05
            assert row.roof == pytest.approx(
                found.roofline.time_floor(row.flops, row.bytes).seconds / row.seconds
            )
    assert {"maxpool", "avgpool", "fc"} <= {row.name for row in found.layers}


def test_the_overhead_of_marking_is_told_and_nothing_stays_behind(found, ours):
    call = nn.Module.__call__
    text = str(profile(ours))
    assert f"marking the layers costs {found.marking}" in str(found)
    assert "marking the layers costs" in text
    assert nn.Module.__call__ is call and launches.observer_now() is None
    report = resnet_fast.report(ours)
    assert report.fused == len(report) == 9


@pytest.mark.parametrize(
    ("overhead", "text"), [(-0.267, "less than the noise"), (0.02, "less than the noise"),
                           (0.08, "+8.0%")],
)  # fmt: skip
def test_a_cost_of_marking_that_noise_makes_is_no_cost(overhead, text):
    found = made([row()], overhead=overhead, overhead_noise=0.03)
    assert f"marking the layers costs {text};" in str(found)


def anticorrelated() -> module.Profile:
    """Of two layers of which each run has another slow one: medians that add up to more."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    subject = module._Subject(model, X, Timeline(model, X, Clock()))
    for one, other in ((1.0, 3.0), (3.0, 1.0), (3.0, 3.0), (1.0, 3.0), (3.0, 1.0)):
        edges = [Edge(s, s) for s in (0.0, one, 0.0, other, 0.0)]
        subject.replays.append(Replay(("0", "1"), edges))
        subject.walls.append(4.0)
        subject.busy[True].append(1.0)
        subject.busy[False].append(1.0)
    return module._profile(subject, X, None, Clock())


def test_interruptions_are_no_less_than_nothing():
    found = anticorrelated()
    assert [r.seconds for r in found.rows] == [3.0, 3.0, 0.0, 0.0] and found.seconds == 6.0
    assert found.gaps[-1].name == REMAINDER
    (line,) = (line for line in str(found).splitlines() if line.startswith(REMAINDER))
    assert "noise" in line and "-" not in line
    slices = [e for e in found.trace()["traceEvents"] if e["ph"] == "X"]
    end = max(e["ts"] + e["dur"] for e in slices)
    (whole,) = (e for e in slices if e["name"] == found.model)
    assert whole["dur"] == end == 6e6


def test_a_row_whose_runs_lie_apart_is_marked_and_its_ratio_says_nothing():
    found = anticorrelated()
    assert [r.spread > 1 / 3 for r in found.rows] == [True, True, False, False]
    found = replace(found, peer="torchvision", peer_seconds=5.0, peer_whole=5.0)
    wild = replace(found.rows[0], peer=3.0 / 325.87, peer_spread=1.0)
    found.rows = [wild, replace(row(), peer=0.25, peer_spread=0.02, spread=0.02), *found.gaps]
    assert wild.ratio is None and found.rows[1].ratio == 2.0
    text = found.table(layers=True)
    assert "325" not in text and "?" in text and "~3000.000" in text
    assert "~ marks what is not stable, 1 of 3 times" in text
    assert found.to_json()["rows"][0]["ratio"] is None and found.to_json()["warnings"]


def test_a_busy_machine_is_told_and_spoils_all_times():
    found = made([row()], busy=0.5)
    assert "too busy to time" in found.warnings[0] and "2 of 2 times" in found.warnings[1]
    assert "~500.000" in str(found)
    assert made([row()], busy=0.05).warnings == []


def test_each_ratio_is_of_two_times_that_were_measured_alike(found):
    """The sum of marked rows over the peer's marked runs, an unmarked run over unmarked ones."""
    total, run = found.sums
    assert (total.seconds, total.peer) == (found.seconds, found.peer_whole)
    assert (run.seconds, run.peer) == (found.unmarked, found.peer_seconds)
    assert run.flops == total.flops and run.roof * run.seconds == pytest.approx(
        total.roof * total.seconds
    )


def test_nothing_stays_behind_after_an_error(theirs):
    call = nn.Module.__call__
    with pytest.raises(RuntimeError, match="expected input"):
        profile(theirs, torch.zeros(1, 5, 64, 64))
    timeline = Timeline(theirs, X, Clock())
    with pytest.raises(KeyError), timeline.open():
        raise KeyError
    assert nn.Module.__call__ is call and launches.observer_now() is None


def test_a_replay_outside_of_open_has_no_marks_inside(theirs, ours):
    with torch.inference_mode(), around_calls() as calls:
        for model in (theirs, ours):
            model(X)
            timeline = Timeline(model, X, Clock())
            with timeline.open(calls):
                assert len(timeline.replay().names) > 20
            bare = timeline.replay()
            assert bare.names == () and len(bare.edges) == 1 and not timeline._runs


def test_the_peer_runs_the_same_layers_and_its_rows_take_in_norms_and_additions():
    seconds = {
        "layer1.0.conv1": 1.0, "layer1.0.bn1": 2.0, "layer1.0.conv2": 4.0, "layer1.0.bn2": 8.0,
        "layer1.0.downsample.0": 16.0, "layer1.0.downsample.1": 32.0, "layer1.0.add": 64.0,
        "layer1.0.relu": 128.0, "maxpool": 256.0,
    }  # fmt: skip
    kinds = {"conv": "conv", "bn": "norm", "re": "relu", "add": "add", "ma": "pool", "do": "conv"}
    rows = []
    for name, value in seconds.items():
        last = name.rpartition(".")[2]
        kind = next((k for start, k in kinds.items() if last.startswith(start)), "conv")
        rows.append(Part(name, "layer1", "norm" if last == "1" else kind, value))
    assert {name: row.seconds for name, row in peer_rows(rows).items()} == {
        "layer1.0.conv1": 3.0,
        "layer1.0.conv2": 12.0 + 64 + 128,
        "layer1.0.downsample.0": 48.0,
        "maxpool": 256.0,
    }


def test_a_model_may_be_compared_with_any_other(ours, theirs):
    found = profile(ours, compare=theirs)
    assert found.peer == "ResNet" and found.peer_seconds > 0 and "ratio" in str(found)


def test_optimized_and_partly_plain_models_are_profiled_as_they_run(theirs):
    theirs.layer3[0].conv1.register_forward_hook(lambda *_: None)
    model = resnet_fast.optimize(theirs)
    kinds = {row.name: row.backend for row in profile(model).layers}
    assert kinds["layer2.0.conv1"] == "cpu" and "layer2.0.bn1" not in kinds
    assert kinds["layer3.0.conv1"] == "torch" and "layer3.0.add" in kinds


def test_a_layer_that_runs_in_no_module_has_its_place():
    class Tail(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 2

    found = profile(Tail(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    assert [row.name for row in found.layers] == ["0", "1", "mul"]


def test_a_module_that_calls_none_of_its_children_is_one_row():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return (x @ self.inner.weight).relu() @ self.inner.weight

    model = nn.Sequential(nn.ReLU(), Attention(), nn.Linear(8, 8)).eval()
    found = profile(model, torch.ones(2, 3, 8, 8))
    assert [row.name for row in found.layers] == ["0", "1", "2"]
    assert found.layers[1].flops == 2 * (2 * 48 * 8 * 8)


def test_the_pool_and_the_layout_of_the_fused_model_have_rows_of_their_own(ours, monkeypatch):
    """Beside the guard, which is asked before the first of them."""
    pool = ops.max_pool_3x3_2
    monkeypatch.setattr(ops, "max_pool_3x3_2", lambda x: (time.sleep(SLEEP), pool(x))[1])
    found = profile(ours, X.contiguous())
    assert [row.name for row in found.layers[:4]] == ["clone", "range check", "conv1", "maxpool"]
    assert only_slow(found) == ["maxpool"]
    assert [row.backend for row in found.layers[:4]] == ["torch", "cpu", "cpu", "cpu"]
    holds = Guard.holds
    monkeypatch.setattr(ops, "max_pool_3x3_2", pool)
    monkeypatch.setattr(Guard, "holds", lambda *a: (time.sleep(SLEEP), holds(*a))[1])
    assert only_slow(profile(ours)) == [GAP]


def test_layers_without_a_mark_lie_between_those_with_one(ours):
    layers = as_run(ours.layer1, torch.zeros(1, 64, 8, 8))
    names = [layer.name for layer in layers]
    marked = [names[0], "an identity", names[2]]
    found = [(place.index, place.before, place.name) for place in places(layers[:3], marked)]
    between = (2, True, names[1])
    assert found == [(0, False, names[0]), (1, False, "an identity"), between, (2, False, names[2])]


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_leaves_what_was_measured(ours, at):
    def stop(text):
        if text == f"round {at + 1}":
            raise KeyboardInterrupt

    found = resnet_fast.profile(ours, X, rounds=9, progress=stop)
    assert found.interrupted and found.rounds == at
    assert "interrupted" in str(found) and len(found.layers) > 20


def test_an_interrupt_before_the_first_round_is_one(ours):
    def stop(text):
        if "warm-up" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resnet_fast.profile(ours, X, progress=stop)


def test_progress_is_told(ours):
    told: list[str] = []
    profile(ours, compare="torchvision", progress=told.append)
    assert {"round 1", "round 3", "building torchvision's model"} <= set(told)
    assert any("warm-up" in text for text in told)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        pytest.param({"model": "resnet50"}, TypeError, "nn.Module", id="model"),
        pytest.param({"x": [1]}, TypeError, "tensor", id="example"),
        pytest.param({"compare": "keras"}, ValueError, "keras.*torchvision", id="compare"),
        pytest.param({"compare": 3}, TypeError, "not a name or a model", id="compare-type"),
        pytest.param({"rounds": 0}, ValueError, "rounds >= 1", id="rounds"),
        pytest.param({"warmup": -1}, ValueError, "warmup", id="warmup"),
        pytest.param({"seconds": -1.0}, ValueError, "seconds", id="seconds"),
    ],
)
def test_bad_input(ours, keywords, error, words):
    with pytest.raises(error, match=words):
        profile(**{"model": ours} | keywords)


def test_a_model_in_training_mode_is_refused(ours):
    with pytest.raises(ValueError, match="eval"):
        profile(ours.train())


def test_a_model_that_torchvision_does_not_have_lists_those_it_has():
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    with pytest.raises(ValueError, match=r"resnet18.*wide_resnet50_2"):
        profile(model, compare="torchvision")


def test_it_is_plain_data_too(found):
    data = json.loads(json.dumps(found.to_json()))
    assert data["format"] == module.FORMAT and data["model"] == "ResNet"
    assert [row["name"] for row in data["rows"]] == [row.name for row in found.rows]
    assert data["roofline"]["source"] == "measured" and data["machine"]["torch"]


def test_a_row_tells_the_backend_and_the_tile_of_its_plan():
    plan = types.SimpleNamespace(
        backend="cuda", tile=TileConfig(64, 32, 64, 4, 4), why_fallback=str
    )
    row = Part("conv1", "stem", "conv", 1.0)
    served = module._served(row, types.SimpleNamespace(plan=plan))
    assert (served.backend, served.tile) == ("cuda", "64x32x64 stages 4 warps 4")
    plan.tile = None
    assert module._served(row, types.SimpleNamespace(plan=plan)).tile == ""


# ---- a GPU, with a stand-in


TICK = 2.0**-20  # about a microsecond: the device is done before the host is


class StandIn:
    """torch.cuda, as far as the clock uses it: the device's time goes on by a tick an event."""

    def __init__(self):
        self.held = self.events = self.synchronized = 0
        self.current, self.elsewhere = None, 0

    @contextmanager
    def device(self, device):
        self.current = device
        yield
        self.current = None

    def synchronize(self, device):
        self.synchronized += 1

    def _sleep(self, cycles):
        self.held += 1

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, None

    def record(self):
        self.cuda.events += 1
        self.cuda.elsewhere += self.cuda.current is None
        self.at = self.cuda.events

    def elapsed_time(self, other):
        return TICK * 1e3 * (other.at - self.at)


def test_events_tell_the_devices_time(ours):
    cuda = StandIn()
    clock = CudaClock(torch.device("cpu"), cuda=cuda)
    with torch.inference_mode():
        ours(X), ours(X)
        timeline = Timeline(ours, X, clock)
        with timeline.open():
            replay = timeline.replay()
            again = timeline.replay()
    assert again.names == replay.names and cuda.held == 2 and cuda.synchronized == 4
    assert all(edge.device in (0.0, TICK) and 0 <= edge.host < 1 for edge in replay.edges)
    launched = [n for n, name in enumerate(replay.names) if name.startswith("layer")]
    assert {replay.edges[2 * n + 1].device for n in launched} == {TICK}
    assert replay.whole.device == sum(edge.device for edge in replay.edges)


def test_a_gpus_profile_tells_host_and_device_apart(ours, monkeypatch):
    cuda = StandIn()
    clock = CudaClock(torch.device("cpu"), cuda=cuda)
    monkeypatch.setattr(module, "clock_of", lambda device: clock)
    found = profile(ours)
    assert cuda.events and not cuda.elsewhere  # an event is recorded on the current device
    assert found.device_apart and found.gaps[-1].name == LAUNCHES
    assert "host ms" in str(found) and "device time" in str(found)
    assert all(row.host is not None for row in found.layers)
    assert found.seconds == found.unmarked  # from call to completion, as a user sees it
    assert {e["tid"] for e in found.trace()["traceEvents"]} >= {5}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
def test_on_a_gpu(ours):
    model = resnet_fast.models.resnet50().eval().cuda().half()
    model.to(memory_format=torch.channels_last)  # which the kernels ask for
    x = torch.zeros(1, 3, 224, 224, device="cuda", dtype=torch.float16)
    found = resnet_fast.profile(model, x, compare="torchvision", rounds=5)
    assert found.device_apart and all(row.roof <= 1.05 for row in found.layers)
    assert 0 < found.total.seconds == pytest.approx(found.unmarked)


# ---- suggestions


def made(rows, **keywords):
    facts = {
        "model": "M", "device": "cpu", "dtype": "float32", "batch": 1, "shape": (1, 3, 8, 8),
        "machine": {}, "roofline": None, "seconds": 1.0, "unmarked": 1.0, "overhead": 0.0,
        "rounds": 7,
    }  # fmt: skip
    return module.Profile(rows=rows, **facts | keywords)


def row(kind="conv", name="layer1.0.conv1", **keywords):
    facts = {"seconds": 0.5, "share": 0.5, "bytes": 100, "roof": 0.3, "bound": "memory"}
    return Part(name, "layer1", kind, **facts | keywords)


GAP_ROW = Part(LAUNCHES, "", "gap", 0.5, share=0.5)
CASES = {
    "cuda_graph": (
        made([row(bound="launch", host=0.6), GAP_ROW], device="cuda", device_apart=True),
        "layer1.0.conv1: 30% of its roofline, launch-bound at batch 1",
    ),
    "optimize": (made([row("norm")], unoptimized=True), "resnet_fast.optimize(model)"),
    "channels_last": (made([row("copy")]), "give x in channels_last"),
    "batch": (made([row(weight_bytes=90)]), "90% of their bytes are weights"),
    "fallback": (
        made([row(why="x is strided", backend="aten")]),
        "runs unfused (x is strided)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_suggestion_follows_from_the_rows(name):
    found, words = CASES[name]
    rule = next(rule for rule in suggest.RULES if rule.name == name)
    assert words in next(rule.find(found))
    assert any(rule.reason in line for line in suggest.suggestions(found))


@pytest.mark.parametrize(
    ("device", "unoptimized", "said"),
    [("cuda:0", False, True), ("cuda", True, True), ("cpu", True, True), ("cpu", False, False)],
)
def test_contiguous_weights_are_named_wherever_they_cost(device, unoptimized, said):
    """On a GPU for models of ours as well, whose kernels refuse them."""
    found = made([row()], device=device, unoptimized=unoptimized, contiguous_weights=20)
    line = "20 convolutions have contiguous weights; try model.to(memory_format=torch.channels_last"
    assert any(line in text for text in suggest.suggestions(found)) == said


def test_bfloat16_is_suggested_where_there_is_arithmetic_for_it(monkeypatch):
    monkeypatch.setattr(suggest, "_has_bfloat16", lambda device: True)
    arithmetic = row(bound="arithmetic")
    assert any("try bfloat16" in line for line in suggest.suggestions(made([arithmetic])))
    assert suggest.suggestions(made([arithmetic], dtype="bfloat16")) == []


def test_nothing_is_suggested_where_nothing_is_wrong():
    quiet = made([row(roof=0.9, weight_bytes=10), Part(GAP, "", "gap", 0.01, share=0.01)])
    assert suggest.suggestions(quiet) == []


def test_what_is_suggested_exists():
    """Names in the lines are names that can be called."""
    assert callable(resnet_fast.cuda_graph) and callable(resnet_fast.optimize)
    assert [rule.name for rule in suggest.RULES] == list(
        dict.fromkeys(rule.name for rule in suggest.RULES)
    )
