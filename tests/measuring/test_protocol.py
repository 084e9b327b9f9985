# SPDX-License-Identifier: Apache-2.0
"""Answers before times, fair turns, settled warm-ups, reasons for those who have no time."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch

from resnet_fast.measuring import protocol
from resnet_fast.measuring import rounds as rounds_module
from resnet_fast.measuring.clock import CudaClock
from resnet_fast.measuring.protocol import Entrant, LeftOut, Missing
from resnet_fast.measuring.rounds import WARM_UP_LIMIT, rounds, warm_up
from resnet_fast.measuring.steadiness import MIN_ROUNDS, Timing
from tests.benchmarking.fakes import FakeClock, case, right


def measure(builders, clock, given=None, **options):
    return protocol.measure(builders, given or case(), clock, **{"seconds": 0.1, **options})


def test_a_wrong_answer_gets_no_time():
    clock = FakeClock()
    wrong = {"good": right(clock), "wrong": lambda: Entrant(lambda x: x + 0.5)}
    outcomes, _ = measure(wrong, clock)
    assert outcomes["good"].status == protocol.MEASURED
    found = outcomes["wrong"]
    assert found.status == protocol.FAILED and "exceeds" in found.reason
    assert found.wall is found.device is found.first_ms is None


@pytest.mark.parametrize("answer", [torch.zeros(2, 4), torch.full((2, 3), torch.nan)])
def test_a_wrong_shape_and_a_nan_are_wrong_answers(answer):
    outcomes, _ = measure({"wrong": lambda: Entrant(lambda x: answer)}, FakeClock())
    assert outcomes["wrong"].status == protocol.FAILED and outcomes["wrong"].wall is None


def test_an_answer_that_goes_stale_after_the_first_call_gets_no_time():
    """As of a captured graph that goes on with the inputs of another call."""
    clock, calls = FakeClock(), []

    def stale(x):
        clock.seconds += 1e-3
        calls.append(x)
        return x if len(calls) == 1 else x + 1

    outcomes, _ = measure({"stale": lambda: Entrant(stale)}, clock)
    assert outcomes["stale"].status == protocol.FAILED
    assert "after the warm-up" in outcomes["stale"].reason and outcomes["stale"].wall is None


def raising(error):
    def build():
        raise error

    return build


REASONS = {
    "missing": (Missing("not installed; pip install it"), protocol.MISSING, "pip install"),
    "left out": (LeftOut("takes too long"), protocol.LEFT_OUT, "too long"),
    "throws": (KeyError("peer broke"), protocol.THREW, "KeyError: 'peer broke'"),
    "gpu memory": (torch.OutOfMemoryError("CUDA out of memory. Tried"), protocol.MEMORY, "Tried"),
    "cpu memory": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        protocol.MEMORY,
        "alloc",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_who_cannot_run_says_why_and_the_rest_go_on(name):
    error, status, text = REASONS[name]
    clock = FakeClock()
    outcomes, _ = measure({"bad": raising(error), "good": right(clock)}, clock)
    assert outcomes["bad"].status == status and text in outcomes["bad"].reason
    assert outcomes["bad"].wall is None
    assert outcomes["good"].status == protocol.MEASURED


def test_who_throws_in_a_round_loses_its_times_and_the_rest_go_on():
    clock = FakeClock()
    builds = {"late": right(clock, log=(calls := [])), "good": right(clock)}
    late = builds["late"]()

    def call(x):
        if len(calls) == 12:
            raise RuntimeError("only now")
        return late.call(x)

    outcomes, _ = measure(builds | {"late": lambda: Entrant(call)}, clock)
    assert outcomes["late"].status == protocol.THREW and outcomes["late"].wall is None
    assert outcomes["good"].wall.rounds >= MIN_ROUNDS


def test_providers_take_turns_and_inputs_rotate():
    clock, log = FakeClock(), []
    names = ("a", "b", "c")
    builders = {name: right(clock, log=log, name=name) for name in names}
    outcomes, _ = measure(builders, clock)
    rounds = outcomes["a"].wall.rounds
    timed = log[-3 * rounds :]
    assert [name for name, _ in timed] == list(names) * rounds
    indices = [index for _, index in timed]  # none finds in a cache what the one before has read
    assert all(later == (earlier + 1) % 3 for earlier, later in itertools.pairwise(indices))


def test_back_to_back_calls_follow_an_untimed_one_of_the_same():
    clock, log = FakeClock(), []
    builders = {name: right(clock, log=log, name=name) for name in "ab"}
    outcomes, _ = measure(builders, clock, case(back_to_back=True))
    rounds = outcomes["a"].wall.rounds
    assert [name for name, _ in log[-4 * rounds :]] == list("aabb") * rounds
    assert outcomes["a"].samples == pytest.approx((1.0,) * rounds)


def test_first_call_and_building_stand_apart():
    clock, slow = FakeClock(), [0.5]

    def build():
        clock.seconds += 2

        def call(x):
            clock.seconds += slow.pop() if slow else 1e-3
            return x

        return Entrant(call)

    outcomes, _ = measure({"cold": build}, clock)
    found = outcomes["cold"]
    assert found.build_ms == pytest.approx(2000) and found.first_ms == pytest.approx(500)
    assert found.wall.median == pytest.approx(1)


def test_modes_are_entered_outside_of_the_clock():
    clock = FakeClock()

    @contextlib.contextmanager
    def costly():
        clock.seconds += 1
        yield

    entrant = Entrant(right(clock)().call, around=costly)
    outcomes, _ = measure({"x": lambda: entrant}, clock)
    assert outcomes["x"].wall.p99 == pytest.approx(1)


def test_who_wants_a_thread_has_one_of_its_own_for_all_calls():
    """Modes are a thread's: they are entered there."""
    clock, seen = FakeClock(), {"mine": set(), "theirs": set()}

    def builder(name, own_thread):
        def call(x):
            assert torch.is_inference_mode_enabled()
            seen[name].add(threading.get_ident())
            clock.seconds += 1e-3
            return x.clone()

        return lambda: Entrant(call, own_thread=own_thread)

    outcomes, _ = measure({n: builder(n, n == "mine") for n in seen}, clock)
    assert {o.status for o in outcomes.values()} == {protocol.MEASURED}
    assert seen["theirs"] == {threading.get_ident()}
    assert len(seen["mine"]) == 1 and seen["mine"] != seen["theirs"]


