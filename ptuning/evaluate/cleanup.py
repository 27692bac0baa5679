"""The published clean-up of a chat answer.

Chat applies it to what the user sees; scores are taken on the raw text, so nothing here touches
them.
"""

import re

TRAINING_DATE_MARK = "[[训练时间]]"  # the base model writes this in place of its training date
TRAINING_DATE = "2023年"
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
CHINESE = "[\u4e00-\u9fff]"  # the CJK Unified Ideographs block, as published
MARK_BESIDE_CHINESE = re.compile(f"(?<={CHINESE})[,!:;?]|[,!:;?](?={CHINESE})")


def clean_response(text: str) -> str:
    """Strip, fill in the training date, and widen ASCII marks that touch a Chinese character.

    >>> clean_response(" 你好,world! 我的知识截至[[训练时间]]; ok? ")
    '你好，world! 我的知识截至2023年； ok?'
    >>> clean_response("3:2 领先:好!")
    '3:2 领先：好！'
    """
    dated = text.strip().replace(TRAINING_DATE_MARK, TRAINING_DATE)
    return MARK_BESIDE_CHINESE.sub(lambda mark: mark[0].translate(FULL_WIDTH), dated)
