"""One answer as it comes: pieces of text that can be stopped, then asked how it went."""

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

from ptuning.engine.request import FinishReason
from ptuning.engine.sampling import TokenLogprob
from ptuning.serve.scheduler import Ticket
from ptuning.serve.text_stream import TextStream

CANCEL_CHECK_S = 0.05  # how soon a cancelled request that still waits for its turn is noticed


class Usage(NamedTuple):
    """Tokens read and tokens written."""

    prompt_tokens: int
    completion_tokens: int


class Answer(Iterator[str]):
    """Yields new text as the model writes it; joined, the pieces are `text`.

    Closing it, leaving its `with` block, or setting the `cancel` event stops the computation.
    Iterate from one thread at a time.
    """

    def __init__(
        self,
        ticket: Ticket,
        stream: TextStream,
        *,
        notice: str | None,
        num_prompt_tokens: int,
        stop_computing: Callable[[Ticket], None],
        cancel: threading.Event | None = None,
    ) -> None:
        self.notice = notice
        self.finish_reason: FinishReason | None = None
        self._ticket = ticket
        self._stream = stream
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_computing = stop_computing
        self._cancel = cancel

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._stream.text

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt and, so far, of the answer."""
        return Usage(self._num_prompt_tokens, self._stream.num_tokens)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the answer's tokens so far; none unless asked for."""
        return self._ticket.logprobs(self._stream.num_tokens)

    def poll(self) -> str:
        """Return the text that is new, without waiting; `finish_reason` says when all is there."""
        if self.finish_reason is not None:
            return ""
        if self._cancel is not None and self._cancel.is_set():
            self.close()
        num_tokens, finish_reason = self._ticket.progress()
        new_tokens = self._ticket.row.answer[self._stream.num_tokens : num_tokens]
        pieces = [self._stream.add(new_tokens)] if new_tokens else []
        if self._stream.stopped:
            self._stop_computing(self._ticket)
            self.finish_reason = "stop"
        elif self.finish_reason is None and finish_reason is not None:
            pieces.append(self._stream.finish())
            self.finish_reason = "stop" if self._stream.stopped else finish_reason
        return "".join(pieces)

    def __next__(self) -> str:
        """Wait for the next piece of text."""
        while self.finish_reason is None:
            piece = self.poll()
            if piece:
                return piece
            if self.finish_reason is None:
                timeout_s = None if self._cancel is None else CANCEL_CHECK_S
                self._ticket.wait(self._stream.num_tokens, timeout_s)
        raise StopIteration

    def read(self) -> str:
        """Wait for the end and return the whole answer."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Stop the computation, unless it is done."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self._stop_computing(self._ticket)

    def __enter__(self) -> Self:
        """Return the answer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what is not finished."""
        self.close()

    def __del__(self) -> None:
        """Stop computing for nobody."""
        self.close()