def test_who_throws_in_a_thread_of_its_own_says_why():
    def call(x):
        raise RuntimeError("no engine")

    outcomes, _ = measure({"x": lambda: Entrant(call, own_thread=True)}, FakeClock())
    assert outcomes["x"].status == protocol.THREW and "no engine" in outcomes["x"].reason


def test_the_inputs_are_prepared_once_and_untimed():
    clock, prepared = FakeClock(), []

    def prepare(inputs):
        prepared.append(inputs)
        clock.seconds += 1
        return inputs

    entrant = Entrant(right(clock)().call, prepare)
    outcomes, _ = measure({"x": lambda: entrant}, clock)
    assert len(prepared) == 3 and outcomes["x"].wall.p99 == pytest.approx(1)


def test_warm_up_ends_when_times_settle():
    falling = iter([80, 40, 20, 10, 9, 10.1, 9.9, 10, 10, 10])
    assert 7 <= warm_up(lambda: next(falling), 1e6) <= 9


def test_warm_up_that_never_settles_ends():
    times = iter(2.0**i for i in range(100))
    assert warm_up(lambda: next(times), 1e30) == WARM_UP_LIMIT


def test_warm_up_keeps_to_its_time_but_makes_three_calls():
    assert warm_up(lambda: 1000.0, 10) == 3


def test_the_deadline_begins_nothing_new():
    clock = FakeClock()
    builders = {"slow": right(clock, 1000), "never": right(clock)}
    outcomes, interrupted = measure(builders, clock, deadline=3.0)
    assert not interrupted
    for found in outcomes.values():
        assert found.status == protocol.LEFT_OUT and protocol.TIME_IS_UP in found.reason
    assert clock.seconds < 10


def test_ctrl_c_keeps_what_was_measured():
    clock, count = FakeClock(), [0]
    entrant = right(clock)()

    def call(x):
        count[0] += 1
        if count[0] == 30:
            raise KeyboardInterrupt
        return entrant.call(x)

    builders = {"first": right(clock), "cut": lambda: Entrant(call)}
    outcomes, interrupted = measure(builders, clock, seconds=1e6)
    assert interrupted
    assert outcomes["first"].status == protocol.MEASURED
    assert outcomes["first"].wall.rounds >= MIN_ROUNDS


