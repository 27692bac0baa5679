"""Words in a text that no person wrote: control tokens, placeholders, "No input", NaN.

`data check` and `data convert` report them; training takes them as they stand.
"""

import re
import unicodedata

from ptuning.data.tokenizer import LEADING_PIECES, TRAILING_PIECES

REPLACEMENT = "\ufffd"  # what editors write in place of a character that they could not read
# What stands for an empty cell; pandas' read_csv reads all of them so.
MISSING_WORDS = {"nan", "NaN", "None", "null", "NULL", "N/A", "n/a", "#N/A", "<NA>"}
# Inputs that say there is none, reduced to their letters: those of Alpaca's rows, and in Chinese
NO_INPUT = {"na", "ninput", "noinput", "noinputneeded", "noinputrequired", "none", "noput"}
NO_INPUT |= {"无", "无输入", "没有输入"}
UNKNOWN_MARK = re.compile(r"<UNK>|\[UNK\]", re.IGNORECASE)  # in 30 % of ADGEN's answers
_NAMED = "|".join(
    re.escape(piece) for piece in sorted({*LEADING_PIECES, *TRAILING_PIECES}, key=len, reverse=True)
)
# Control tokens written out. Here they are encoded as plain text, but `<n>`, `<|tab|>` and
# `<|blank_k|>` come back as whitespace, and other programs, the published code among them, read
# control tokens out of them. The names of this vocabulary; image tokens of its older release and
# bytes; the form <|...|> of this and later models.
_CONTROL_NAME = re.compile(
    rf"{_NAMED}|<image_\d+>|<0x[0-9A-F]{{2}}>|<\|[A-Za-z][\w .:-]{{0,38}}\|>", re.ASCII
)
_FULL_WIDTH = re.compile("[＜［]")
# {{name}}, as LLaMA-Factory's identity.json has it, and <NAME>, as its self_cognition.json; the
# latter not after a letter, as in C++'s vector<INT>.
_BRACES = re.compile(r"\{\{ ?\w{1,40} ?\}\}")
_CAPITALS = re.compile(r"(?<![A-Za-z0-9_])<([A-Z][A-Z _-]{0,40}[A-Z])>")
_NO_PLACEHOLDERS = {"UNK", "PAD", "MASK", "BOS", "EOS", "SEP", "CLS", "ENC", "BR", "HR"}


def may_have_marks(text: str) -> bool:
    """Say quickly whether a text has a character that these words begin with: most have none."""
    return "<" in text or "[" in text or "{{" in text or "＜" in text or "［" in text


def find_control_names(text: str) -> list[str]:
    """Return every control token written out in a text, in order; full-width forms count.

    >>> find_control_names("好<eop>的＜sop＞ x < y [0]")
    ['<eop>', '<sop>']
    """
    if _FULL_WIDTH.search(text):
        text = unicodedata.normalize("NFKC", text)  # as SentencePiece does after any search
    return _CONTROL_NAME.findall(text)


def find_placeholders(text: str) -> list[str]:
    """Return the words that a template left to be filled in, such as {{name}} and <NAME>, in order.

    None of a template's code, such as {{item.name}}; no control token, and no HTML.

    >>> find_placeholders("我是{{name}}，由<AUTHOR>开发。<B>x</B> <UNK>")
    ['{{name}}', '<AUTHOR>']
    """
    found = []
    if "{{" in text:
        names = _BRACES.findall(text)
        found = names if len(names) == text.count("{{") and "{%" not in text else []
    if "<" in text:
        for name in _CAPITALS.findall(text):
            is_tag = f"</{name}>" in text or is_fake_input(name)
            if name not in _NO_PLACEHOLDERS and not is_tag:
                found.append(f"<{name}>")
    return found


def is_fake_input(text: str) -> bool:
    """Say whether an input says that there is none: "No input", "<noinput>", "N/A".

    >>> is_fake_input("\\\\<noinput\\\\>"), is_fake_input("No."), is_fake_input("")
    (True, False, False)
    """
    return "".join(filter(str.isalpha, text.lower())) in NO_INPUT
