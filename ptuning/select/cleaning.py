"""Step 1 of 5, clean: what makes a row of instruction data unfit, by rules that a reader can check.

Each rule has a name, under which the report counts it, and the first that holds decides. A rule
that is not sure keeps the row. Found in published data: Alpaca's completions were cut at "20." and
swallowed the next task; others were written by chat models that speak about themselves.
"""

import re
from typing import NamedTuple

from ptuning.data import segmentation
from ptuning.data.checking.check import find_control_names, is_fake_input

MIN_WORDS_OF_A_SENTENCE = 6  # a shorter answer may end without a full stop: a title, a name
RULES = {  # name: what it finds
    "empty_output": "回答为空: an answer of nothing but blank space",
    "identical_fields": "回答与输入相同: an answer that repeats the input or the instruction",
    "url_only_input": "输入只有网址: an input that is only an address",
    "media_input": "输入是图片等占位: an input that stands for a picture, a film, a file",
    "swallowed_task": "回答里混入下一题: an answer that goes on with the next task",
    "leaked_markers": "回答里有标记: control tokens or prompt markers in the answer",
    "self_reference": "模型自称: an answer in which a language model speaks about itself",
    "cut_ending": "结尾被截断: an answer that stops in the middle of a sentence",
    "language_mismatch": "语言不符: an answer in another language than its question",
}

_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_MEDIA = re.compile(
    r"image|photo|picture|painting|video|figure|clip|article|essay|link|audio|graph|chart"
    r"|attach(?:ed|ment)|图|照片|视频|音频|录音|链接|附件|文章",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[\[(<（【《［]([^\[\]()<>（）【】《》［］]+)[\])>）】》］]\.?")
_TASK = re.compile(
    r"^[ \t]*(?:#+[ \t]*)?\d+[ \t]*[.、)）][ \t]*(?:instruction|指令)[ \t]*[:：]"
    r"|^#+[ \t]*(?:instruction|指令)[ \t]*[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_MARKERS = re.compile(r"^#{3}[ \t]*$|^\[Round \d+\]", re.IGNORECASE | re.MULTILINE)
_SELF = re.compile(
    r"\bas an? (?:(?:ai|artificial intelligence)(?: (?:(?:large )?language model|model|assistant"
    r"|chatbot|system|program))?|(?:large )?language model)"
    r"(?:,? i\b|(?:,| (?:developed|created|made)\b)[^.!?\n]{0,60}?\bi\b)"
    r"|作为(?:一[个名款种])?\s*(?:AI|人工智能|(?:大型?)?语言模型)(?:大|型|语言|聊天|对话|模型|助[手理]|机器人|程序"
    r"|系统|[,，\s])*(?:由于[^。！？\n]{0,20}[,，])?我(?!们)",
    re.IGNORECASE,
)
_MONTH = (
    r"(?:january|february|march|april|may|june|july|august|september|october|november|december)"
)
_YEAR_CUT = re.compile(  # "20" of 2020; a list, a range or a day of a month may end in 20 too
    rf"(?:[^\d\s], |\b(?:in|of|since|by|from|until|till|before|after|to|late|early) {_MONTH} "
    rf"|(?<!\d )(?<!one )\b(?:in|since|until|till|during) |\b\d{{4}} to |{_MONTH} \d+, )20$",
    re.IGNORECASE,
)
_OPEN_ENDING = re.compile(
    r"(?:[,、，]|(?<![\w'-])(?:the|an|and|of|because|but|such as)|并且|而且|但是|因为|所以|以及"
    r"|例如|比如)$",
    re.IGNORECASE,
)
_CODE = re.compile(r"[{}\[\]=<>]|\w\(|^ {4}|```", re.MULTILINE)


class Fields(NamedTuple):
    """The parts of a row that the rules look at; input and earlier turns are "" for none."""

    instruction: str
    input: str
    output: str
    history: str = ""


def without_fake_input(prompt: str, text: str) -> str | None:
    """Return the prompt without an input that says there is none; None if it has no such input.

    text is the input as its file names it; "" for a prompt that may hold it as its second line.

    >>> without_fake_input("Name a tree.\\n<noinput>", "")
    'Name a tree.'
    """
    is_named = bool(text)
    if not is_named:
        _, _, text = prompt.partition("\n")
    rest = prompt.removesuffix(text).rstrip()
    if not is_fake_input(text) or not rest or not prompt.endswith(text):
        return None
    return rest if is_named or not rest.endswith((":", "：")) else None


def fault_of(fields: Fields) -> str | None:
    """Return the first rule that a row breaks; None if it breaks none."""
    instruction, text, output, history = (part.strip() for part in fields)
    if not output:
        return "empty_output"
    if output in (text, instruction):
        return "identical_fields"
    if _URL.fullmatch(text):
        return "url_only_input"
    if (found := _BRACKETED.fullmatch(text)) and _MEDIA.search(found[1]):
        return "media_input"
    if _TASK.search(output):
        return "swallowed_task"
    if find_control_names(output) or _MARKERS.search(output):
        return "leaked_markers"
    if _SELF.search(output):
        return "self_reference"
    if _is_cut(output):
        return "cut_ending"
    if _is_foreign(f"{history}\n{instruction}\n{text}", output):
        return "language_mismatch"
    return None


def _is_cut(output: str) -> bool:
    """Return whether a text stops in the middle of a sentence, or of the year 20xx."""
    last = output.rpartition("\n")[2]
    is_sentence = len(last.split()) >= MIN_WORDS_OF_A_SENTENCE or not last.isascii()
    is_open = is_sentence and _OPEN_ENDING.search(last) is not None
    return is_open or _YEAR_CUT.search(last) is not None


def _is_foreign(asked: str, output: str) -> bool:
    """Return whether the answer's language occurs nowhere in the question, nor is asked for."""
    language, own = segmentation.language_of(output), segmentation.language_of(asked)
    is_short = segmentation.count_words(output) < MIN_WORDS_OF_A_SENTENCE  # a name, a title
    if language == own or None in (language, own) or is_short or _CODE.search(output):
        return False
    letters = segmentation.HAN_CHARACTER if language == "zh" else segmentation.LATIN_WORD
    return not (letters.search(asked) or segmentation.NAMES_LANGUAGE.search(asked))
