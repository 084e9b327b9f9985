# SPDX-License-Identifier: Apache-2.0
"""`pytest benchmarks -n 0`: the suite of `resnet-fast bench`, printed by pytest-benchmark.

Cases, providers and protocol are the suite's. A case is measured once, all its providers in turn;
each of its tests then gives pytest-benchmark the rounds of one provider, by a timer that replays
them. Without --full the cases are those of --quick.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from resnet_fast.benchmarking import rows, suite
from resnet_fast.measuring import protocol
from resnet_fast.measuring.clock import clock_of
from resnet_fast.measuring.machine import environment


def pytest_addoption(parser):
    text = "every case of the suite, not only those of --quick"
    parser.addoption("--full", action="store_true", help=text)


def _extent(config) -> str:
    return "full" if config.getoption("--full") else "quick"


class ReplayTimer:
    """A timer by which a function that does nothing takes the time of the next sample."""

    def __init__(self) -> None:
        self.play(())

    def play(self, samples: Sequence[float]) -> None:
        """Let the next pairs of readings lie these milliseconds apart."""
        steps = ((1e-6, ms / 1e3) for ms in samples)
        self._steps = itertools.chain(itertools.chain.from_iterable(steps), itertools.repeat(1e-6))
        self._now = 0.0

    def __call__(self) -> float:
        self._now += next(self._steps)
        return self._now


REPLAY = ReplayTimer()


def pytest_generate_tests(metafunc):
    """A test per case and provider of the module's SUITE."""
    if "provider" not in metafunc.fixturenames:
        return
    request = suite.Request(extent=_extent(metafunc.config))
    mark = pytest.mark.benchmark(timer=REPLAY)
    found = []
    for case in request.cases(metafunc.module.SUITE):
        for provider in request.asked(case)[0]:
            name = f"{case}-{provider.name}"
            found.append(pytest.param(case, provider.name, marks=mark, id=name))
    metafunc.parametrize(("case", "provider"), found)


@pytest.fixture(scope="session")
def measured(pytestconfig) -> Callable:
    """A case's rows, measured when they are first asked for; only the last case's are kept."""
    request = suite.Request(extent=_extent(pytestconfig))
    clock, facts = clock_of(request.place), environment(request.place)
    last = {}

    def rows_of(case) -> dict[str, tuple[rows.Result, tuple[float, ...]]]:
        if case not in last:
            last.clear()
            samples: dict[str, tuple[float, ...]] = {}
            found, _, interrupted = suite.measure_case(case, request, clock, facts, samples=samples)
            if interrupted:
                raise KeyboardInterrupt
            last[case] = {row.provider: (row, samples.get(row.provider, ())) for row in found}
        return last[case]

    return rows_of


@pytest.fixture
def replay(benchmark, measured) -> Callable:
    """Print one provider's rounds; without times, fail or skip with the row's reason."""

    def show(case, provider: str) -> None:
        row, samples = measured(case)[provider]
        if row.status in (protocol.FAILED, protocol.THREW):
            pytest.fail(f"{provider} gets no time: {row.status}: {row.reason}", pytrace=False)
        if not row.measured:
            pytest.skip(f"{row.status}: {row.reason}")
        benchmark.group, benchmark.name = str(case), provider
        benchmark.extra_info |= {"error": row.error, "eager_error": row.eager_error}
        benchmark.extra_info |= {"first_ms": row.first_ms, "device_ms": row.device_ms}
        REPLAY.play(samples)
        benchmark.pedantic(_nothing, rounds=len(samples))

    return show


def _nothing() -> None:
    """What the replayed times stand for has been done."""
