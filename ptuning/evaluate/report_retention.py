"""The report page's part on forgetting: figures, then the two answers to each general prompt."""

from html import escape

from ptuning.evaluate.report_text import text_block
from ptuning.evaluate.retention import Retention, RetentionRow

MAX_ROWS = 60  # a file of one's own may hold more; the most changed are shown
TEXT_LIMIT = 400  # characters of one text


def retention_section(retention: Retention | None) -> str:
    """Return the section; "" where forgetting was not measured."""
    if retention is None:
        return ""
    ranked = sorted(retention.rows, key=lambda row: -row.change)[:MAX_ROWS]
    cards = "\n".join(map(_card, ranked))
    return (
        "<h2>遗忘 <small>Forgetting</small></h2>\n"
        '<p class="quiet">微调前后回答同一组通用问题；损失按原模型自己的回答计算，取每个 token '
        "的平均。 General prompts answered before and after tuning; the loss is that of the base's "
        f"own answers, per token. {escape(retention.source)}</p>\n"
        f'<div class="panel">{_figures(retention)}</div>\n'
        "<details><summary>通用问题的回答，变化最大的在前 "
        f"Answers to the general prompts, most changed first</summary>\n{cards}\n</details>"
    )


def _figures(retention: Retention) -> str:
    change = round(retention.change, 3)
    colour = "down" if change > 0 else "up" if change < 0 else ""
    return (
        "<table><thead><tr><th></th><th>原模型 base</th><th>微调 tuned</th>"
        "<th>变化 change</th></tr></thead>\n<tbody><tr>"
        "<th>原模型回答的损失 loss on the base's answers</th>"
        f"<td>{retention.base_loss:.3f}</td>"
        f'<td class="tuned">{retention.tuned_loss:.3f}</td>'
        f'<td class="{colour}">{change:+.3f}</td></tr>\n'
        "<tr><th>与原模型的散度 divergence from the base (KL, nats)</th><td>0</td>"
        f'<td class="tuned">{retention.divergence:.3f}</td><td></td></tr>\n'
        "<tr><th>相同的回答 identical answers</th>"
        f"<td>{len(retention.rows)}</td>"
        f'<td class="tuned">{retention.num_same}</td><td></td></tr></tbody></table>'
    )


def _card(row: RetentionRow) -> str:
    colour = "down" if row.change > 0 else "up" if row.change < 0 else ""
    same = "<span>相同 identical</span>" if row.is_same else ""
    base_loss, tuned_loss = row.base_loss / row.num_tokens, row.tuned_loss / row.num_tokens
    answers = text_block("原模型 base", row.base, TEXT_LIMIT)
    answers += text_block("微调 tuned", row.tuned, TEXT_LIMIT, style="tuned")
    return (
        f'<article class="row"><header><b>{escape(row.prompt[:TEXT_LIMIT])}</b>{same}'
        f"<span>损失 loss {base_loss:.3f} → {tuned_loss:.3f}</span>"
        f'<span class="{colour}">{row.change:+.3f}</span></header>'
        f'<div class="texts">{answers}</div></article>'
    )
