"""One text of the data as a labelled block of the report page, escaped and cut."""

from html import escape

from ptuning.evaluate.metrics import is_blank


def text_block(name: str, text: str, limit: int, *, style: str = "") -> str:
    """Return a text of at most limit characters under its name, which is trusted."""
    shown = escape(text[:limit]) + ("…" if len(text) > limit else "")
    if is_blank(text):
        shown = '<em class="quiet">空 empty</em>'
    return f'<div class="{style}"><span>{name}</span><bdi>{shown}</bdi></div>'
