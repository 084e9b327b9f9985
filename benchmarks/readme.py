# SPDX-License-Identifier: Apache-2.0
"""Write the tables of the READMEs from results: `python -m benchmarks.readme`.

All times of models come from one run, of about ten minutes on two cores:

    resnet-fast bench models --models resnet18 resnet50 --batch 1 8 --dtype fp32 bf16 --out \\
        benchmarks/results/cpu --providers torchvision-contiguous torchvision-channels_last \\
        resnet_fast compile openvino

The other tables are of

    resnet-fast profile resnet50 --dtype bf16 --compare torchvision
        --json benchmarks/results/cpu/profile.json
    python -m benchmarks.counts --json benchmarks/results/counts/resnet50.json
    python -m benchmarks.counts --bytes --json benchmarks/results/counts/bytes.json
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

from resnet_fast.benchmarking import rows
from resnet_fast.benchmarking.rows import Result, Results
from resnet_fast.measuring import peers
from resnet_fast.measuring.peers import EAGER, OURS
from resnet_fast.measuring.steadiness import MARK, NO_RATIO, NOTE, is_stable, marked, ratio_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "benchmarks" / "README.md")
RESULTS = ROOT / "benchmarks" / "results"
RUN = RESULTS / "cpu" / "rows.json"


def table(heads: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def cases_of(results: Results) -> tuple[list[str], list[dict[str, Result]]]:
    """Ours and its peers by name, and the measured rows of each model's case by provider."""
    found: dict[tuple, dict[str, Result]] = {}
    for row in results.rows:
        if row.suite == "models" and row.measured:
            found.setdefault(row.case, {})[row.provider] = row
    names = dict.fromkeys(name for case in found.values() for name in case)
    return sorted(set(names) - set(EAGER), key=lambda name: (name != OURS, name)), [*found.values()]


def ratios(results: Results) -> str:
    """torchvision's time at its best and the others' over it, and what follows from the cells."""
    names, found = cases_of(results)
    lines = []
    for case in found:
        eager = [case[name] for name in EAGER if name in case]
        if eager:
            best = min(eager, key=lambda row: row.time_ms)
            start = [best.subject, best.dtype, str(best.batch)]
            start.append(marked(f"{best.time_ms:.1f}", best.stable))
            lines.append([*start, *(ratio(case.get(name), best) for name in names)])
    if not lines:
        return "No model was measured."
    text = table(["model", "dtype", "batch", "torchvision at its best (ms)", *names], lines)
    return f"{text}\n\n{counted_out(found)} {about(results, text)}"


def ratio(row: Result | None, best: Result) -> str:
    """A cell: a time over eager's; a dash where there is none."""
    return "-" if row is None else ratio_text(row.over(best), row.stable and best.stable)


def counted_out(found: list[dict[str, Result]]) -> str:
    """In how many cases ours is faster than each other, of those where the times can tell."""
    parts = []
    for name in dict.fromkeys(name for case in found for name in case if name != OURS):
        pairs = [(case[OURS], case[name]) for case in found if {OURS, name} <= set(case)]
        pairs = [(ours, other) for ours, other in pairs if ours.over(other) is not None]
        faster = sum(ours.time_ms < other.time_ms for ours, other in pairs)
        parts += [f"than {name} in {faster} of {len(pairs)} rows"] if pairs else []
    return f"By its median, {OURS} is faster {', '.join(parts)}." if parts else ""


def about(results: Results, text: str) -> str:
    """What a table's names and marks mean, and how and on what it was measured."""
    first = results.rows[0]
    known = {p.name: p.about.partition(";")[0] for p in peers.MODEL_PROVIDERS}
    named = [name for name in peers.NAMED if f" {name} " in text]
    said = "".join(f" {name}: {known[name]}." for name in named)
    parts = [f"Ratios to torchvision's time; below 1 is faster, a dash is no time.{said}"]
    if MARK in text or NO_RATIO in text:
        parts.append(f"{NOTE}.")
    parts.append(f"Measured by `{results.command}` on: {first.environment}.")
    return " ".join(parts)


def times(results: Results) -> str:
    """The same run in milliseconds: medians, and p20 to p80."""
    others, found = cases_of(results)
    names = [name for name in EAGER if any(name in case for case in found)] + others

    def cell(row: Result | None) -> str:
        if row is None:
            return "-"
        t = row.timing
        return f"{marked(f'{t.median:.1f}', row.stable)} ({t.p20:.1f} to {t.p80:.1f})"

    lines = [
        [next(iter(case.values())).label, *(cell(case.get(name)) for name in names)]
        for case in found
    ]
    return table(["model", *(f"{name} (ms)" for name in names)], lines)


def counted(name: str, *layers: str) -> str:
    """What `counts.py` counted, of some layers or all."""
    counts = runpy.run_path(str(ROOT / "benchmarks" / "counts.py"))
    result = json.loads((RESULTS / "counts" / f"{name}.json").read_text())
    return counts["markdown"](result, layers or ("",))


def moved() -> str:
    """Bytes per image of the fused networks, and what eager's layers move."""
    from benchmarks.counted import EAGER, bytes_by_fusion

    # Counted in float32, which is twice as long as what the table stands for.
    eager = {name: bytes_by_fusion(name)[EAGER][0] / 2e6 for name in ("resnet18", "resnet50")}
    said = ", ".join(f"{value:.1f} MB for {name}" for name, value in eager.items())
    return f"{counted('bytes')} From the shapes of its layers, eager PyTorch moves {said}."


def profiled() -> str:
    """A model's stages."""
    result = json.loads((RESULTS / "cpu" / "profile.json").read_text())
    heads = ["stage", "ms", "share", "GB/s", "of roofline", "bound by", f"{result['peer']} (ms)"]
    lines = []
    for row in (*result["stages"], result["total"]):
        stable = is_stable(row.get("spread", 0.0), result.get("busy"))  # not in older files
        cells = [row["name"], marked(f"{row['seconds'] * 1e3:.2f}", stable), f"{row['share']:.0%}"]
        worked = row["bytes"] > 0
        cells += [f"{row['bandwidth_gbs']:.1f}", f"{row['roof']:.0%}"] if worked else ["", ""]
        lines.append([*cells, row["bound"], f"{row['peer'] * 1e3:.2f}" if row["peer"] else ""])
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    what = f"{result['model']}, {result['dtype']}, batch {result['batch']}"
    return (
        f"{table(heads, lines)}\n\n{what}, medians of {result['rounds']} runs, measured on: "
        f"{machine}."
    )


TABLES: dict[
    str, Callable[[], str]
] = {  # by what stands in the markers <!-- begin: ... --> and <!-- end: ... -->
    "benchmarks/readme.py": lambda: ratios(rows.read(RUN)),
    "counts": lambda: counted("resnet50", "layer1-first-conv2"),
    "bytes": moved,
    "bench": lambda: times(rows.read(RUN)),
    "profile": profiled,
}


def rewritten(page: str) -> str:
    """The page with each table of the results between its markers."""
    for name, text in TABLES.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, found, rest = page.partition(begin)
        if found:
            page = f"{before}{begin}\n{text()}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    for path in PAGES:
        if path.exists():
            path.write_text(rewritten(path.read_text()))
