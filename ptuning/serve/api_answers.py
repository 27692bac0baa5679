"""From the engine's thread to the event loop: answers awaited, or given up for want of a client."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

from starlette.types import Receive

from ptuning.serve.answer import Answer


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class AnswerTimeoutError(Exception):
    """The answer took longer than a request may."""


class Alarm:
    """Wakes the event loop once for all the rows that a decoding step moved on.

    Each wake-up is a system call of the engine's thread, so one for every row of a step would make
    the step longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rung: list[asyncio.Event] = []

    def ring(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """Have the loop set an event soon; called in the engine's thread."""
        with self._lock:
            self._rung.append(event)
            if len(self._rung) > 1:
                return  # the loop is on its way
        try:
            loop.call_soon_threadsafe(self._set_all)
        except RuntimeError:  # the loop is closed: the server has ended, and nobody waits
            self._take()

    def _set_all(self) -> None:
        for event in self._take():
            event.set()

    def _take(self) -> list[asyncio.Event]:
        with self._lock:
            rung, self._rung = self._rung, []
        return rung


class Waiter:
    """Wakes one request: at new tokens, when its time is up, and when its client leaves."""

    def __init__(
        self, receive: Receive, alarm: Alarm, *, timeout_s: float, each_token: bool
    ) -> None:
        """Start the clock; a waiter that needs not each_token sleeps until the answer is whole."""
        self._alarm = alarm
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._each_token = each_token
        self._is_late = False
        self._is_gone = False
        self._clock = self._loop.call_later(timeout_s, self._end_time)
        self._watch = asyncio.create_task(self._watch_client(receive))

    def on_progress(self, finished: bool) -> None:
        """Wake up; called in the engine's thread."""
        if not (finished or self._each_token) or self._event.is_set():
            return
        self._alarm.ring(self._loop, self._event)

    async def wait(self) -> None:
        """Wait for news; AnswerTimeoutError and ClientGoneError end the waiting."""
        await self._event.wait()
        self._event.clear()
        if self._is_gone:
            raise ClientGoneError
        if self._is_late:
            raise AnswerTimeoutError

    def close(self) -> None:
        """Stop watching."""
        self._clock.cancel()
        self._watch.cancel()

    def _end_time(self) -> None:
        self._is_late = True
        self._event.set()

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self._is_gone = True
        self._event.set()


async def start_answer(start: Callable[[], Answer]) -> Answer:
    """Start an answer beside the event loop: a long prompt takes a while to become tokens."""
    task = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # The thread goes on; what it returns then is dropped, which stops the computation.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise


async def follow(answer: Answer, waiter: Waiter) -> AsyncIterator[str]:
    """Yield new text until the answer is whole; the computation stops when this is left early."""
    try:
        while True:
            piece = answer.poll()
            if piece or answer.finish_reason is not None:
                yield piece
            if answer.finish_reason is not None:
                return
            await waiter.wait()
    finally:
        answer.close()
        waiter.close()
