# SPDX-License-Identifier: Apache-2.0
"""The run as one HTML page that needs nothing else, and its pictures as PNGs."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from resnet_fast.benchmarking.providers import EAGER, OURS
from resnet_fast.benchmarking.rows import Results, Row
from resnet_fast.benchmarking.tables import (
    case_text,
    clock_of,
    inputs_of,
    median_cell,
    milliseconds,
    number,
    ratio_cell,
    shortened,
)
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


def write(results: Results, roofs: dict[str, Roofline], folder: Path) -> list[Path]:
    """Write report.html and the PNGs; return their paths.

    Args:
        results: of a run.
        roofs: of the machine, by dtype, for the roofline picture.
        folder: where.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from resnet_fast.benchmarking import plots

    drawn = plots.pictures(results, roofs)
    files = []
    for name, png in drawn.items():
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(png)
    files.append(folder / "report.html")
    files[-1].write_text(page(results, drawn), encoding="utf-8")
    return files


def page(results: Results, drawn: dict[str, bytes]) -> str:
    """The page: pictures and tables, each headed by how its numbers were obtained."""
    models = [row for row in results.rows if row.suite == "models"]
    ops = [row for row in results.rows if row.suite == "ops"]
    parts = [_head(results)]
    if models:
        parts += [_title("Models", "measured"), _picture(drawn, "throughput"), _table(models)]
    if ops:
        parts += [_title("Single layers", "measured"), _picture(drawn, "layers"), _table(ops)]
    parts += [_title("Rooflines", "measured", "modelled"), _picture(drawn, "roofline")]
    parts += [_title("Bytes per image", "counted"), _picture(drawn, "bytes")]
    if results.modelled:
        parts += [_title("GPU kernels, not run here", "counted", "modelled"), _modelled(results)]
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
    facts = ""
    if results.rows:
        e = results.rows[0].environment
        named = {
            "": e.device, "threads": e.threads, "clocks": e.clocks, "driver": e.driver,
            "torch": e.torch, "triton": e.triton, "cuDNN": e.cudnn, "python": e.python,
            "resnet_fast": e.resnet_fast, "commit": e.commit,
        }  # fmt: skip
        facts = " · ".join(f"{k} {v}".strip() for k, v in named.items() if v)
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


def _row(cells: Iterable[str], text: int, kind: str = "") -> str:
    """A table's row whose first `text` cells are words, to the left."""
    tds = "".join(_cell("td", cell, i < text) for i, cell in enumerate(cells))
    return f'<tr class="{kind}">{tds}</tr>'


def _heading(names: Iterable[str], text: int) -> str:
    ths = "".join(_cell("th", name, i < text) for i, name in enumerate(names))
    return f"<thead><tr>{ths}</tr></thead>"


def _cell(tag: str, text: str, left: bool) -> str:
    return f"<{tag}{' class=text' if left else ''}>{escape(text)}</{tag}>"


def _table(found: list[Row]) -> str:
    suite = found[0].suite
    device = any(row.device_ms is not None for row in found)
    names = ["case", "provider", "run by", "ratio", "wall ms", "p20", "p80", "p99"]
    names += ["device ms"] * device + ["first call ms", "peak MB", "error", "eager's", "rounds"]
    names += ["roof"] * (suite == "ops")
    lines, last = [], None
    for row in shortened(found):
        first = row.case != last
        last = row.case
        kinds = {"first": first, "ours": row.provider == OURS and row.stable,
                 "unstable": row.measured and not row.stable}  # fmt: skip
        kind = " ".join(name for name, is_so in kinds.items() if is_so)
        title = case_text(row).replace("->", "→") if first else ""
        if not row.measured:
            why = f"{row.status}: {row.reason}" if row.reason else row.status
            lines.append(
                f'<tr class="{kind}"><td class=text>{escape(title)}</td><td class=text>'
                f"{escape(row.provider)}</td><td class=why colspan={len(names) - 2}>"
                f"{escape(why)}</td></tr>"
            )
            continue
        cells = [title, row.provider, f"{row.backend} {row.tile}".strip()]
        cells += [ratio_cell(row, found), median_cell(row, "wall")]
        cells += map(milliseconds, (row.wall_p20_ms, row.wall_p80_ms, row.wall_p99_ms))
        cells += [median_cell(row, "device")] * device
        cells += [milliseconds(row.first_ms), number(row.peak_memory_mb, ".1f")]
        cells += [number(row.error, ".1e"), number(row.eager_error, ".1e"), str(row.rounds)]
        cells += [number(row.roof_share, ".0%")] * (suite == "ops")
        lines.append(_row(cells, 3, kind))
    return (
        f"<p class=quiet>ratio: {clock_of(found)} time over {escape(EAGER[suite])}'s in the same "
        "rounds; below 1 is faster. p20 to p80 hold the middle three fifths of the rounds. Errors "
        f"are against float64. Inputs: {escape(inputs_of(found))}.</p><div class=scroll>"
        f"<table>{_heading(names, 3)}<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _modelled(results: Results) -> str:
    gpus = list(results.modelled[0].modelled_ms)
    names = ["layer", "shape", "kernel", "counted: MB", "counted: sectors / least",
             "counted: wavefronts / least", "modelled from"]  # fmt: skip
    names += [f"modelled µs ({gpu})" for gpu in gpus]
    lines = []
    for m in sorted(results.modelled, key=lambda m: m.modelled_from != "counted"):
        moved = None if m.counted_dram_bytes is None else m.counted_dram_bytes / 1e6
        kernel = f"{m.kernel} {m.tile} sm_{m.arch}" if m.kernel else ""
        shape = m.shape.replace("->", "→")  # one letter: no line breaks within it
        cells = [m.where, shape, kernel, number(moved, ".2f"), number(m.counted_sectors, ".2f")]
        cells += [number(m.counted_wavefronts, ".2f"), m.modelled_from]
        lines.append(_row([*cells, *(f"{m.modelled_ms[g] * 1e3:.2g}" for g in gpus)], 3))
    none = "" if any(m.kernel for m in results.modelled) else (
        " Nothing was counted in this checkout: <code>python -m benchmarks.counts --json</code> "
        "writes counts, which need nvcc and no GPU."
    )  # fmt: skip
    return (
        "<p class=quiet>No GPU was used. Bytes are counted on the PTX machine where a kernel is "
        f"named, and follow from the shape alone elsewhere.{none}</p><div class=scroll><table>"
        f"{_heading(names, 3)}<tbody>{''.join(lines)}</tbody></table></div>"
    )
