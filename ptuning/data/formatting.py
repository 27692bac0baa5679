"""Rows and chats to prompts: the one prompt builder for training, evaluation and serving.

A question without history is the prompt itself; with history every turn is a numbered round, the
last one open.
Source: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/modeling_chatglm.py (`stream_chat`)
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Recipe = Literal["corrected", "published"]

# `build_prompt` for transformers' chats: one question is bare, more messages are numbered rounds,
# and a system message stands before the first question.
CHAT_TEMPLATE = """\
{%- set chat = namespace(system='', round=0, expected='user') -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- if not loop.first -%}
{{- raise_exception('a system message may only come first: it precedes the first question') -}}
{%- endif -%}
{%- set chat.system = message['content'] + '\\n' -%}
{%- elif message['role'] != chat.expected -%}
{{- raise_exception('message ' ~ loop.index ~ ' has the role ' ~ message['role'] ~ ' where '
    ~ chat.expected ~ ' is due; after an optional system message, they take turns') -}}
{%- elif message['role'] == 'user' -%}
{%- set question = chat.system + message['content'] -%}
{%- if add_generation_prompt and turns | length == 1 -%}
{{- question -}}
{%- else -%}
{{- '[Round ' ~ chat.round ~ ']\\n问：' ~ question ~ '\\n' -}}
{%- if add_generation_prompt and loop.last -%}{{- '答：' -}}{%- endif -%}
{%- endif -%}
{%- set chat.system = '' -%}
{%- set chat.expected = 'assistant' -%}
{%- else -%}
{{- '答：' ~ message['content'] ~ ('' if loop.last else '\\n') -}}
{%- set chat.round = chat.round + 1 -%}
{%- set chat.expected = 'user' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and chat.expected != 'assistant' -%}
{{- raise_exception('add_generation_prompt needs a user message last: the question to answer') -}}
{%- endif -%}
"""


class Turn(NamedTuple):
    """One answered question of a chat."""

    question: str
    answer: str


class Example(NamedTuple):
    """One row of data as text: the prompt, the answer, and the parts the prompt was built from.

    `rounds` says whether the prompt has the `[Round i]` form; only then can earlier turns be left
    out one by one.
    """

    prompt: str
    response: str
    query: str
    history: tuple[Turn, ...] = ()
    prefix: str = ""
    rounds: bool = False


def build_rounds(query: str, history: Sequence[tuple[str, str]] = ()) -> str:
    r"""Write every turn as a numbered round and leave the last one open.

    >>> build_rounds("天气呢？", [("你好", "你好！")])
    '[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：天气呢？\n答：'
    """
    rounds = [
        f"[Round {index}]\n问：{question}\n答：{answer}\n"
        for index, (question, answer) in enumerate(history)
    ]
    return f"{''.join(rounds)}[Round {len(rounds)}]\n问：{query}\n答："


def build_prompt(query: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """Return the bare query, or numbered rounds when there were earlier turns.

    >>> build_prompt("你好")
    '你好'
    """
    return build_rounds(query, history) if history else query
