"""ADGEN's attribute strings and rows of a table: `类型#裤*版型#宽松` both ways."""

from collections.abc import Sequence

PAIR_SIGN = "#"
LIST_SIGN = "*"


def parse_attributes(text: str) -> list[tuple[str, str]] | None:
    """Return keys and values in their order; None where the text is not in this form.

    A key may come twice, as in ADGEN; a value may hold `#`.

    >>> parse_attributes("类型#裤*版型#宽松")
    [('类型', '裤'), ('版型', '宽松')]
    >>> parse_attributes("你好") is None
    True
    """
    rows = []
    for part in text.strip().split(LIST_SIGN):
        key, sign, value = (word.strip() for word in part.partition(PAIR_SIGN))
        if not (key and sign and value):
            return None
        rows.append((key, value))
    return rows


def join_attributes(rows: Sequence[Sequence[object]]) -> str:
    """Return the string of a table; rows that miss their key or value are left out.

    >>> join_attributes([("类型", "裤"), ("", ""), ("版型", "宽松")])
    '类型#裤*版型#宽松'
    """
    pairs = []
    for row in rows:
        key, value = ("" if cell is None else str(cell).strip() for cell in (*row, "", "")[:2])
        if not (key and value):
            continue
        if LIST_SIGN in key + value or PAIR_SIGN in key:
            raise ValueError(
                f"the attribute {key} = {value} holds a sign that separates attributes; use "
                f"neither {LIST_SIGN} in it nor {PAIR_SIGN} in its name."
            )
        pairs.append(f"{key}{PAIR_SIGN}{value}")
    return LIST_SIGN.join(pairs)
