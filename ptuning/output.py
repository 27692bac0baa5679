"""Log lines and progress: a tqdm bar on a terminal, a log line per 10 % in a file or a pipe."""

import io
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

BAR_BYTES = 10**9  # less takes only seconds
LINE_EVERY_S = 2.0  # shorter loops log nothing

_bars_allowed = True  # --disable_tqdm, for the whole process like the logging level


def start_logging(level: int, stream: TextIO) -> None:
    """Log plain lines to stream; characters that the terminal lacks are printed as escapes."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=level, stream=stream)


def use_bars(allowed: bool) -> None:
    """Allow progress bars on a terminal, or make every loop log lines (--disable_tqdm)."""
    global _bars_allowed
    _bars_allowed = allowed


def on_terminal() -> bool:
    """Return whether stdout and stderr are terminals; `main.py | tee log` must not show bars."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def shows_bars() -> bool:
    """Return whether loops show progress bars rather than log lines."""
    return _bars_allowed and on_terminal()


@contextmanager
def open_bar(total: float | None, title: str, **options: Any) -> Iterator[tqdm]:
    """Open a progress bar, invisible without a terminal; log lines appear above it.

    options are tqdm's.
    """
    disable = options.pop("disable", False) or not shows_bars()
    with ExitStack() as opened:
        bar = opened.enter_context(
            tqdm(total=total, desc=title, dynamic_ncols=True, disable=disable, **options)
        )
        if not disable:
            opened.enter_context(logging_redirect_tqdm())
        yield bar


@contextmanager
def bars_for(num_bytes: int) -> Iterator[None]:
    """Let transformers show its progress bars on a terminal if num_bytes is large."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    if num_bytes < BAR_BYTES or not shows_bars():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


class Progress(ExitStack):
    """Progress of a loop over `total` items; without a bar, an unknown total logs nothing."""

    def __init__(
        self,
        total: int | None,
        title: str,
        *,
        unit: str = "row",
        initial: int = 0,
        visible: bool = True,
        leave: bool = True,
    ) -> None:
        """Start after `initial` items."""
        super().__init__()
        self.total, self.title, self.unit, self.visible = total, title, unit, visible
        self.done = self.initial = initial
        self._options = {"unit": unit, "initial": initial, "leave": leave, "disable": not visible}

    def __enter__(self) -> Self:
        """Show the bar."""
        self._started = self._line_at = time.monotonic()
        self._tenth = tenths(self.initial, self.total or 1)
        self.bar = self.enter_context(open_bar(self.total, self.title, **self._options))
        return self

    def update(self, count: int = 1) -> None:
        """Count finished items."""
        self.done += count
        self.bar.update(count)
        if self.total and self.visible and self.bar.disable:
            self._log_tenth(self.total)

    def _log_tenth(self, total: int) -> None:
        tenth, now = tenths(self.done, total), time.monotonic()
        is_over = self.done >= total
        since = self._started if is_over else self._line_at
        if tenth == self._tenth or now - since < LINE_EVERY_S:
            return
        self._tenth, self._line_at = tenth, now
        spent = now - self._started
        left = spent / (self.done - self.initial) * (total - self.done)
        units = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
        when = f"took {duration(spent)}" if is_over else f"{duration(left)} left"
        share = 100 * self.done // total
        logger.info("%s: %d of %d %s (%d %%), %s", self.title, self.done, total, units, share, when)


def tenths(done: int, total: int) -> int:
    """Return how many tenths of the total are done.

    >>> tenths(39, 400), tenths(40, 400), tenths(3, 4)
    (0, 1, 7)
    """
    return 10 * done // total


def duration(time_s: float) -> str:
    """Return a time in at most two units.

    >>> [duration(time_s) for time_s in (0.34, 42.4, 80, 754, 7380, 100_000)]
    ['0.3 s', '42 s', '1 min 20 s', '12 min 34 s', '2 h 3 min', '1 day 4 h']
    """
    if time_s < 9.95:
        return f"{time_s:.1f} s"
    seconds = round(time_s)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return _two(seconds // 60, "min", seconds % 60, "s")
    minutes = round(time_s / 60)
    if minutes < 24 * 60:
        return _two(minutes // 60, "h", minutes % 60, "min")
    hours = round(time_s / 3600)
    return _two(hours // 24, "day" if hours < 48 else "days", hours % 24, "h")


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large} {large_unit}" + (f" {small} {small_unit}" if small else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def render_page(template: Path, **values: Any) -> str:
    """Fill in an HTML template; values are escaped, and one that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def signed(value: float, digits: int) -> str:
    """Return a change with its sign, unless it rounds to 0.

    >>> signed(0.9481, 3), signed(-3.75, 2), signed(-0.0004, 3)
    ('+0.948', '-3.75', '0.000')
    """
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"
