"""Ctrl-C and SIGTERM: stop after the current step where work could be lost, else at once.

Training defers the first signal: a checkpoint is written after the step, then the run stops. A
Ctrl-C after that stops at once. Everywhere else the first signal stops.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = (
    "\n{name}: a checkpoint is written after this step (or validation), then the run stops; "
    "Ctrl-C now stops at once, without it.\n"
)


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; `saved`: after a checkpoint was written."""

    def __init__(self, signum: int, *, saved: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.saved = saved

    @property
    def exit_code(self) -> int:
        """The shell's exit status for this signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class StopRequest(ExitStack):
    """Handles both signals while it is entered, in the main thread only."""

    def __init__(self) -> None:
        super().__init__()
        self.requested: int | None = None  # the first signal that was deferred
        self._is_installed = False
        self._is_deferring = False
        self._notice = NOTICE
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        """Install the handlers; Python allows them in the main thread only."""
        self._is_installed = threading.current_thread() is threading.main_thread()
        if self._is_installed:
            for signum in SIGNALS:
                self.callback(signal.signal, signum, signal.signal(signum, self._handle))
        return self

    @contextmanager
    def deferred(self, *, notice: str = NOTICE) -> Iterator[None]:
        """Record the first signal inside, print notice, and raise Stopped at the end.

        After an error signals stay deferred, so that the run can report it.
        """
        self._is_deferring, self._notice = True, notice
        yield
        self._is_deferring = False
        if self.requested is not None:
            raise Stopped(self.requested)

    def ignore(self) -> None:
        """Ignore both signals from now on: the run has ended and is about to say why."""
        if self._is_installed:
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data-loading worker: Ctrl-C is its parent's
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
        elif not self._is_deferring:
            raise Stopped(signum)
        elif self.requested is None:
            self.requested = signum
            name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
            # not print, which the signal may have interrupted
            os.write(2, self._notice.format(name=name).encode())
        elif signum == signal.SIGINT:
            raise Stopped(signum)
