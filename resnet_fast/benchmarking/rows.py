# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: rows that say everything needed to believe or repeat them.

One `Result` per case and provider, also without a time, and then with the reason; as JSON and CSV.
"""

from __future__ import annotations

import csv
import json
import math
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from resnet_fast.benchmarking.cases import label
from resnet_fast.measuring import steadiness
from resnet_fast.measuring.machine import Environment
from resnet_fast.measuring.protocol import MEASURED
from resnet_fast.measuring.steadiness import Timing

SCHEMA = "resnet_fast benchmark rows"
VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One provider on one case. Times are milliseconds; None is "not known", never zero.

    Args:
        suite: "ops" or "models".
        subject: the op, or the model.
        shape: the op's `ConvSpec` as text, or the model's input.
        where: the layers that have this shape.
        batch, dtype: of the input; "tf32" is float32 with TF32 products, "float32" is IEEE.
        provider: what computed it; `layout`, `backend` and `tile` say how. A model has no tile:
            each of its layers has one, which `resnet-fast profile` tells.
        status, reason: "measured", or why there is no time, or fewer rounds than usual.
        error, eager_error, error_limit: against float64, see `resnet_fast.agreement`.
        wall_ms, ...: wall time of the timed rounds: median and percentiles.
        device_ms, ...: time on the GPU alone; `device_how` says "events" or "graph replay".
        first_ms, build_ms: the first call, cold, and what was prepared before it.
        rounds, warm_up: timed rounds, and calls before them.
        busy: the share of the CPU time that others took in the rounds; None where it is not known.
        stable: whether `time_ms` may be taken as a fact, see `measuring.steadiness`.
        inputs: how the timed calls' inputs met the caches.
        peak_memory_mb: what one call needs above what was held before it; `peak_how` says of what.
        flops, bytes: of the whole case at its minimum: each tensor moved once.
        tflops, gbs, images_per_s: from `time_ms`.
        roof_share, bound: the time that the roofline allows over the time taken, and what binds.
    """

    suite: str
    subject: str
    shape: str
    where: str
    batch: int
    dtype: str
    provider: str
    layout: str = ""
    backend: str = ""
    tile: str = ""
    status: str
    reason: str = ""
    error: float | None = None
    eager_error: float | None = None
    error_limit: float | None = None
    wall_ms: float | None = None
    wall_p20_ms: float | None = None
    wall_p80_ms: float | None = None
    wall_p99_ms: float | None = None
    device_ms: float | None = None
    device_p20_ms: float | None = None
    device_p80_ms: float | None = None
    device_p99_ms: float | None = None
    device_how: str = ""
    first_ms: float | None = None
    build_ms: float | None = None
    rounds: int = 0
    warm_up: int = 0
    stable: bool = False
    busy: float | None = None
    inputs: str = ""
    peak_memory_mb: float | None = None
    peak_how: str = ""
    flops: int = 0
    bytes: int = 0
    tflops: float | None = None
    gbs: float | None = None
    images_per_s: float | None = None
    roof_share: float | None = None
    bound: str = ""
    environment: Environment

    @property
    def case(self) -> tuple[str, str, str, int, str]:
        """What rows of different providers have in common."""
        return (self.suite, self.subject, self.shape, self.batch, self.dtype)

    @property
    def label(self) -> str:
        """The case in a few words."""
        return label(self.suite, self.subject, self.shape, self.dtype, self.batch)

    @property
    def measured(self) -> bool:
        return self.status == MEASURED

    @property
    def clock(self) -> str:
        """Which time stands for the row: "device" for an op where it is known, else "wall".

        A user of a model waits for the host too, and a CUDA graph is there to shorten that.
        """
        return "device" if self.suite == "ops" and self.device_ms is not None else "wall"

    @property
    def time_ms(self) -> float | None:
        """The median that stands for the row, by its `clock`."""
        return getattr(self, f"{self.clock}_ms")

    @property
    def timing(self) -> Timing:
        """The rounds by the row's `clock`; of a measured row."""
        parts = (getattr(self, f"{self.clock}_{part}ms") for part in ("", "p20_", "p80_", "p99_"))
        return Timing(*parts, self.rounds, self.busy, self.first_ms)

    def over(self, other: Result) -> float | None:
        """The ratio of the times; None where they scatter so much that it would say nothing."""
        return 1.0 if self is other else self.timing.over(other.timing)


