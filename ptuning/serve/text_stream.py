"""Tokens to text as they come: whole characters only, and nothing that must be taken back.

What may still change is held: bytes of an unfinished character, the start of a whitespace word, and
with the clean-up trailing blanks, the start of the training-date mark and a mark of punctuation
whose neighbour is not known yet. The pieces joined are exactly the text of all tokens at once.
"""

import re
from collections.abc import Sequence

from ptuning.data.tokenizer import ChatGLMTokenizer

TRAINING_DATE_MARK = "[[训练时间]]"  # the base model writes this in place of its training date
TRAINING_DATE = "2023年"
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
CHINESE = "[\u4e00-\u9fff]"  # the CJK Unified Ideographs block, as published
MARK_BESIDE_CHINESE = re.compile(f"(?<={CHINESE})[,!:;?]|[,!:;?](?={CHINESE})")
HALF_CHARACTER = "\ufffd"  # what bytes decode to that are no character yet
# The longest is `<|blank_80|>`, which the tokenizer turns into blanks when it is complete.
BEGUN_WHITESPACE = re.compile(r"<(n|\|[a-z]{0,5}_?\d{0,2}\|?)?\Z")
SETTLE_AFTER = 16  # tokens decoded again at every new one, at most about so many


def clean_response(text: str) -> str:
    """Strip, fill in the training date, and widen ASCII marks that touch a Chinese character.

    The published clean-up of a chat answer; scores are taken on the raw text.

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
        """Clean up as published if asked, and end before the first of the stop strings."""
        self.text = ""  # given out so far
        self.stopped = False  # a stop string came: later tokens are not wanted
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._clean = clean
        self._stop = tuple(word for word in stop if word)
        self._settled = ""  # text of the tokens before the window
        self._anchor: int | None = None  # last token before the window
        self._window: list[int] = []

    def add(self, token_ids: Sequence[int]) -> str:
        """Take more tokens and return the text that is certain now, often none.

        With stop strings they are taken one by one, so that `num_tokens` says where they ended.
        """
        if not self._stop:
            return self._add(token_ids)
        return "".join(self._add([token]) for token in token_ids if not self.stopped)

    def _add(self, token_ids: Sequence[int]) -> str:
        self.num_tokens += len(token_ids)
        self._window.extend(token_ids)
        text = self._settled + self._window_text()
        piece = self._give(self._certain(text), is_whole=False)
        self._settle(text)
        return piece

    def finish(self) -> str:
        """Return the text that was held."""
        text = self._settled + self._window_text()
        if self._clean:
            text = clean_response(text.rstrip(HALF_CHARACTER))
        return "" if self.stopped else self._give(text, is_whole=True)

    def _give(self, text: str, *, is_whole: bool) -> str:
        found = [place for word in self._stop if (place := text.find(word)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif self._stop and not is_whole:
            text = text[: len(text) - max(_overlap(text, word) for word in self._stop)]
        if len(text) <= len(self.text):
            return ""
        assert text.startswith(self.text), "text given out is never taken back"
        piece = text[len(self.text) :]
        self.text = text
        return piece

    def _certain(self, text: str) -> str:
        """Return the part of the text so far that no later token can change."""
        text = BEGUN_WHITESPACE.sub("", text.rstrip(HALF_CHARACTER))
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
        if len(self._window) < SETTLE_AFTER or "<" in text[-12:] or HALF_CHARACTER in text[-4:]:
            return
        last = self._window[-1]
        alone = self._decode([last])
        # A blank or a lone byte at the start of a window would decode as another text.
        if alone.strip() and HALF_CHARACTER not in alone and text.endswith(alone):
            self._settled, self._anchor, self._window = text, last, []

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _overlap(text: str, word: str) -> int:
    """Return how many characters at the end of text are a beginning of word, not all of it.

    >>> _overlap("知识截至[[训", "[[训练时间]]")
    3
    """
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
