# SPDX-License-Identifier: Apache-2.0
"""What may not be taken as a fact is marked, wins nothing, and the reader is told what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resnet_fast.agreement import Verdict
from resnet_fast.comparison import tables
from resnet_fast.comparison.measure import Comparison, Setting
from resnet_fast.measuring import steadiness
from resnet_fast.measuring.peers import NCHW, NHWC, OURS
from resnet_fast.measuring.steadiness import Timing

STEADY = Timing(median=10.0, p20=9.8, p80=10.2, rounds=20, first=30.0)
WIDE = Timing(median=5.0, p20=4.0, p80=6.0, rounds=20, first=30.0)  # 40 % apart
WILD = Timing(median=800.0, p20=10.0, p80=1600.0, rounds=7, first=30.0)


def comparison(**timings: Timing) -> Comparison:
    given = {NCHW: replace(STEADY, median=20.0, p20=19.8, p80=20.2), NHWC: STEADY, OURS: STEADY}
    setting = Setting(
        "float32", 1, Verdict(1e-6, 1e-6, 1e-5), 8, 8, 8, (9, 9), given | timings
    )  # fmt: skip
    return Comparison("resnet18", "random", "cpu", {"torch": "2"}, ["a.png"], {}, [setting])


def times_of(result: Comparison):
    *_, table = (part for part in tables.render(result) if not isinstance(part, str))
    rows = [row for row in table.rows if not row.text]
    named = {row.cells[0].strip(): row for row in rows}
    return (
        {name: list(row.cells[1:]) for name, row in named.items()},
        {name: row.style for name, row in named.items()},
    )


def test_a_stable_time_is_bold_and_unmarked():
    result = comparison()
    cells, styles = times_of(result)
    assert cells[OURS] == ["10.0", "9.8", "10.2", "100.0", "1.00"] and styles[OURS] == "bold"
    assert result.warnings == [] and result.to_json()["warnings"] == []


def test_an_unstable_time_is_marked_and_no_winner():
    result = comparison(**{OURS: WIDE})
    cells, styles = times_of(result)
    assert cells[OURS][0] == "~5.0" and cells[OURS][-2:] == ["~200.0", "~0.50"]
    assert cells[NHWC][0] == "10.0" and styles[OURS] == ""
    (line,) = result.warnings
    assert line.startswith("~") and "1 of 3 times" in line and "--seconds" in line
    assert line in list(tables.render(result))
    written = result.to_json()["settings"][0]["timings"][OURS]
    assert written["stable"] is False and written["spread"] == pytest.approx(0.4)


def test_a_ratio_that_says_nothing_is_not_shown():
    """Of a time that was 80 times another's in one half of the rounds and like it in the other."""
    result = comparison(**{OURS: WILD})
    assert times_of(result)[0][OURS][-1] == "?"
    assert result.to_json()["settings"][0]["ratio"][OURS] is None


def test_a_busy_machine_spoils_even_rounds_that_lie_close_together():
    result = comparison(**{OURS: replace(STEADY, busy=0.5)})
    assert times_of(result)[0][OURS][0] == "~10.0"
    first, second = result.warnings
    assert "too busy" in first and "50%" in first and "close what else runs" in first
    assert "1 of 3 times" in second
    assert comparison(**{OURS: replace(STEADY, busy=0.1)}).warnings == []


# (seconds, own CPU seconds, all CPU seconds) per second of wall time, CPUs, threads -> busy
MACHINES = {
    "alone": (2.0, 2.0, 2, 2, 0.0),
    "one other on two CPUs": (1.0, 2.0, 2, 2, 0.5),
    "others where there is room": (2.0, 6.0, 8, 2, 0.0),
    "others everywhere": (1.0, 8.0, 8, 2, 0.5),
    "the kernel counted less than we did": (2.0, 1.9, 2, 2, 0.0),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_others_take_is_what_our_threads_miss(name):
    own, used, cpus, threads, busy = MACHINES[name]
    at = [0.0]
    others = steadiness.Others(
        threads, lambda: at[0], lambda: own * at[0], lambda: (100 + used * at[0], cpus)
    )
    with others:
        at[0] = 3.0
    assert others.busy == pytest.approx(busy)


def test_what_is_not_known_is_not_claimed(tmp_path, monkeypatch):
    at = [0.0]

    def busy(read, seconds):
        at[0] = 0.0
        with steadiness.Others(2, lambda: at[0], lambda: 0.0, read) as others:
            at[0] = seconds
        return others.busy

    assert busy(lambda: None, 3.0) is None  # no /proc/stat
    assert busy(lambda: (0.0, 2), 3.0) is None  # one that is never counted on
    assert busy(lambda: (at[0], 2), 0.05) is None  # too short to count in hundredths
    monkeypatch.setattr(steadiness, "STAT", tmp_path / "absent")
    assert steadiness.used_seconds() is None


def test_the_kernels_columns(tmp_path, monkeypatch):
    """Idle and waiting CPUs are free; what a hypervisor took ("steal") is not; guests are users."""
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  900 0 0 9000 0 0 0 0 0 0\ncpu0 100 20 30 7000 60 5 5 40 9 0\n"
        "cpu1 100 0 0 7000 0 0 0 0 0 0\ncpu12 9999 0 0 0 0 0 0 0 0 0\nintr 5\n"
    )
    monkeypatch.setattr(steadiness, "STAT", stat)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    assert steadiness.used_seconds() == (3.0, 2)
