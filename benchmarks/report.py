# SPDX-License-Identifier: Apache-2.0
"""Draw a run of `resnet-fast bench`: one HTML page that needs nothing else, and PNGs.

python -m benchmarks.report FOLDER       of the run's rows.json; the page is written there too
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from benchmarks import counted, plots
from benchmarks.counted import Modelled
from resnet_fast._table import Column, Table
from resnet_fast.benchmarking import cases, rows, suite, tables
from resnet_fast.benchmarking.rows import Results
from resnet_fast.measuring.machine import environment
from resnet_fast.profiling.roofline import Roofline
from resnet_fast.profiling.style import STYLE

MORE_STYLE = """
.picture { overflow-x: auto } .picture img { max-width: max(100%, 860px); height: auto }
table { width: 100% }
th { position: sticky; top: 0; background: var(--head) }
th.text, td.text { text-align: left; white-space: normal; min-width: 6em }
tr.first td { border-top: 2px solid var(--quiet) } tr.ours { font-weight: 600 }
td.why { text-align: left; white-space: normal; color: var(--warn) }
.how { display: inline-block; padding: 0 .5rem; border-radius: .6rem; color: white;
       font-size: 12px; vertical-align: middle }
.measured { background: #3d5678 } .counted { background: #66793c } .modelled { background: #a05a2c }
.scroll { overflow: auto; max-height: 34rem }
"""

TEXTS = {
    "throughput": "Up is better. A line per provider; where one has no point, its row in the table "
    "says why. A hollow point is not stable.",
    "layers": "A bar per layer: how many times faster than eager torch, which runs convolution, "
    "BatchNorm, addition and ReLU one after the other. Hatched: not stable. A layer whose "
    "times lie too far apart has no bar.",
    "roofline": "A device can do no more than its roof: the slope is memory, the flat part "
    "arithmetic. Left, where the layers were measured to be. Right, nothing was measured: "
    "roofs alone, and a stroke for each layer at its FLOPs per byte. Left of the bend, memory "
    "binds it, and fewer bytes are what helps.",
    "bytes": "What fusion saves: feature maps that are no longer written and read again. Each "
    "tensor counts once for every layer that reads or writes it.",
}


def write(
    results: Results, roofs: dict[str, Roofline], modelled: Sequence[Modelled], folder: Path
) -> list[Path]:
    """Write report.html and the PNGs; return their paths.

    Args:
        results: of a run.
        roofs: of the machine, by dtype, for the roofline picture.
        modelled: GPU kernels that were counted and not run.
        folder: where.
    """
    drawn = plots.pictures(results, roofs)
    files = []
    for name, png in drawn.items():
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(png)
    files.append(folder / "report.html")
    files[-1].write_text(page(results, drawn, modelled), encoding="utf-8")
    return files


def page(results: Results, drawn: dict[str, bytes], modelled: Sequence[Modelled] = ()) -> str:
    """The page: pictures and tables, each headed by how its numbers were obtained."""
    parts = [_head(results)]
    for kind, title, name in (
        ("models", "Models", "throughput"),
        ("ops", "Single layers", "layers"),
    ):
        found = [row for row in results.rows if row.suite == kind]
        if found:
            table = tables.times(kind, found)
            parts += [_title(title, "measured"), _picture(drawn, name)]
            parts.append(f"<p class=quiet>{escape(table.title)}. p20 to p80 hold the middle three "
                         "fifths of the rounds. Errors are against float64. Inputs: "
                         f"{escape(tables.inputs_of(found))}.</p>{_table(table)}")  # fmt: skip
    parts += [_title("Rooflines", "measured", "modelled"), _picture(drawn, "roofline")]
    parts += [_title("Bytes per image", "counted"), _picture(drawn, "bytes")]
    if modelled:
        parts += [_title("GPU kernels, not run here", "counted", "modelled"), _modelled(modelled)]
    if results.left_out:
        listed = "".join(
            f"<li>{escape(name)}: {escape(why)}</li>" for name, why in results.left_out.items()
        )
        parts.append(f"<h2>Not asked</h2><ul class=quiet>{listed}</ul>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<title>resnet_fast: benchmark</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}{MORE_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _how(kind: str) -> str:
    return f'<span class="how {kind}">{kind}</span>'


def _title(text: str, *kinds: str) -> str:
    return f"<h2>{escape(text)} {' '.join(map(_how, kinds))}</h2>"


def _head(results: Results) -> str:
    facts = str(results.rows[0].environment) if results.rows else ""
    cut = (
        "" if results.complete else "<p><b>Interrupted: only what was measured until then.</b></p>"
    )
    warned = "".join(f"<p class=warning>{escape(text)}.</p>" for text in results.warnings)
    return (
        "<h1>resnet_fast: benchmark</h1>"
        f"<p class=quiet>{escape(facts)}<br>{escape(results.command)} took "
        f"{results.seconds:.0f} s</p>{cut}{warned}"
        f"<p>{_how('measured')} was timed on this machine, after the answer was checked against "
        f"float64. {_how('counted')} was counted, from shapes or by running compiled code on the "
        f"PTX machine; nothing was timed. {_how('modelled')} is what a roofline makes of counts: a "
        "bound that no kernel can beat, not a promise that one reaches it.</p>"
    )


def _picture(drawn: dict[str, bytes], name: str) -> str:
    if name not in drawn:
        return "<p class=quiet>Nothing was measured to draw here.</p>"
    data = base64.b64encode(drawn[name]).decode()
    text = TEXTS[name]
    image = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
    return f"<p>{text}</p><div class=picture>{image}</div>"


def _table(table: Table) -> str:
    """A terminal's table as HTML; a text behind a row's cells fills the columns that are left."""
    heads = "".join(_cell("th", column.name, not column.right) for column in table.columns)
    lines = []
    for row in table.rows:
        cells = [_cell("td", cell.strip(), not column.right)
                 for column, cell in zip(table.columns, row.cells, strict=False)]  # fmt: skip
        if row.text:
            kind = "why" if row.style else "text"
            rest = len(table.columns) - len(cells)
            cells.append(f"<td class={kind} colspan={rest}>{escape(row.text.strip())}</td>")
        kind = "first" if not row.cells and not row.style else "ours" * (row.style == "bold")
        lines.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    return (
        f"<div class=scroll><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(tag: str, text: str, left: bool) -> str:
    return f"<{tag}{' class=text' if left else ''}>{escape(text)}</{tag}>"


def _modelled(found: Sequence[Modelled]) -> str:
    gpus = list(found[0].modelled_ms)
    texts = ("layer", "shape", "kernel")
    names = [*texts, "counted: MB", "counted: sectors / least", "counted: wavefronts / least",
             "modelled from", *(f"modelled µs ({gpu})" for gpu in gpus)]  # fmt: skip
    table = Table("", [Column(name, name not in texts) for name in names])
    for m in sorted(found, key=lambda m: m.modelled_from != "counted"):
        moved = None if m.counted_dram_bytes is None else m.counted_dram_bytes / 1e6
        kernel = f"{m.kernel} {m.tile} sm_{m.arch}" if m.kernel else ""
        counts = (moved, m.counted_sectors, m.counted_wavefronts)
        table.add(
            m.where, m.shape, kernel, *(tables.number(value, ".2f") for value in counts),
            m.modelled_from, *(f"{m.modelled_ms[gpu] * 1e3:.2g}" for gpu in gpus),
        )  # fmt: skip
    none = "" if any(m.kernel for m in found) else (
        " Nothing was counted in this checkout: <code>python -m benchmarks.counts --json</code> "
        "writes counts, which need nvcc and no GPU."
    )  # fmt: skip
    return (
        "<p class=quiet>No GPU was used. Bytes are counted on the PTX machine where a kernel is "
        f"named, and follow from the shape alone elsewhere.{none}</p>{_table(table)}"
    )


def main(folder: Path) -> list[Path]:
    """Draw the run that a folder holds; roofs are drawn on the machine that it was measured on."""
    results = rows.read(folder)
    ours = [row for row in results.rows if row.environment.kind == "cpu"]
    here = environment(torch.device("cpu"))
    same = ours and ours[0].environment.device == here.device
    roofs = suite.roofs_of(ours, torch.device("cpu"), print) if same else {}
    ops = any(row.suite == "ops" for row in ours)
    return write(results, roofs, counted.modelled(cases.SHAPES_FROM) if ops else (), folder)


if __name__ == "__main__":
    print(*main(Path(sys.argv[1])), sep="\n")
