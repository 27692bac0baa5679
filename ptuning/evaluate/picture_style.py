"""What the project's pictures share: colours, resolution, and a frame that stays behind data."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 160
FIRST_COLOUR = "#2563a8"
SECOND_COLOUR = "#c2571a"
ALARM_COLOUR = "#b3261e"
TEXT_COLOUR = "#333a42"
FAINT_COLOUR = "#d9dde2"
QUIET_COLOUR = "#7a828c"


def plain_frame(axes: "Axes") -> None:
    """Leave the bottom line and faint horizontal lines of a panel's frame."""
    axes.grid(axis="y", color=FAINT_COLOUR, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT_COLOUR)
    axes.tick_params(colors=QUIET_COLOUR, labelsize=9, length=0)