@dataclass(slots=True)
class Results:
    """All rows of a run.

    Args:
        rows: see `Result`.
        left_out: providers that were not asked on this machine, with the reason.
        complete: False where the run was interrupted.
        command: what was asked.
        seconds: how long the run took.
    """

    rows: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    complete: bool = True
    command: str = ""
    seconds: float = 0.0

    @property
    def warnings(self) -> list[str]:
        """What to know before the times are taken as facts; nothing where all of them may be."""
        return steadiness.warnings([row.timing for row in self.rows if row.measured])


def write(results: Results, folder: Path) -> list[Path]:
    """Write rows.json and rows.csv; return their paths."""
    files = [folder / "rows.json", folder / "rows.csv"]
    files[0].write_text(json.dumps(to_json(results), indent=1) + "\n")
    with open(files[1], "w", newline="") as file:
        writer = csv.DictWriter(file, _columns())
        writer.writeheader()
        writer.writerows(to_rows(results))
    return files


def to_json(results: Results) -> dict:
    """Plain data, as rows.json has it."""
    return _plain({"schema": SCHEMA, "version": VERSION, **asdict(results)})


def to_rows(results: Results) -> list[dict[str, object]]:
    """Flat rows, as rows.csv has them."""
    return [_flat(row) for row in results.rows]


def read(path: Path) -> Results:
    """Read what `write` wrote: a rows.json, a rows.csv, or the folder that holds them.

    Raises:
        ValueError: the file is of another schema or version, which is named, or is damaged.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "rows.json"
    if path.suffix == ".csv":
        return Results(rows=_read_csv(path))
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not a file of {SCHEMA!r}")
    check_version(path, data.pop("schema", None), data.pop("version", None))
    try:
        rows = [
            Result(**{**row, "environment": Environment(**row["environment"])})
            for row in data.pop("rows")
        ]
        return Results(rows=rows, **data)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: a damaged file of {SCHEMA!r}: {error}") from None


def check_version(path: Path, schema: object, version: object) -> None:
    """Raise ValueError, by name, for a file of another schema or version."""
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}; this reads {SCHEMA!r}")
    if str(version) != str(VERSION):
        raise ValueError(
            f"{path}: version {version} of {SCHEMA!r}; this resnet_fast reads version {VERSION}: "
            "measure again, or read it with the resnet_fast that wrote it"
        )


def _plain(value: object) -> object:
    """JSON has no NaN: an error that is not a number is written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _columns() -> list[str]:
    own = [f.name for f in fields(Result) if f.name != "environment"]
    return ["schema", "version", *own, *(f"environment.{f.name}" for f in fields(Environment))]


def _flat(row: Result) -> dict[str, object]:
    data = {"schema": SCHEMA, "version": VERSION, **asdict(row)}
    environment = data.pop("environment")
    return data | {f"environment.{name}": value for name, value in environment.items()}


def _read_csv(path: Path) -> list[Result]:
    rows = []
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            check_version(path, line.pop("schema", None), line.pop("version", None))
            prefix = "environment."
            facts = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
            own = {k: v for k, v in line.items() if not k.startswith(prefix)}
            environment = Environment(**_typed(Environment, facts))
            rows.append(Result(**_typed(Result, own), environment=environment))
    return rows


def _typed(kind: type, texts: dict[str, str]) -> dict[str, object]:
    """The texts of a CSV line as the dataclass's types."""
    hints = typing.get_type_hints(kind)
    return {name: _value(hints[name], text) for name, text in texts.items()}


def _value(hint: object, text: str) -> object:
    options = typing.get_args(hint) or (hint,)
    if text == "" and type(None) in options:
        return None
    if bool in options:
        return text == "True"
    if int in options:
        return int(text)
    return float(text) if float in options else text
