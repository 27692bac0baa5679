"""Words of a text, and its language; Chinese words as jieba cuts them by default (HMM on)."""

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
RUNS = re.compile(rf"[{HAN}]+|[a-z0-9]+")
HAN_CHARACTER = re.compile(f"[{HAN}]")
LATIN_WORD = re.compile(r"[A-Za-z]+")
# Words that name a language: the answer may be in another one than the question.
NAMES_LANGUAGE = re.compile(
    r"\b(translat\w*|english|chinese|mandarin|french|german|spanish|italian|portuguese|russian"
    r"|japanese|korean|arabic|hindi|latin|pinyin|languages?|code|python|javascript|typescript|java"
    r"|c|c\+\+|c#|golang|rust|php|ruby|sql|html|css|bash|shell|regex|regular expression|json|latex"
    r"|cantonese|hanzi)(?![a-z0-9])|译|双语|单词|口语|粤语|[英汉中法德日俄韩]语|[英中法德日俄韩]文|西班牙语|葡萄牙语|意大利语"
    r"|阿拉伯语|拉丁语|拼音|外语|代码|编程|程序|正则|公式",
    re.IGNORECASE | re.ASCII,
)
_SHORT_WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")


@functools.cache
def word_cutter() -> Callable[[str], Iterable[str]]:
    """Load jieba's dictionary once, about a second, and return its word cutter.

    A private tokenizer avoids the shared one's log lines, its cache file in the temporary folder
    (which may be read-only), and words that other code has added to it, which change the scores.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in its source, and pkg_resources
        import jieba
    tokenizer: Any = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    cut: Callable[[str], Iterable[str]] = tokenizer.cut
    return cut


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case: jieba's, and runs of Latin letters and digits.

    >>> words_of("用Python计算列表的最大值")
    ['用', 'python', '计算', '列表', '的', '最大值']
    """
    words: list[str] = []
    for run in RUNS.findall(text.lower()):
        words += [run] if run.isascii() else list(word_cutter()(run))
    return words


def language_of(text: str) -> str | None:
    """Return "zh" or "en", by whether Han characters or Latin words are more; None for neither.

    >>> language_of("用Python计算"), language_of("17"), language_of("Oslo 在哪里")
    ('zh', None, 'zh')
    """
    han, latin = len(HAN_CHARACTER.findall(text)), len(LATIN_WORD.findall(text))
    return None if han == latin else "zh" if han > latin else "en"


def count_words(text: str) -> int:
    """Count Han characters, and runs of other letters and digits.

    >>> count_words("用Python计算列表")
    6
    """
    return len(_SHORT_WORD.findall(text.lower()))
