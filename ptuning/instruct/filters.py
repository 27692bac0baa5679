"""What makes a generated task unfit: rules by field, in a fixed order, each with its name.

The published filters, repaired: lengths count Han characters too, the language is checked instead
of the first character being ASCII, and the blocked words have a Chinese list.
Source: https://github.com/tatsu-lab/stanford_alpaca/blob/761dc5b/generate_instruction.py
"""

import re
from collections.abc import Sequence
from string import punctuation

from ptuning.data.segmentation import NAMES_LANGUAGE, count_words, language_of
from ptuning.instruct.blocks import Task
from ptuning.instruct.templates import Template

MIN_WORDS, MAX_WORDS = 4, 150  # of an instruction
BLOCKED_WORDS = (  # of tasks that text alone cannot do
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram"),
    *("图片", "图像", "图表", "视频", "音频", "链接", "http", "画图", "绘制"),
)
_ATTRIBUTES = re.compile(r"[^#*\s]+#[^#*\n]+(?:\*[^#*\s]+#[^#*\n]+)+")
TYPE, KINDS = "类型", ("样式", "款式")


def blocked_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for any of the words: ASCII ones as whole words, others within a text."""
    parts = [
        rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"
        if word.isascii() and word != "http"
        else re.escape(word)
        for word in words
    ]
    return re.compile("|".join(parts) or "(?!)", re.IGNORECASE)


def fault_of(task: Task, template: Template, blocked: re.Pattern[str]) -> str | None:
    """Return the first rule that a complete task breaks; None if it breaks none."""
    if template.name == "adgen":
        return _product_fault(task)
    instruction = task.instruction
    num_words = count_words(instruction)
    if num_words < MIN_WORDS:
        return "too_short"
    if num_words > MAX_WORDS:
        return "too_long"
    if blocked.search(instruction):
        return "blocked_word"
    if instruction.lower().startswith("write a program"):
        return "write_a_program"
    if instruction[0] in punctuation:
        return "bad_first_character"
    asked, answered = language_of(instruction), language_of(task.output)
    is_foreign = answered not in (asked, None) and not NAMES_LANGUAGE.search(instruction)
    if asked not in (template.language, None) or (asked is not None and is_foreign):
        return "wrong_language"
    return None


def _product_fault(task: Task) -> str | None:
    """Say what is wrong with an attribute list and its copy."""
    if not _ATTRIBUTES.fullmatch(task.instruction):
        return "bad_attributes"
    pairs = [pair.split("#") for pair in task.instruction.split("*")]
    are_blank = any(not part.strip() for pair in pairs for part in pair)
    if are_blank or pairs[0][0] != TYPE or len(set(map(tuple, pairs))) < len(pairs):
        return "bad_attributes"
    kind = pairs[0][1].strip()
    names = [kind, kind[-1:], *(value for key, value in pairs if key.endswith(KINDS))]
    return None if any(name in task.output for name in names) else "type_not_named"
