# SPDX-License-Identifier: Apache-2.0
"""Write the tables of both READMEs from results: `python -m benchmarks.readme`.

The results are what these commands wrote:

    resnet-fast compare MODEL --compile --openvino --json benchmarks/results/cpu/MODEL.json
    python -m benchmarks.counts --json benchmarks/results/counts/resnet50.json
    python -m benchmarks.counts --bytes --json benchmarks/results/counts/bytes.json
    resnet-fast bench --quick                  benchmarks/results/MACHINE/rows.json
    resnet-fast profile resnet50 --batch 1 --dtype bfloat16 --compare torchvision --layers
        --json benchmarks/results/MACHINE/profile.json
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from resnet_fast.comparison import tables
from resnet_fast.comparison.steadiness import is_stable, marked

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "benchmarks" / "README.md")
RESULTS = ROOT / "benchmarks" / "results"


def measured() -> str:
    """Times on a CPU, with what they were measured on."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu/*.json"))]
    machine = results[0]["machine"]
    measured = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"{tables.markdown(results)}\n\nMeasured on: {measured}."


def counted(name: str, *layers: str) -> str:
    """What `counts.py` counted, of some layers or all."""
    counts = runpy.run_path(str(ROOT / "benchmarks" / "counts.py"))
    result = json.loads((RESULTS / "counts" / f"{name}.json").read_text())
    return counts["markdown"](result, layers or ("",))


def moved() -> str:
    """Bytes per image of the fused networks, and what eager's layers move."""
    from resnet_fast.benchmarking.counted import EAGER, bytes_by_fusion

    # Counted in float32, which is twice as long as what the table stands for.
    eager = {name: bytes_by_fusion(name)[EAGER][0] / 2e6 for name in ("resnet18", "resnet50")}
    said = ", ".join(f"{value:.1f} MB for {name}" for name, value in eager.items())
    return f"{counted('bytes')} From the shapes of its layers, eager PyTorch moves {said}."


def bench() -> str:
    """Times of the models by the benchmark suite, a table per machine."""
    from resnet_fast.benchmarking import rows, tables

    files = sorted(RESULTS.glob("*/rows.json"))
    return "\n\n".join(tables.markdown(rows.read(file)) for file in files)


def profiled() -> str:
    """A model's stages, a table per machine."""
    parts = []
    for file in sorted(RESULTS.glob("*/profile.json")):
        result = json.loads(file.read_text())
        peer = result["peer"]
        lines = [f"| stage | ms | share | GB/s | of roofline | bound by | {peer} (ms) |"]
        lines.append("|---" * 7 + "|")
        for row in (*result["stages"], result["total"]):
            worked = row["bytes"] > 0
            stable = is_stable(row.get("spread", 0.0), result.get("busy"))  # not in older files
            time = marked(f"{row['seconds'] * 1e3:.2f}", stable)
            cells = [row["name"], time, f"{row['share']:.0%}"]
            cells += [f"{row['bandwidth_gbs']:.1f}", f"{row['roof']:.0%}"] if worked else ["", ""]
            cells += [row["bound"], f"{row['peer'] * 1e3:.2f}" if row["peer"] else ""]
            lines.append("| " + " | ".join(cells) + " |")
        machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
        what = f"{result['model']}, {result['dtype']}, batch {result['batch']}"
        lines.append(f"\n{what}, medians of {result['rounds']} runs, measured on: {machine}.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


TABLES = {  # by what stands in the markers <!-- begin: ... --> and <!-- end: ... -->
    "benchmarks/readme.py": measured,
    "counts": lambda: counted("resnet50", "layer1-first-conv2"),
    "bytes": moved,
    "bench": bench,
    "profile": profiled,
}


def rewritten(readme: str) -> str:
    """A page with each table of the results between its markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, found, rest = readme.partition(begin)
        if found:
            readme = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return readme


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text()))
