# SPDX-License-Identifier: Apache-2.0
"""The report's pictures, each headed by how its numbers were obtained."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks import counted
from resnet_fast import _hardware
from resnet_fast.benchmarking import cases
from resnet_fast.benchmarking.providers import EAGER
from resnet_fast.benchmarking.rows import Result, Results
from resnet_fast.benchmarking.tables import eager_of
from resnet_fast.measuring.peers import OURS
from resnet_fast.profiling.roofline import Roofline, roofline_of_gpu

OURS_COLOR = "#d1495b"
COLORS = ("#7a8793", "#2e4057", "#66a182", "#edae49", "#00798c", "#8d6a9f", "#b08968", "#4f5d75")
MARKERS = "osD^vPX*"
SHOWN_GPU = 90  # whose roofline the modelled panel draws
MODELS_SHOWN = 6


def pictures(results: Results, roofs: dict[str, Roofline]) -> dict[str, bytes]:
    """PNGs by name: those for which there are numbers.

    Args:
        results: of a run.
        roofs: of the machine that it was measured on, by dtype.
    """
    models = [row for row in results.rows if row.suite == "models" and row.measured]
    ops = [row for row in results.rows if row.suite == "ops" and row.measured]
    drawn = {
        "throughput": throughput(models) if models else None,
        "layers": speedups(ops) if ops else None,
        "roofline": rooflines(ops, roofs),
        "bytes": bytes_per_image(_models_of(results)),
    }
    return {name: _png(figure) for name, figure in drawn.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()


def _models_of(results: Results) -> list[str]:
    found = dict.fromkeys(row.subject for row in results.rows if row.suite == "models")
    return list(found)[:MODELS_SHOWN] or list(cases.FIRST_MODELS)


def _color(provider: str, providers: Sequence[str]) -> str:
    if provider == OURS:
        return OURS_COLOR
    others = [name for name in providers if name != OURS]
    return COLORS[others.index(provider) % len(COLORS)]


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def throughput(found: list[Result]) -> Figure:
    """Images per second against the batch, a panel per model and dtype, a line per provider."""
    panels = list(dict.fromkeys((row.subject, row.dtype) for row in found))
    providers = list(dict.fromkeys(row.provider for row in found))
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    width = max(7.0, 3.2 * columns)
    figure = Figure(figsize=(width, 2.8 * lines + 1.1), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (model, dtype) in zip(grid, panels, strict=False):
        _clean(axes)
        for i, provider in enumerate(providers):
            of_panel = [row for row in found if (row.subject, row.dtype) == (model, dtype)]
            line = sorted((r for r in of_panel if r.provider == provider), key=lambda r: r.batch)
            color, wide = _color(provider, providers), 2.4 if provider == OURS else 1.3
            style = {"marker": MARKERS[i % len(MARKERS)], "color": color}
            axes.plot(*_points(line), linewidth=wide, label=provider, **style)
            hollow = [row for row in line if not row.stable]
            axes.plot(*_points(hollow), linestyle="", markerfacecolor="white", zorder=3, **style)
        batches = sorted({row.batch for row in found})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(f"{model}, {dtype}", fontsize=10)
        axes.set_xlabel("batch")
    for axes in list(grid):
        axes.set_visible(False)
    figure.axes[0].set_ylabel("images per second")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle("Measured: throughput against batch", fontweight="bold")
    return figure


def _points(line: list[Result]) -> tuple[list[int], list[float]]:
    return [row.batch for row in line], [row.images_per_s for row in line]


def speedups(found: list[Result]) -> Figure | None:
    """Eager's time over ours, layer by layer, and the same of the best peer."""
    bars = []
    for row in found:
        eager = eager_of(row, found)
        if row.provider != OURS or eager is None:
            continue
        rest = [r for r in found if r.case == row.case and r.provider != eager.provider]
        peers = [r for r in rest if not r.provider.startswith(OURS) and r.stable]
        peer = min(peers, key=lambda r: r.time_ms, default=None)
        ratios = [other and other.over(eager) for other in (row, peer)]
        if ratios[0] is not None:
            hatch = None if row.stable and eager.stable else "////"
            bars.append((row, 1 / ratios[0], ratios[1] and 1 / ratios[1], peer, hatch))
    if not bars:
        return None
    figure = Figure(figsize=(9.5, 0.42 * len(bars) + 1.8), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.7)
    axes.grid(False, axis="y")
    for i, (_, ours, other, peer, hatch) in enumerate(bars):
        label = "resnet_fast" if i == 0 else None
        axes.barh(i - 0.18, ours, 0.36, color=OURS_COLOR, label=label, hatch=hatch, ec="white")
        if other:
            label = None if i else "the fastest peer with a stable time (named on its bar)"
            axes.barh(i + 0.18, other, 0.36, color=COLORS[0], label=label)
            axes.text(other, i + 0.18, f" {peer.provider}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [_layer(row) for row, *_ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster than {EAGER['ops']} (eager, unfused)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle("Measured: speed-up per layer", fontweight="bold")
    return figure


def _layer(row: Result) -> str:
    shape = row.shape.removesuffix(f", {row.dtype}")
    return f"{row.subject} {shape}, {row.dtype}".replace(" and ", "\nand ")


def rooflines(found: list[Result], roofs: dict[str, Roofline]) -> Figure:
    """Measured layers under this machine's roof, and where layers lie below a GPU's, a model."""
    figure = Figure(figsize=(11, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in found if row.provider == OURS and row.flops]
    for i, dtype in enumerate(dict.fromkeys(row.dtype for row in rows)):
        points = [row for row in rows if row.dtype == dtype]
        x = [row.flops / row.bytes for row in points]
        label = f"{dtype}, {OURS}"
        left.scatter(x, [row.tflops for row in points], color=COLORS[i + 1], s=26, label=label)
        if dtype in roofs:
            _roof(left, roofs[dtype], COLORS[i + 1], x)
    source = next((roof.source for roof in roofs.values()), "measured")
    left.set_title(f"Measured: layers under this machine's roof ({source})", fontsize=10)
    gpu = _hardware.GPUS[SHOWN_GPU]
    for i, dtype in enumerate(("float16", "tf32")):
        _shapes_under(right, roofline_of_gpu(gpu, dtype), dtype, i)
    right.set_title(f"Modelled: {gpu.name}'s roofs, and where layers lie below them", fontsize=10)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs per byte (each tensor moved once)")
        axes.set_ylabel("TFLOP/s")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axes.margins(y=0.1)
        if axes.get_legend_handles_labels()[0]:  # below the axes: within, a roof may be anywhere
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
        else:
            axes.text(0.5, 0.5, "no layer was measured", transform=axes.transAxes, ha="center")
    return figure


def _shapes_under(axes: Axes, roof: Roofline, dtype: str, place: int) -> None:
    """A GPU's roof, and along its foot a stroke per layer: what binds follows from the shape."""
    listed = cases.op_cases(cases.SHAPES_FROM, [1], [dtype], "cuda")
    layers = [case for case in listed if case.op == "conv_bn_act"]
    x = [case.flops / case.bytes for case in layers]
    left = sum(v < _bend(roof) for v in x)
    label = f"{dtype}, batch 1: {left} of {len(layers)} distinct convolutions left of the bend"
    color = (OURS_COLOR, COLORS[4])[place]
    at = axes.get_xaxis_transform()  # heights as parts of the axes
    axes.vlines(x, 0.06 * place, 0.06 * place + 0.05, color=color, transform=at, label=label)
    _roof(axes, roof, color, x)


def _bend(roof: Roofline) -> float:
    """FLOPs per byte at which memory and arithmetic take as long as each other."""
    return roof.tflops * 1e3 / roof.bandwidth_gbs


def _roof(axes: Axes, roof: Roofline, color: str, x: list[float]) -> None:
    bend = _bend(roof)
    points = (min([*x, bend]) / 2, bend, max([*x, bend]) * 2)
    heights = [min(roof.tflops, v * roof.bandwidth_gbs / 1e3) for v in points]
    axes.plot(points, heights, color=color, linewidth=1.2)


def bytes_per_image(models: list[str]) -> Figure:
    """MB that an image moves through a network, by level of fusion, in 16-bit elements."""
    levels = list(counted.bytes_by_fusion(models[0]))
    figure = Figure(figsize=(9.5, 0.62 * len(levels) * len(models) ** 0.5 + 1.6),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    height = 0.8 / len(levels)
    shades = ("#2e4057", "#5a7089", "#8ea3b5", OURS_COLOR, "#e8a5ad")
    for j, level in enumerate(levels):
        values = [counted.bytes_by_fusion(model)[level][0] / 2 / 1e6 for model in models]
        places = [i + (j - (len(levels) - 1) / 2) * height for i in range(len(models))]
        bars = axes.barh(places, values, height * 0.92, color=shades[j], label=level)
        axes.bar_label(bars, fmt=" %.1f", fontsize=8)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("MB of feature maps per image, read and written (16-bit elements; no weights)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle("Counted from shapes: bytes per image by level of fusion", fontweight="bold")
    return figure
