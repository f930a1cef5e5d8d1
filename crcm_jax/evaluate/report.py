"""One self-contained HTML page about a recipe's run: clips side by side, numbers, loss curves, and how it was made."""

from __future__ import annotations

import base64
import io
import json
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crcm_jax.data import texts
from crcm_jax.errors import UserError, need
from crcm_jax.evaluate.video import animated_png, frame_grid
from crcm_jax.saving.files import write_text

COLUMNS: dict[str, tuple[str, str]] = {
    "class_accuracy": ("right digit", "{:.1%}"),
    "direction_accuracy": ("right direction", "{:.1%}"),
    "bounce_accuracy": ("bounces as it must", "{:.1%}"),
    "motion_error": ("motion error, pixels", "{:.2f}"),
    "frechet": ("Fréchet, frames", "{:.2f}"),
    "frechet_time": ("Fréchet, over time", "{:.2f}"),
    "diversity": ("diversity, 1 is real", "{:.2f}"),
    "frames_per_second": ("frames per second", "{:,.0f}"),
}
"""Key of a model's scores → (what the table calls it, how it is written)."""

_INK = "#010203"  # stands for the page's text colour, which a drawing inside it can take
_PALETTE = ("#3b82f6", "#e8833a", "#2ca58d", "#b05cc6")


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str,
    prompts: Sequence[str],
    clips: Mapping[str, np.ndarray],
    scores: Mapping[str, Mapping[str, Any]],
    losses: Mapping[str, str | Path],
    commands: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    fps: float = 6,
) -> Path:
    """Write the page, whole or not at all, and return its path.

    prompts: one a row of the clips.
    clips: column's name → videos `[prompt, frame, height, width, channel]` in [−1, 1]: first real examples, then each
        model's, all made from the same noises.
    scores: model's name → what `evaluate.run.evaluate` gave; keys of `COLUMNS` become the table, others are left out.
    losses: stage's name → its `metrics.jsonl`, lines with `iteration` and keys that end in `loss`.
    commands, facts: what a reader needs to make the page again, such as the seed; nothing about a machine is added.

    UserError for a losses file that is missing or holds no loss, ValueError for clips that do not fit the prompts.
    """
    for name, videos in clips.items():
        if np.ndim(videos) != 5 or len(videos) != len(prompts):
            raise ValueError(
                f"{name}: {len(prompts)} prompts need [{len(prompts)}, frame, height, width, channel] clips"
            )
    template = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        summary=escape(summary),
        clips_caption="One row a prompt, one column a model. All models start from the same noise; "
        "the first column is a real example of the prompt, with an image and a start of its own.",
        clips=_clip_table(prompts, clips, fps),
        strips=_strips(prompts, clips),
        numbers_caption="Accuracies are shares of clips. A motion error is the distance of a digit from where the "
        "nearest motion that obeys its prompt would have it. Fréchet distances are to real held-out clips of the same "
        "prompts: lower is better, and real clips compared with each other are not at zero.",
        numbers=_score_table(scores),
        curves_caption="Loss over iterations: thin as logged, thick its running mean. Losses of different stages are "
        "different quantities.",
        curves="".join(_curve(name, Path(file)) for name, file in losses.items()),
        commands=escape("\n".join(commands)),
        facts=escape(" · ".join(f"{key}: {value}" for key, value in (facts or {}).items())),
    )
    write_text(path, page)
    return Path(path)


def _clip_table(prompts, clips, fps) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in clips)
    rows = []
    for i, prompt in enumerate(prompts):
        cells = "".join(
            f'<td><img alt="{escape(name)}: {escape(prompt)}" src="{_data("apng", animated_png(videos[i], fps))}"></td>'
            for name, videos in clips.items()
        )
        rows.append(f"<tr><th>{escape(prompt)}</th>{cells}</tr>")
    return f'<table class="clips"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _strips(prompts, clips) -> str:
    parts = []
    for i, prompt in enumerate(prompts):
        rows = []
        for name, videos in clips.items():
            file = io.BytesIO()
            Image.fromarray(frame_grid(np.asarray(videos[i])[None], scale=1, gap=1)).save(file, "PNG")
            rows.append(f'<tr><th>{escape(name)}</th><td><img alt="" src="{_data("png", file.getvalue())}"></td></tr>')
        parts.append(f'<p>{escape(prompt)}</p><div class="wide"><table class="strips">{"".join(rows)}</table></div>')
    return "".join(parts)


def _score_table(scores) -> str:
    shown = {key: column for key, column in COLUMNS.items() if any(key in row for row in scores.values())}
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in shown.values())
    rows = []
    for name, row in scores.items():
        cells = "".join(
            f"<td>{'–' if row.get(key) is None else form.format(row[key])}</td>" for key, (_, form) in shown.items()
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<table class="numbers"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def read_losses(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Series → (iterations, values) of a JSONL log's keys that end in `loss`; a last line cut short is left."""
    if not file.is_file():
        raise UserError(f"there is no log of losses at {file}: train that stage first")
    series: dict[str, list[tuple[int, float]]] = {}
    lines = texts.read(file).rstrip("\n").split("\n")
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            losses = {key: value for key, value in row.items() if key.split("/")[-1] == "loss" and value is not None}
            points = {key: (int(row["iteration"]), float(value)) for key, value in losses.items()}
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            if number == len(lines) - 1:
                break
            raise UserError(f"line {number + 1} of {file} is no line of a run's log: the log is damaged") from None
        for key, point in points.items():
            series.setdefault(key, []).append(point)
    if not series:
        raise UserError(f"{file} holds no losses")
    return {key: (np.array([i for i, _ in points]), np.array([v for _, v in points])) for key, points in series.items()}


def _curve(name: str, file: Path) -> str:
    matplotlib, figures = need("matplotlib", extra="demo"), need("matplotlib.figure", extra="demo")
    figure = figures.Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    everything = []
    for (key, (iterations, values)), colour in zip(read_losses(file).items(), _PALETTE * 4):
        width = max(1, len(values) // 15)
        axes.plot(iterations, values, color=colour, linewidth=0.7, alpha=0.45)
        if len(values) > 2 * width:
            mean = np.convolve(values, np.ones(width) / width, "valid")
            axes.plot(iterations[width - 1 :], mean, color=colour, linewidth=1.8, label=key.removesuffix("/loss"))
        everything.append(values[np.isfinite(values)])
    values = np.concatenate(everything)
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[0] and len(everything) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    axes.set_xlabel("iteration", color=_INK, fontsize=8)
    axes.tick_params(colors=_INK, which="both", labelsize=8)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    file_like = io.StringIO()
    # A fixed salt makes the drawing's internal names, and so the whole page, reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file_like, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file_like.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return f"<figure>{svg}<figcaption>{escape(name)}</figcaption></figure>"


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
