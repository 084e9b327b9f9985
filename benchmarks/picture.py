# SPDX-License-Identifier: Apache-2.0
"""Draw the README's table of times as bars: `python -m benchmarks.picture`.

The bars are read from the table itself, so the two cannot disagree.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.readme import README

PICTURE = Path(__file__).parent / "results" / "ratios.svg"
COLOURS = ("#1b6ca8", "#b8b8b8", "#dcdcdc", "#eeeeee")  # ours first
FIRST_RATIO = "resnet_fast"  # columns from this one on are ratios


def table(readme: str) -> tuple[list[str], list[list[str]], str]:
    """Headings and cells of the generated table of times, and what it was measured on."""
    text = readme.partition("<!-- begin: benchmarks/readme.py -->")[2].partition("<!-- end")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    measured = re.search(r"Measured (?:by .* )?on: (.*)", text)
    return rows[0], rows[2:], measured[1].rstrip(".") if measured else ""


def number(cell: str) -> float | None:
    """A ratio, stable or not; None if there is none."""
    text = cell.removeprefix("~")
    return float(text) if re.fullmatch(r"[0-9.]+", text) else None


def draw(readme: str, to: Path = PICTURE) -> None:
    """Write the picture of the table in a README."""
    import matplotlib
    from matplotlib.figure import Figure

    headings, rows, measured = table(readme)
    first = headings.index(FIRST_RATIO)
    names = headings[first:]
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ratios", "font.size": 9})
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for place, row in enumerate(rows):
            if (ratio := number(row[first + i])) is None:
                continue
            x = place + (i - (len(names) - 1) / 2) * width
            unstable = row[first + i].startswith("~")
            axes.bar(x, ratio, width * 0.92, color=COLOURS[i], edgecolor="#888888",
                     linewidth=0.4, hatch="////" if unstable else None)  # fmt: skip
            axes.text(x, ratio, row[first + i], ha="center", va="bottom", fontsize=6)
        axes.bar(0, 0, color=COLOURS[i], edgecolor="#888888", linewidth=0.4, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.text(-0.45, 1.01, "torchvision = 1", fontsize=7, va="bottom")
    labels = ["\n".join((row[0], row[1], f"batch {row[2]}")) for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(0, 1.15)
    axes.set_ylabel("time / torchvision's time")
    axes.set_title("Time of a forward pass; lower is faster", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", ncols=len(names), frameon=False, fontsize=8)
    figure.supxlabel(f"{measured}; hatched and ~: not stable", fontsize=6)
    figure.savefig(to, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(README.read_text())
