"""Lengths of prompts and answers as a picture, all files in one: PNG or SVG, by the file's ending.

Drawn with matplotlib's object interface, so neither a screen nor pyplot's global state is touched.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ptuning.atomic_file import write_atomically
from ptuning.evaluate.picture_style import (
    ALARM_COLOUR,
    DOTS_PER_INCH,
    FIRST_COLOUR,
    SECOND_COLOUR,
    TEXT_COLOUR,
    plain_frame,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_INCHES = (9.0, 4.6)
COLOURS = (FIRST_COLOUR, SECOND_COLOUR, "#3c7d3f", "#7d4fa3", "#8a6d1f", "#4a8f95")
NUM_BINS = 30
# Names of fonts with Chinese characters on Linux, Windows and macOS, for names of files.
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC")
ENDINGS = (".png", ".svg")


class Lengths(NamedTuple):
    """The lengths of one file's texts in tokens, control tokens not counted."""

    name: str
    prompts: Sequence[int]
    answers: Sequence[int]


class Limit(NamedTuple):
    """A limit on texts, and how many of its tokens are left for text."""

    flag: str
    length: int
    room: int


def draw_length_histogram(
    files: Sequence[Lengths], path: Path, *, prompt_limit: Limit, answer_limit: Limit
) -> None:
    """Draw shares of rows by length, prompts beside answers; at most six files have a line each.

    Raises ValueError for another ending than .png or .svg, and for no lengths at all.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    check_picture_name(path)
    drawn = [file for file in files if len(file.prompts)][: len(COLOURS)]
    if not drawn:
        raise ValueError("there is no row whose length could be drawn.")
    with rc_context({"font.family": _fonts()}):
        figure = Figure(figsize=FIGURE_INCHES, dpi=DOTS_PER_INCH, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
        left, right = figure.subplots(1, 2)
        _draw_side(left, "prompt", [(f.name, f.prompts) for f in drawn], prompt_limit)
        _draw_side(right, "answer", [(f.name, f.answers) for f in drawn], answer_limit)
        left.set_ylabel("share of rows (%)", color=TEXT_COLOUR)
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix.lower().removeprefix("."))
    write_atomically(path, picture.getvalue())


def check_picture_name(path: Path) -> None:
    """Refuse an ending that no picture here has."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"the picture {path} must end in {' or '.join(ENDINGS)}.")


def _fonts() -> list[str]:
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in there)]


def _draw_side(
    axes: "Axes", noun: str, files: Sequence[tuple[str, Sequence[int]]], limit: Limit
) -> None:
    """Draw one panel: a stepped line for each file, and the limit across them."""
    import numpy as np

    arrays = [np.asarray(lengths) for _, lengths in files]
    longest = max(int(lengths.max()) for lengths in arrays)
    usual = max(int(np.percentile(lengths, 99.5, method="higher")) for lengths in arrays)
    high = max(usual, min(longest, limit.room + 1))
    width = max(1, -(-(high + 1) // NUM_BINS))  # tokens of a bin
    edges = np.arange(0, high + width + 1, width)
    for (name, _), lengths, colour in zip(files, arrays, COLOURS, strict=False):
        counts, _ = np.histogram(np.minimum(lengths, edges[-1] - 1), bins=edges)
        shares = 100 * counts / len(lengths)
        axes.stairs(shares, edges, color=colour, alpha=0.14, fill=True)
        cut = (lengths > limit.room).mean()
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=f"{name}: {cut:.1%} cut")
    axes.axvline(limit.room + 0.5, color=ALARM_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_title(f"{noun}s, limit {limit.flag} {limit.length}", fontsize=10, color=TEXT_COLOUR)
    beyond = "" if longest < edges[-1] else f", last bar up to {longest:,}"
    axes.set_xlabel(f"tokens of {noun} text{beyond}", color=TEXT_COLOUR)
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="both", integer=False, nbins=7)
    axes.legend(
        frameon=False,
        fontsize=9,
        labelcolor=TEXT_COLOUR,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),  # below the panel, where nothing is drawn
    )
    plain_frame(axes)