def test_ctrl_c_after_a_few_rounds_leaves_no_time_that_rests_on_so_few():
    clock = FakeClock()
    rounds = []

    def progress(text):
        rounds.append(text)
        if text == "round 4":
            raise KeyboardInterrupt

    outcomes, interrupted = measure({"x": right(clock)}, clock, progress=progress)
    assert interrupted and "round 3" in rounds
    assert outcomes["x"].status == protocol.INTERRUPTED and outcomes["x"].wall is None


def test_ctrl_c_while_building_leaves_nothing_that_looks_measured():
    clock = FakeClock()
    builders = {"built": right(clock), "cut": raising(KeyboardInterrupt()), "after": right(clock)}
    outcomes, interrupted = measure(builders, clock)
    assert interrupted and {o.status for o in outcomes.values()} == {protocol.INTERRUPTED}
    assert all(o.wall is None for o in outcomes.values())


def test_statistics_by_hand():
    found = Timing.of([float(i) for i in range(101)])
    assert (found.median, found.p20, found.p80, found.p99) == (50, 20, 80, 99)
    assert Timing.of([3.0]).p99 == 3
    skewed = Timing.of([1.0, 1.0, 1.0, 9.0])
    assert skewed.median == 1 and 1 <= skewed.p80 <= 9


class _Device:
    """A GPU's stream: what is queued begins when what was queued before it has ended."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.free, self.log = clock, 0.0, []

    def launch(self, host: float, device: float, name: str = "work") -> None:
        """The host needs so many seconds to queue what takes the device so many."""
        self.clock.seconds += host
        self.free = self.now() + device
        self.log.append(name)

    def now(self) -> float:
        """When the device gets to what is queued now."""
        return max(self.clock.seconds, self.free)

    def synchronize(self, device) -> None:
        self.clock.seconds = self.now()
        self.log.append("synchronize")

    def event(self, enable_timing):
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, device: _Device) -> None:
        self.device = device

    def record(self):
        self.at = self.device.now()
        self.device.log.append("event")

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class _Buffer:
    """What is written to push everything else out of the cache: 20 microseconds' work."""

    def __init__(self, device: _Device) -> None:
        self.device = device

    def zero_(self) -> None:
        self.device.launch(5e-6, 20e-6, "flush")


class _Graph:
    """A CUDA graph that replays what was called while it was open."""

    open = None

    def replay(self):
        self.call()


@pytest.fixture
def gpu(monkeypatch):
    """What `CudaClock` asks of torch.cuda, played by the fake clock."""
    clock = FakeClock()
    device = _Device(clock)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: device.launch(5e-6, cycles / 2e9, "sleep")
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    timer = CudaClock(torch.device("cuda:1"), now=clock.now)
    timer._buffer = _Buffer(device)
    return device, timer, monkeypatch


def launching(device: _Device, host: float = 40e-6, work: float = 3e-6):
    """Builds a provider that needs 40 microseconds to launch what takes 3."""

    def call(x: torch.Tensor) -> torch.Tensor:
        device.launch(host, work)
        return x.clone()

    return lambda: Entrant(call)


def test_the_devices_time_has_no_launch_in_it_and_the_wall_time_has(gpu):
    device, timer, _ = gpu

    def call():
        device.launch(40e-6, 3e-6)

    assert timer.lap(call) == pytest.approx(0.043)
    for cold in (False, True):
        assert timer.device_lap(call, cold, ahead_ms=0.043) == pytest.approx(0.003)
        flush = ["flush"] if cold else []
        queued = ["synchronize", "sleep", *flush, "event", "work", "event", "synchronize"]
        assert device.log[-len(queued) :] == queued
    assert timer.peak_memory_mb(call) == pytest.approx(7)


def test_a_long_call_is_not_waited_for_as_long_again(gpu):
    device, timer, _ = gpu
    before = device.clock.seconds
    timer.device_lap(lambda: device.launch(1e-3, 0.4), False, ahead_ms=401)
    assert device.clock.seconds - before < 0.46


