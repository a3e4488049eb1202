"""The three charts of a run's training, drawn without any global state of matplotlib.

Training and held-out loss with stage boundaries is Figure 4 of arXiv 2507.07129.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nacre.numbers import count, size
from nacre.report.canvas import LETTER, Theme, canvas, halo, inches, round_ticks, subtitle
from nacre.report.files import RunFiles, Series, StageView


def draw_loss(files: RunFiles, views: Sequence[StageView], theme: Theme, wide: bool) -> Figure:
    """Draw training and held-out loss over all tokens, stages marked and labeled by depth."""
    figure, (ax,) = canvas("Loss over the run", theme, wide, 4.6 if wide else 4.0, right=1.05)
    total = max(views[-1].end, 1)
    longest = max(len(view.training) for view in views)
    window = max(1, longest // 50)
    about = "nats a token"
    if window > 1:
        thin = "training: each step (thin), " if wide else "bold: "
        bold = " (bold)" if wide else ""
        about += f"; {thin}mean of {window // 2 * 2 + 1} steps{bold}"
    subtitle(figure, theme, about)
    points = sum(len(view.held_out) for view in views)
    apart = inches(ax)[0] / max(points, 1) > 0.1
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.2} if apart else {}
    later: list[float] = []
    ends: dict[str, float] = {}
    for index, view in enumerate(views):
        if index % 2:
            ax.axvspan(view.start, view.end, color=theme.band, linewidth=0, zorder=0)
        if index:
            ax.axvline(view.start, color=theme.faint, linewidth=0.8, zorder=1)
        if len(view.training):
            tokens, loss = view.training.T
            mean = smooth(loss, window)
            ax.plot(tokens, loss, color=theme.training, alpha=0.28, linewidth=0.7, zorder=2)
            ax.plot(tokens, mean, color=theme.training, linewidth=1.7, zorder=3)
            later += [*mean[tokens > total / 20], mean[-1], np.nanmin(loss, initial=mean[-1])]
            ends["training"] = mean[-1]
        if len(view.held_out):
            tokens, loss = view.held_out.T[:2]
            ax.plot(tokens, loss, color=theme.held_out, linewidth=1.7, zorder=4, **marker)
            later += [*loss[tokens > total / 20], loss[-1]]
            ends["held-out"] = loss[-1]
    ax.set_xlim(-0.008 * total, 1.004 * total)
    _loss_range(ax, views, later, theme)
    _stage_labels(ax, views, total, theme)
    _end_labels(ax, ends, {"training": theme.training, "held-out": theme.held_out})
    ax.xaxis.set_major_locator(round_ticks(7 if wide else 4))
    if not views[-1].end:
        ax.set_xticks([0])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    ax.set_xlabel("tokens trained on, all stages", color=theme.muted, size=9, labelpad=6)
    return figure


def _loss_range(ax: Axes, views: Sequence[StageView], later: list[float], theme: Theme) -> None:
    """Fit the axis to all but the first twentieth of the run, and say what lies above it."""
    shown = [value for value in later if np.isfinite(value)]
    if not shown:
        return
    low, high = min(shown), max(shown)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    ax.set_ylim(low - pad, high + 2 * pad)
    points = np.concatenate([p[:, :2] for v in views for p in (v.training, v.held_out)])
    above = points[points[:, 1] > ax.get_ylim()[1]]
    if len(above):
        last = above[:, 0].max()
        left = last < 0.7 * views[-1].end
        ax.annotate(
            f"↑ up to {above[:, 1].max():.2f}", (last, 1), xycoords=("data", "axes fraction"),
            xytext=(16 if left else -16, -6), textcoords="offset points",
            ha="left" if left else "right", va="top", size=8.5, color=theme.muted,
            path_effects=halo(theme),
        )  # fmt: skip


def _stage_labels(ax: Axes, views: Sequence[StageView], total: int, theme: Theme) -> None:
    across = inches(ax)[0]
    widths = [(view.end - view.start) / total * across for view in views]
    room = min((width for width in widths if width > 0.16), default=across)
    spelled = room > 1.15 * LETTER * (len(f"depth {views[-1].depth}") + 2)
    for view, width in zip(views, widths, strict=True):
        if width <= 0.16 and len(views) > 1:
            continue
        place = (view.start + view.end) / 2 if width > 0.16 else total / 2
        name = "?" if view.depth is None else str(view.depth)
        name = f"depth {name}" if spelled else name
        notes = ["LoRA"] if view.lora and room > 0.35 else []
        notes += ["running"] if not view.finished and room > 0.5 else []
        ax.annotate(
            name, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 15),
            textcoords="offset points", ha="center", va="bottom", size=9, weight="bold",
            color=theme.ink,
        )  # fmt: skip
        ax.annotate(
            ", ".join(notes), (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", size=8, color=theme.muted,
        )  # fmt: skip
    if not spelled:
        ax.annotate(
            "depth", (0, 1), xycoords="axes fraction", xytext=(-7, 15), ha="right", va="bottom",
            textcoords="offset points", size=9, weight="bold", color=theme.ink,
        )  # fmt: skip


def _end_labels(ax: Axes, ends: Mapping[str, float], colors: Mapping[str, str]) -> None:
    """Name each line at its right end with its last value, at most one line of text apart."""
    finite = sorted((value, name) for name, value in ends.items() if np.isfinite(value))
    bottom, top = ax.get_ylim()
    gap = 0.38 / inches(ax)[1] * (top - bottom)
    places = [value for value, _ in finite]
    if len(places) == 2 and places[1] - places[0] < gap:
        middle = max(sum(places) / 2, bottom + gap)
        places = [middle - gap / 2, middle + gap / 2]
    for place, (value, name) in zip(places, finite, strict=True):
        ax.annotate(
            f"{name}\n{value:.3f}", (1, place), xycoords=("axes fraction", "data"),
            xytext=(8, 0), textcoords="offset points", va="center", size=9, weight="bold",
            color=colors[name], linespacing=1.25,
        )  # fmt: skip


def draw_bits(files: RunFiles, views: Sequence[StageView], theme: Theme, wide: bool) -> Figure:
    """Draw held-out bits per byte after every stage; a running stage's last value is hollow."""
    figure, (ax,) = canvas("Held-out bits per byte by depth", theme, wide, 4.0)
    scored = [view for view in views if len(view.held_out)]
    places = np.arange(len(scored))
    bits = np.array([view.held_out[-1, 2] for view in scored])
    done = np.array([view.finished for view in scored], dtype=bool)
    ax.plot(places, bits, color=theme.held_out, linewidth=1.8, zorder=2)
    face = [theme.held_out if finished else theme.paper for finished in done]
    ax.scatter(places, bits, s=52, color=face, edgecolors=theme.held_out, linewidths=1.8, zorder=3)
    every = inches(ax)[0] / max(len(scored), 1) > 0.5
    for index, value in enumerate(bits):
        if every or index in (0, len(bits) - 1):
            ax.annotate(
                f"{value:.3f}", (index, value), xytext=(1, 8), textcoords="offset points",
                size=9, weight="bold", color=theme.ink, path_effects=halo(theme),
            )  # fmt: skip
    _stage_ticks(ax, scored, theme)
    finite = bits[np.isfinite(bits)]
    if len(finite):
        spread = finite.max() - finite.min() or 0.1 * abs(finite.max())
        ax.set_ylim(finite.min() - 0.3 * spread, finite.max() + 0.35 * spread)
    subtitle(figure, theme, _bits_summary(files, views, wide))
    return figure


