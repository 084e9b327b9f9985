# SPDX-License-Identifier: Apache-2.0
"""Rows go to disk and come back whole; another version is refused by name; runs are compared."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields, replace

import pytest

from resnet_fast.benchmarking import changes, rows
from resnet_fast.benchmarking.rows import Result, Results
from resnet_fast.measuring import protocol
from tests.benchmarking.fakes import ENVIRONMENT, row

EAGER = "torchvision-channels_last"


def results() -> Results:
    threw = row(
        "compile", status=protocol.THREW, reason='RuntimeError: "quoted", and\na second line'
    )
    timeless = {f.name: None for f in fields(Result) if f.name.endswith("_ms")}
    return Results(
        rows=[row(), row(EAGER, 20.0, stable=True, warm_up=7), replace(threw, **timeless)],
        left_out={"models: x": "no GPU"},
        complete=False,
        command="resnet-fast bench",
        seconds=1.5,
    )


def test_json_round_trip(tmp_path):
    rows.write(results(), tmp_path)
    assert rows.read(tmp_path / "rows.json") == rows.read(tmp_path) == results()


def test_csv_round_trip(tmp_path):
    rows.write(results(), tmp_path)
    assert rows.read(tmp_path / "rows.csv").rows == results().rows


def test_a_row_has_all_that_is_needed_to_repeat_it(tmp_path):
    rows.write(results(), tmp_path)
    heading = (tmp_path / "rows.csv").read_text().partition("\n")[0].split(",")
    for name in (
        "version", "shape", "dtype", "layout", "backend", "tile", "environment.device",
        "environment.clocks", "environment.driver", "environment.torch", "environment.triton",
        "environment.cudnn", "environment.commit", "inputs", "peak_memory_mb", "first_ms",
        "wall_ms", "wall_p20_ms", "wall_p80_ms", "wall_p99_ms", "device_ms", "device_how", "error",
        "eager_error",
    ):  # fmt: skip
        assert name in heading, name


def test_nan_is_text_in_json_and_the_file_stays_json(tmp_path):
    rows.write(Results(rows=[row(error=math.nan)]), tmp_path)
    data = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)
    assert data["rows"][0]["error"] == "nan"


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_another_version_is_refused_by_name(tmp_path, name):
    rows.write(results(), tmp_path)
    path = tmp_path / name
    text = path.read_text()
    if name.endswith("json"):
        text = text.replace(f'"version": {rows.VERSION}', '"version": 7')
    else:
        text = text.replace(f"{rows.SCHEMA},{rows.VERSION},", f"{rows.SCHEMA},7,")
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*version 7.*reads version {rows.VERSION}"):
        rows.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other", "version": 2}', "no json"])
def test_a_file_of_something_else_is_refused_by_name(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json"):
        rows.read(path)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    rows.write(results(), tmp_path)
    path = tmp_path / "rows.json"
    data = json.loads(path.read_text())
    del data["rows"][0]["provider"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"rows\.json.*damaged"):
        rows.read(path)


def run(scale: dict[str, float], seed: int, drift: float = 1.0, scatter: float = 0.05) -> Results:
    """A run as a noisy machine gives it: rounds scatter, and all of it drifts."""
    noise = random.Random(seed)
    found = []
    for batch in (1, 8):
        for provider, ms in ((EAGER, 20.0), ("compile", 14.0), ("resnet_fast", 12.0)):
            factor = scale.get(provider, 1.0) * drift
            times = sorted(ms * factor * noise.gauss(1, scatter) for _ in range(15))
            spread = {"wall_p20_ms": times[3], "wall_p80_ms": times[11], "rounds": 15}
            found.append(row(provider, times[7], batch=batch, **spread))
    return Results(rows=found)


@pytest.mark.parametrize("seed", range(20))
def test_two_runs_of_the_same_code_are_not_flagged(seed):
    """Neither by the scatter of their rounds nor because the machine was slower the second time."""
    found = changes.changes(run({}, seed), run({}, 100 + seed, drift=1.4))
    assert len(found) == 6 and changes.regressions(found) == []
    assert {c.verdict for c in found if c.row.provider == EAGER} == {changes.DRIFT}


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_slowdown_of_30_percent_is_flagged(seed):
    found = changes.changes(run({}, seed), run({"resnet_fast": 1.3}, 100 + seed, drift=0.9))
    found = changes.regressions(found)
    assert {(c.row.provider, c.row.batch) for c in found} == {
        ("resnet_fast", 1),
        ("resnet_fast", 8),
    }
    assert all(c.verdict == changes.SLOWER and c.relative for c in found)


def test_a_models_time_is_its_wall_time_and_an_ops_the_devices():
    """What a CUDA graph saves is the host's time: by the device's it would save nothing."""
    device = {"device_ms": 4.0, "device_p20_ms": 3.9, "device_p80_ms": 4.1}
    model, op = row(ms=10.0, **device), row(ms=10.0, suite="ops", **device)
    assert (model.clock, model.time_ms) == ("wall", 10.0)
    assert (op.clock, op.time_ms) == ("device", 4.0)
    assert op.timing.scatter == pytest.approx(0.05 / 1.683 * 1.2533 / 3)


def test_without_eager_times_themselves_are_compared():
    old, new = Results(rows=[row(ms=10)]), Results(rows=[row(ms=13)])
    (change,) = changes.changes(old, new)
    assert change.verdict == changes.SLOWER and not change.relative
    assert change.ratio == pytest.approx(1.3)
    assert changes.changes(new, old)[0].verdict == changes.FASTER


def test_a_time_that_was_lost_is_a_regression():
    lost = replace(row(), status=protocol.FAILED, reason="error 1 exceeds 0.1", wall_ms=None)
    (change,) = changes.regressions(changes.changes(Results([row()]), Results([lost])))
    assert change.verdict == changes.NO_TIME


def test_only_rows_of_one_kind_of_device_are_compared():
    gpu = replace(row(ms=99), environment=replace(ENVIRONMENT, kind="cuda"))
    assert changes.changes(Results([row()]), Results([gpu])) == []


def test_noise_that_hides_a_change_is_said():
    old, new = Results([row(ms=10, spread=0.6)]), Results([row(ms=13, spread=0.6)])
    (change,) = changes.changes(old, new)
    assert change.verdict == changes.SAME and change.noise > 0.3