def test_a_replay_gives_the_device_time_and_its_absence_leaves_events(gpu):
    device, timer, monkeypatch = gpu
    graph = [lambda: device.launch(10e-6, 2e-6)]
    monkeypatch.setattr(timer, "capture", lambda call: graph[0], raising=False)
    outcomes, _ = measure({"x": launching(device)}, timer)
    assert outcomes["x"].device_how == "graph replay"
    assert outcomes["x"].device.median == pytest.approx(0.002)
    assert outcomes["x"].wall.median == pytest.approx(0.043)
    graph[0] = None
    outcomes, _ = measure({"x": launching(device)}, timer)
    assert outcomes["x"].device_how == "events"
    assert outcomes["x"].device.median == pytest.approx(0.003)
    assert outcomes["x"].peak_memory_mb == pytest.approx(7)
    held = launching(device)()
    held.graphable = False  # its memory is the graph's, and is held before the call
    outcomes, _ = measure({"x": lambda: held}, timer)
    assert outcomes["x"].wall and outcomes["x"].peak_memory_mb is None


def test_what_cannot_be_captured_is_timed_by_events(gpu):
    _, timer, monkeypatch = gpu

    @contextlib.contextmanager
    def refuse(graph, stream, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert timer.capture(lambda: None) is None


def test_the_clocks_device_is_the_one_that_is_timed(gpu):
    """With several GPUs, events and graphs of another would see none of the work."""
    gpu_device, timer, monkeypatch = gpu
    streams, inside, calls = [], [], []

    @contextlib.contextmanager
    def recorded(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        streams.append(stream)
        graph.call = lambda: None
        yield

    @contextlib.contextmanager
    def device(which):
        inside.append(which)
        yield
        inside.pop()

    def call(x):
        calls.append(list(inside))
        gpu_device.launch(1e-3, 1e-3)
        return x.clone()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "device", device)
    outcomes, _ = measure({"x": lambda: Entrant(call)}, timer)
    assert outcomes["x"].device_how == "graph replay"
    assert streams == ["a stream of cuda:1"]
    assert all(where == [torch.device("cuda:1")] for where in calls)


def test_a_lap_of_the_host_has_no_device_time():
    clock = FakeClock()
    assert clock.lap(lambda: None) == 0.0
    assert clock.device_lap(lambda: pytest.fail("called"), cold=True, ahead_ms=1.0) is None


@pytest.mark.parametrize(("rounds", "kept"), [(2, False), (3, True), (6, True)])
def test_a_deadline_keeps_three_rounds_and_more_as_times_that_are_not_stable(rounds, kept):
    """On a busy machine little else would be left of a quick run."""
    clock = FakeClock()
    before = 6.0  # seconds: the first call, three to warm up, one checked, one for its memory
    outcomes, _ = measure({"slow": right(clock, 1000)}, clock, deadline=before + rounds - 0.5)
    found = outcomes["slow"]
    assert (found.status == protocol.MEASURED) == kept
    if kept:
        assert found.wall.rounds == rounds and not found.wall.stable
        assert found.reason == f"{rounds} rounds of at least 7: {protocol.TIME_IS_UP}"
    else:
        assert found.wall is None and found.reason == protocol.TIME_IS_UP


def test_rounds_are_seven_at_least_and_two_hundred_at_most():
    def numbers(seconds, **options):
        return list(rounds(seconds, lambda: clock.seconds, **options))

    clock = FakeClock()
    assert numbers(0.0) == list(range(1, 8))  # whatever the time is
    assert len(numbers(1.0)) == 200  # of a clock that stands still
    assert numbers(9.0, deadline=0.0) == []
    assert numbers(0.0, count=3) == [1, 2, 3]


def test_a_timer_for_kernels_takes_turns_flushes_and_times_the_call_alone(gpu, monkeypatch):
    device, timer, _ = gpu
    monkeypatch.setattr(rounds_module, "clock_of", lambda place: timer)
    work = {"a": 3e-6, "b": 5e-6}
    functions = {name: lambda n=name: device.launch(40e-6, work[n], n) for name in work}
    times = rounds_module.event_timer(torch.device("cuda:1"))(functions, 0.0)
    assert {name: time.median for name, time in times.items()} == pytest.approx({"a": 3, "b": 5})
    assert [word for word in device.log if word in "ab"] == list("ab") * MIN_ROUNDS
    one = ["synchronize", "sleep", "flush", "event", "b", "event", "synchronize"]
    assert device.log[-len(one) :] == one
