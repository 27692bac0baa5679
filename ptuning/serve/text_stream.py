"""Tokens to text as they arrive: complete characters only, and nothing that is taken back later.

Text that later tokens may still change is held back: bytes of an incomplete character, the start of
a whitespace word, and with the clean-up also trailing spaces, the start of the training-date marker
and a punctuation mark whose right neighbour is not known yet. The pieces concatenate to exactly the
text of all tokens decoded at once.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.request import FinishReason, TokenLogprob
from ptuning.serve.scheduler import TokenBuffer

TRAINING_DATE_MARK = "[[训练时间]]"  # the base model writes this in place of its training date
TRAINING_DATE = "2023年"
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
CHINESE = "[\u4e00-\u9fff]"  # the CJK Unified Ideographs block, as published
MARK_BESIDE_CHINESE = re.compile(f"(?<={CHINESE})[,!:;?]|[,!:;?](?={CHINESE})")
REPLACEMENT_CHARACTER = "\ufffd"  # what the bytes of an incomplete character decode to
# The longest is `<|blank_80|>`, which the tokenizer turns into spaces when it is complete.
BEGUN_WHITESPACE = re.compile(r"<(n|\|[a-z]{0,5}_?\d{0,2}\|?)?\Z")
SETTLE_AFTER = 16  # tokens; about the most that are decoded again with every new one
CANCEL_CHECK_S = 0.05  # how soon the cancellation of a waiting request is noticed


def clean_response(text: str) -> str:
    """Strip, fill in the training date, and widen ASCII marks next to a Chinese character.

    The published clean-up of a chat answer; scores are computed on the raw text.

    >>> clean_response(" 你好,world! 我的知识截至[[训练时间]]; ok? ")
    '你好，world! 我的知识截至2023年； ok?'
    >>> clean_response("3:2 领先:好!")
    '3:2 领先：好！'
    """
    dated = text.strip().replace(TRAINING_DATE_MARK, TRAINING_DATE)
    return MARK_BESIDE_CHINESE.sub(lambda mark: mark[0].translate(FULL_WIDTH), dated)


class TextStream:
    """The text of one answer while its tokens arrive."""

    def __init__(
        self, tokenizer: ChatGLMTokenizer, *, clean: bool = True, stop: Sequence[str] = ()
    ) -> None:
        """End before the first occurrence of a stop string; clean applies `clean_response`."""
        self.text = ""  # emitted so far
        self.stopped = False  # by a stop string
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._clean = clean
        self._stop = tuple(word for word in stop if word)
        self._settled = ""  # text of the tokens before the window
        self._anchor: int | None = None  # last token before the window
        self._window: list[int] = []

    def add(self, token_ids: Sequence[int]) -> str:
        """Append tokens and return the text that is now certain, often none.

        With stop strings they are added one by one, so that `num_tokens` says where they ended.
        """
        if not self._stop:
            return self._add(token_ids)
        return "".join(self._add([token]) for token in token_ids if not self.stopped)

    def _add(self, token_ids: Sequence[int]) -> str:
        self.num_tokens += len(token_ids)
        self._window.extend(token_ids)
        text = self._settled + self._window_text()
        piece = self._emit(self._certain(text), is_whole=False)
        self._settle(text)
        return piece

    def finish(self) -> str:
        """Return the text that was held back."""
        text = self._settled + self._window_text()
        if self._clean:
            text = clean_response(text.rstrip(REPLACEMENT_CHARACTER))
        return "" if self.stopped else self._emit(text, is_whole=True)

    def _emit(self, text: str, *, is_whole: bool) -> str:
        found = [index for word in self._stop if (index := text.find(word)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif self._stop and not is_whole:
            text = text[: len(text) - max(_overlap(text, word) for word in self._stop)]
        if len(text) <= len(self.text):
            return ""
        assert text.startswith(self.text), "emitted text is never taken back"
        piece = text[len(self.text) :]
        self.text = text
        return piece

    def _certain(self, text: str) -> str:
        """Return the part of the text so far that no later token can change."""
        text = BEGUN_WHITESPACE.sub("", text.rstrip(REPLACEMENT_CHARACTER))
        if not self._clean:
            return text
        text = text[: len(text) - _overlap(text, TRAINING_DATE_MARK)]
        text = clean_response(text)
        return text[:-1] if text and ord(text[-1]) in FULL_WIDTH else text

    def _window_text(self) -> str:
        if self._anchor is None:
            return self._decode(self._window)
        before = self._decode([self._anchor])
        return self._decode([self._anchor, *self._window])[len(before) :]

    def _settle(self, text: str) -> None:
        """Start a new window where the text before it can no longer change."""
        incomplete = "<" in text[-12:] or REPLACEMENT_CHARACTER in text[-4:]
        if len(self._window) < SETTLE_AFTER or incomplete:
            return
        last = self._window[-1]
        alone = self._decode([last])
        # A space or a single byte at the start of a window would decode differently.
        if alone.strip() and REPLACEMENT_CHARACTER not in alone and text.endswith(alone):
            self._settled, self._anchor, self._window = text, last, []

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _overlap(text: str, word: str) -> int:
    """Return the length of the longest proper prefix of word that ends text.

    >>> _overlap("知识截至[[训", "[[训练时间]]")
    3
    """
    lengths = range(min(len(text), len(word) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(word[:length])), 0)


class Usage(NamedTuple):
    """Token counts of prompt and answer."""

    prompt_tokens: int
    completion_tokens: int


class Answer(Iterator[str]):
    """Yields text as it is generated; the pieces concatenate to `text`.

    Closing it, leaving its `with` block, or setting the `cancel` event cancels it.
    Iterate from one thread at a time.
    """

    def __init__(
        self,
        tokens: TokenBuffer,
        stream: TextStream,
        *,
        notice: str | None,
        num_prompt_tokens: int,
        stop_computing: Callable[[], None],
        cancel: threading.Event | None = None,
    ) -> None:
        self.notice = notice
        self.finish_reason: FinishReason | None = None
        self._tokens = tokens
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
        """Tokens of the prompt and of the answer so far."""
        return Usage(self._num_prompt_tokens, self._stream.num_tokens)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the tokens so far; empty unless requested."""
        return self._tokens.logprobs[: self._stream.num_tokens]

    def poll(self) -> str:
        """Return new text without waiting; `finish_reason` is set once the answer is complete."""
        if self.finish_reason is not None:
            return ""
        if self._cancel is not None and self._cancel.is_set():
            self.close()
        new_tokens, finish_reason = self._tokens.read(self._stream.num_tokens)
        piece = self._stream.add(new_tokens) if new_tokens else ""
        if self._stream.stopped:
            self._stop_computing()
            self.finish_reason = "stop"
        elif self.finish_reason is None and finish_reason is not None:
            piece += self._stream.finish()
            self.finish_reason = "stop" if self._stream.stopped else finish_reason
        return piece

    def __next__(self) -> str:
        """Wait for the next piece of text."""
        while self.finish_reason is None:
            piece = self.poll()
            if piece:
                return piece
            if self.finish_reason is None:
                timeout_s = None if self._cancel is None else CANCEL_CHECK_S
                self._tokens.wait(self._stream.num_tokens, timeout_s)
        raise StopIteration

    def read(self) -> str:
        """Wait for the end and return the whole answer."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Cancel the answer unless it is finished."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self._stop_computing()

    def __enter__(self) -> Self:
        """Return the answer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Cancel if the answer is garbage-collected before it finished."""
        self.close()