def _bits_summary(files: RunFiles, views: Sequence[StageView], wide: bool) -> str:
    parts = ["lower is better; the axis does not start at zero"]
    if not files.plan.get("from") and len(views[0].held_out) and views[0].held_out[0, 0] == 0:
        parts.append(f"before any training: {views[0].held_out[0, 2]:.3f}")
    if not files.finished:
        parts.append("hollow: a stage still running")
    return ("; " if wide else "\n").join(parts)


def draw_resources(files: RunFiles, views: Sequence[StageView], theme: Theme, wide: bool) -> Figure:
    """Draw active and total parameters and peak memory of every finished stage, from zero."""
    figure, axes = canvas("What a stage takes", theme, wide, 4.0 if wide else 3.6, columns=2)
    done = [view for view in views if view.finished]
    subtitle(figure, theme, "" if done else "no stage has finished yet")
    active, total, memory = (
        [float(record[name]) for record in files.records]
        for name in ("active_parameters", "total_parameters", "peak_memory_bytes")
    )
    _bars(axes[0], [("active", active, theme.training), ("total", total, theme.faint)], theme)
    _bars(axes[1], [("peak memory", memory, theme.memory)], theme)
    unit, name = (1e9, "GB") if max(memory, default=0) >= 1e9 else (1e6, "MB")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / unit:g} {name}"))
    for ax, what in zip(axes, (" parameters", f" of the {_memory_of(files)}"), strict=True):
        ax.annotate(
            what, (1, 0), xycoords=ax.texts[-1], size=9.5, color=theme.muted, va="bottom",
            annotation_clip=False,
        )  # fmt: skip
        _stage_ticks(ax, done, theme)
    return figure


