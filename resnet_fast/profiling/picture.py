# SPDX-License-Identifier: Apache-2.0
"""The flame picture of a `Profile`: width is time, colour the share of the roofline.

    model     |                     ResNet                      |
    stage     | stem  |      layer1       |      layer2  ...    |
    block             |  layer1.0  | ...  |
    layer     | conv1 | conv1|conv2| ...

Laid out once (`boxes`), drawn twice: as SVG for the page, and as PNG by matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import groupby, pairwise
from typing import NamedTuple

from resnet_fast.measuring.steadiness import marked
from resnet_fast.profiling.findings import Findings
from resnet_fast.profiling.parts import Part, total
from resnet_fast.profiling.trace import block_of

LEVELS = ("model", "stage", "block", "layer")
GREY = (216, 219, 224)
# Share of the roofline -> colour: far from it is warm, close to it cool.
SCALE = (
    (0.0, (240, 128, 96)),
    (0.35, (250, 202, 110)),
    (0.7, (140, 200, 150)),
    (1.0, (70, 160, 190)),
)
WIDTH, ROW, LETTER = 1160.0, 34.0, 6.6  # of the SVG, in pixels; a letter is about so wide


class Box(NamedTuple):
    """One rectangle: `begin` and `width` as parts of the whole, `level` from the top.

    `anchor` is the id of the table's row with its figures; a block's is that of its first layer.
    """

    name: str
    level: int
    begin: float
    width: float
    row: Part
    anchor: str


def anchors(table: str, rows: Sequence[Part]) -> dict[int, str]:
    """The ids of a table's rows, the table being that of "stage" or "layer", by the rows' own."""
    return {id(row): f"{table}-{number}" for number, row in enumerate(rows)}


def boxes(profile: Findings) -> list[Box]:
    """All rectangles of the picture, level by level."""
    rows = [row for row in profile.rows if row.seconds > 0]
    whole = sum(row.seconds for row in rows) or 1.0
    starts, at = {}, 0.0
    for row in rows:
        starts[id(row)] = at
        at += row.seconds / whole
    found = [Box(profile.model, 0, 0.0, 1.0, profile.total, "stages")]
    of_layer = anchors("layer", profile.rows)
    of_stage = {row.name: f"stage-{number}" for number, row in enumerate(profile.stages)}
    for level, group in ((1, _stage), (2, block_of)):
        for name, members in groupby(rows, group):
            members = list(members)
            if name:
                summed = replace(total(members, name, profile.seconds), stage=members[0].stage)
                begin, width = starts[id(members[0])], summed.seconds / whole
                anchor = of_stage[name] if level == 1 else of_layer[id(members[0])]
                found.append(Box(name, level, begin, width, summed, anchor))
    for row in rows:
        begin, width = starts[id(row)], row.seconds / whole
        found.append(Box(row.name, 3, begin, width, row, of_layer[id(row)]))
    return found


def colour_of(row: Part) -> tuple[int, int, int]:
    """Red, green and blue for a row's share of the roofline; grey where it has none."""
    if not row.roof:
        return GREY
    share = min(row.roof, 1.0)
    for (low, a), (high, b) in pairwise(SCALE):
        if share <= high:
            part = (share - low) / (high - low)
            return tuple(round(x + (y - x) * part) for x, y in zip(a, b, strict=True))
    return SCALE[-1][1]


def svg(profile: Findings) -> str:
    """The picture as SVG; a rectangle tells its figures when pointed at, and leads to its row."""
    height = ROW * len(LEVELS)
    parts = [
        f'<svg class="flame" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="Time by stage, block and layer">'
    ]
    for box in boxes(profile):
        x, width = box.begin * WIDTH, box.width * WIDTH
        fill = "rgb({},{},{})".format(*colour_of(box.row))
        label = label_of(box, width / LETTER)
        text = (
            f'<text x="{x + 4:.2f}" y="{(box.level + 0.62) * ROW:.1f}">{escape(label)}</text>'
            if label
            else ""
        )
        parts.append(
            f'<a href="#{box.anchor}"><title>{escape(told(box, profile))}</title><rect x="{x:.2f}" '
            f'y="{box.level * ROW:.1f}" width="{width:.2f}" height="{ROW - 1:.1f}" '
            f'fill="{fill}"/>{text}</a>'
        )
    return "".join([*parts, "</svg>"])


def told(box: Box, profile: Findings) -> str:
    """What a rectangle tells: name, time, share, and what binds it."""
    row = box.row
    time = marked(f"{row.seconds * 1e3:.3f} ms", profile.stable(row))
    text = f"{box.name}: {time}, {row.share:.1%} of the time"
    if row.bytes and profile.roofline is not None:
        text += f", {row.roof:.0%} of its roofline, bound by {row.bound}"
    return f"{text}, {row.backend}" if row.backend else text


def label_of(box: Box, letters: float) -> str:
    """The name, or what it adds to the box above, if so many letters can hold it."""
    above = box.row.stage if box.level == 2 else block_of(box.row) if box.level == 3 else ""
    for text in (box.name, box.name.removeprefix(f"{above}.")):
        if len(text) + 1 <= letters:
            return text
    return ""


def write_png(profile: Findings, file) -> None:
    """The picture as a PNG.

    Args:
        profile: to be drawn.
        file: a path, or a file opened for writing bytes.

    Raises:
        ImportError: matplotlib is missing; the text says what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{error}; pip install "resnet_fast[bench]"') from None
    figure = Figure(figsize=(15, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    milliseconds = sum(row.seconds for row in profile.rows if row.seconds > 0) * 1e3
    for box in boxes(profile):
        x, width = box.begin * milliseconds, box.width * milliseconds
        colour = [part / 255 for part in colour_of(box.row)]
        axes.barh(-box.level, width, 0.97, x, color=colour, edgecolor="white", linewidth=0.5)
        label = label_of(box, box.width * WIDTH / LETTER)
        if label:
            axes.text(x + width / 2, -box.level, label, ha="center", va="center", fontsize=8)
    axes.set_xlim(0, milliseconds)
    axes.set_yticks([-level for level in range(len(LEVELS))], LEVELS)
    axes.set_xlabel("milliseconds, measured, in execution order")
    axes.set_title(
        f"{profile.model}, {profile.dtype}, batch {profile.batch}, {profile.device}: "
        f"{profile.seconds * 1e3:.2f} ms",
        loc="left",
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    steps = [(share, [part / 255 for part in colour]) for share, colour in SCALE]
    scale = ScalarMappable(cmap=LinearSegmentedColormap.from_list("roofline", steps))
    scale.set_clim(0, 100)
    figure.colorbar(scale, ax=axes, label="% of the roofline (grey: none)", pad=0.01)
    figure.savefig(file, format="png")


def _stage(row: Part) -> str:
    return row.stage
