# SPDX-License-Identifier: Apache-2.0
"""A `Profile` as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from string import Template

from resnet_fast.measuring.steadiness import is_stable, marked
from resnet_fast.profiling import picture, text
from resnet_fast.profiling.findings import Findings
from resnet_fast.profiling.parts import Part
from resnet_fast.profiling.style import STYLE

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>$style
.facts { white-space: pre-wrap }
.big { display: flex; gap: 1em 2.5em; flex-wrap: wrap; margin: 1.2em 0 }
.big b { display: block; font-size: 1.7em; font-weight: 600 }
.flame { width: 100%; min-width: 1000px; display: block }
.flame text { font: 11px system-ui, sans-serif; fill: #1d2733; pointer-events: none }
.flame a:is(:hover, :focus) rect { stroke: var(--text); stroke-width: 1.5 }
.scale { display: flex; align-items: center; gap: .6em; flex-wrap: wrap }
.scale i { width: 160px; height: 12px; display: inline-block; background: $gradient }
.scale i.none { width: 26px; background: $grey }
th { border-bottom: 2px solid var(--rule) }
th.how { border-bottom-width: 1px; color: var(--quiet); font-weight: 400; text-align: center }
thead tr:first-child th:first-child { border: 0 }
td.name, th.name, td.word, th.word { text-align: left }
td.name { position: sticky; left: 0; z-index: 1; background: var(--page) }
tr.gap td { color: var(--quiet); font-style: italic } tr.total td { font-weight: 600 }
td.roof { position: relative; z-index: 0; min-width: 5em }
td.roof i { position: absolute; left: 0; top: 1px; bottom: 1px; opacity: .5; z-index: -1 }
</style></head><body>
<h1>$title</h1>
<div class="facts quiet">$facts</div>$warnings
<div class="big">$figures</div>
$try
<h2>Where the time goes</h2>
<p>Width is time, in execution order from left to right: the model, its stages, their blocks, their
layers. A box tells its figures when pointed at, and leads to its row in the tables below.</p>
<div class="wide">$flame</div>
<p class="scale quiet">far from its roofline <i></i> at its roofline &nbsp; <i class="none"></i>
nothing computed</p>
<h2 id="stages">Stages</h2><div class="wide">$stages</div>
<h2>Layers, in execution order</h2><div class="wide">$layers</div>
<h2>How to read this</h2>
<p>All times are measured, medians. FLOPs (two for a multiply-add) and bytes (each tensor once) are
counted from the layers' shapes; rates are what was counted over what was measured. The
<em>roofline</em> is the least time for them: by arithmetic or by memory, whichever is longer;
<em>of roof</em> is that time over the measured one. What a CPU can do at best is measured too, what
a GPU can is specified by its maker. A layer is <em>bound by launch</em> where starting it takes
longer than its work. Rows in italics are the time between layers, so that the rows add up to the
whole; <em>interruptions</em> are what a whole run takes beyond the sum of its layers' medians:
pauses that hit other layers in each run, or no more than noise. The figures at the top are those of
an unmarked run, as its row has them.</p>
</body></html>
""")
WORDS = ("bound by", "backend", "tile")


def render(profile: Findings) -> str:
    """The page."""
    title = f"{profile.model}, {profile.dtype}, batch {profile.batch}, on {profile.device}"
    colours = ", ".join(
        "rgb({},{},{}) {:.0f}%".format(*colour, share * 100) for share, colour in picture.SCALE
    )
    return PAGE.substitute(
        title=escape(title),
        style=STYLE,
        facts=escape(text.heading(profile)),
        warnings="".join(f"<p class=warning>{escape(line)}.</p>" for line in profile.warnings),
        figures=_figures(profile),
        gradient=f"linear-gradient(90deg, {colours})",
        grey="rgb({},{},{})".format(*picture.GREY),
        **{"try": _suggestions(profile)},
        flame=picture.svg(profile),
        stages=_table("stage", [*profile.stages, *profile.sums], profile),
        layers=_table("layer", [*profile.rows, *profile.sums], profile),
    )


def _figures(profile: Findings) -> str:
    run, stable = profile.run, profile.stable(profile.run)
    figures = [
        (f"{run.seconds * 1e3:.2f} ms", f"a run of {profile.batch}"),
        (f"{profile.batch / run.seconds:.1f}", "images a second"),
        (f"{run.tflops:.3g}", "TFLOP/s"),
    ]
    if profile.roofline is not None:
        figures.append((f"{run.roof:.0%}", "of its roofline"))
    figures = [(marked(big, stable), small) for big, small in figures]
    if run.ratio is not None:
        both = stable and is_stable(run.peer_spread, profile.busy)
        figures.append((marked(f"{run.ratio:.2f}", both), f"of {profile.peer}'s time"))
    return "".join(f"<span><b>{escape(big)}</b>{escape(small)}</span>" for big, small in figures)


def _suggestions(profile: Findings) -> str:
    if not profile.suggestions:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in profile.suggestions)
    return f"<h2>What to try</h2><ul>{lines}</ul>"


def _table(first: str, rows: Sequence[Part], profile: Findings) -> str:
    names, anchors = text.columns(profile), picture.anchors(first, rows)
    lines = [(row, text.cells(row, profile)) for row in rows]
    used = [i for i in range(len(names)) if any(cells[i] for _, cells in lines)]
    heads = "".join(f'<th class="{_class(names[i])}">{escape(names[i])}</th>' for i in used)
    body, sums = [], {row.name for row in profile.sums}
    for row, cells in lines:
        kind = "gap" if row.kind == "gap" else "total" if row.name in sums else ""
        found = [f'<td class="name">{escape(row.name)}</td>']
        for i in used:
            bar = _bar(row) if names[i] == "of roof" and cells[i] else ""
            found.append(f'<td class="{_class(names[i])}">{escape(cells[i])}{bar}</td>')
        anchor = f' id="{anchors[id(row)]}"' if id(row) in anchors else ""
        body.append(f'<tr class="{kind}"{anchor}>{"".join(found)}</tr>')
    head = f'<tr><th class="name">{escape(first)}</th>{heads}</tr>'
    above = "".join(
        f'<th class="how" colspan="{len(list(group))}">{how}</th>'
        for how, group in groupby(text.obtained(names[i]) for i in used)
    )
    head = f"<tr><th></th>{above}</tr>{head}"
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _class(column: str) -> str:
    return "word" if column in WORDS else "roof" if column == "of roof" else ""


def _bar(row: Part) -> str:
    colour = "rgb({},{},{})".format(*picture.colour_of(row))
    return f'<i style="width:{min(row.roof, 1) * 100:.0f}%;background:{colour}"></i>'
