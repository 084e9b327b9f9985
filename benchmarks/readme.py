# SPDX-License-Identifier: Apache-2.0
"""Write the tables of the README from measured results: `python benchmarks/readme.py`.

The results are what `resnet-fast compare MODEL --compile --openvino --json FILE` wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

from resnet_fast.comparison.tables import markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BEGIN, END = "<!-- begin: benchmarks/readme.py -->", "<!-- end: benchmarks/readme.py -->"


def table() -> str:
    """The README's table, with what it was measured on."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    machine = results[0]["machine"]
    measured = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"{markdown(results)}\n\nMeasured on: {measured}."


def rewritten(readme: str) -> str:
    """The README with the table of the results between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