def _bars(ax: Axes, series: Sequence[tuple[str, list[float], str]], theme: Theme) -> None:
    """Draw grouped bars from zero, values on top where they fit, names in their colors above."""
    stages, groups = len(series[0][1]), len(series)
    width = min(0.8 / groups, 0.5)
    room = inches(ax)[0] / max(stages, 1) * width
    highest = max((value for _, values, _ in series for value in values), default=1.0)
    ax.set_ylim(0, highest * 1.12 or 1)
    if not stages:
        ax.set_yticks([])
    named: Any = None
    for index, (_, values, color) in enumerate(series):
        places = np.arange(stages) + (index - (groups - 1) / 2) * width
        ax.bar(places, values, width * 0.94, color=color, zorder=2)
        for stage, value in enumerate(values):
            if room > 0.42 or (stage == stages - 1 and room > 0.16):
                text = count(value) if groups == 2 else size(value)
                ax.annotate(
                    text, (places[stage], value), xytext=(0, 3), textcoords="offset points",
                    ha="center", size=8.5, color=theme.ink,
                )  # fmt: skip
    for name, _, color in series:
        label = name if named is None else f"  {name}"
        at = ((0, 1), "axes fraction", (0, 12)) if named is None else ((1, 0), named, (0, 0))
        named = ax.annotate(
            label, at[0], xycoords=at[1], xytext=at[2], textcoords="offset points", size=9.5,
            weight="bold", color=theme.muted if color == theme.faint else color, va="bottom",
            annotation_clip=False,
        )  # fmt: skip


def _stage_ticks(ax: Axes, views: Sequence[StageView], theme: Theme) -> None:
    room = inches(ax)[0] / max(len(views), 1)
    labels = ["?" if view.depth is None else str(view.depth) for view in views]
    if room > 0.36:
        labels = [
            text + ("\nLoRA" if v.lora else "") for text, v in zip(labels, views, strict=True)
        ]
    ax.set_xticks(range(len(views)), labels)
    ax.set_xlim(-0.6, max(len(views), 1) - 0.4)
    ax.set_xlabel("depth after the stage (blocks)", color=theme.muted, size=9, labelpad=4)


def tick(number: float) -> str:
    """Shorten the number at a tick: 2.5K, 40M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= unit:
            return f"{number / unit:g}{name}"
    return f"{number:g}"


def _memory_of(files: RunFiles) -> str:
    return "device" if files.run["machine"].get("accelerator") else "process"


CHARTS = {"loss": draw_loss, "bits-per-byte": draw_bits, "resources": draw_resources}


def smooth(values: Series, window: int) -> Series:
    """Return the centered mean over `window` values, cut at both ends; NaNs are left out."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
