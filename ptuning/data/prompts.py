"""Step 3 of 5: rows and chats to prompts, by one builder for training, evaluation and serving.

A question without history is the prompt itself; with history every turn is a numbered round, the
last one open. This module is light: it imports neither torch nor transformers.
Source: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/modeling_chatglm.py (`stream_chat`)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

FormatName = Literal["auto", "columns", "alpaca", "sharegpt", "messages", "history", "lima"]
Turns = Literal["all", "last"]
Recipe = Literal["corrected", "published"]
Template = Literal["plain", "alpaca-en", "alpaca-zh", "round"]
COLUMN_FIELDS = ("prompt_column", "input_column", "response_column", "history_column")
SHORTEST = 3  # tokens of either side: one of text next to two control tokens

# `to_example` for transformers' chats: one question is bare, more messages are numbered rounds, and
# a system message stands before the first question. The `generation` tag marks the answer that is
# trained on; trl's assistant_only_loss requires it.
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
{{- '答：' -}}
{%- if loop.last -%}
{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] ~ '\\n' -}}
{%- endif -%}
{%- set chat.round = chat.round + 1 -%}
{%- set chat.expected = 'user' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and chat.expected != 'assistant' -%}
{{- raise_exception('add_generation_prompt needs a user message last: the question to answer') -}}
{%- endif -%}
"""
# With and without an input; they end in the colon, and the answer follows immediately. alpaca-en is
# PROMPT_DICT of https://github.com/tatsu-lab/stanford_alpaca/blob/761dc5b/train.py, byte for byte;
# alpaca-zh is our own translation, because several are in use and none is published.
ALPACA = {
    "alpaca-en": (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:",
    ),
    "alpaca-zh": (
        "下面是一条描述任务的指令，并附有提供更多背景的输入。请写出恰当完成该请求的回复。\n\n"
        "### 指令：\n{instruction}\n\n### 输入：\n{input}\n\n### 回复：",
        "下面是一条描述任务的指令。请写出恰当完成该请求的回复。\n\n"
        "### 指令：\n{instruction}\n\n### 回复：",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows become tokens; each field is the flag of the same name.

    A column that is None is found by its name (`formats.find_layout`). Lengths are in tokens.
    """

    format: FormatName = "auto"
    prompt_column: str | None = None
    input_column: str | None = None
    response_column: str | None = None
    history_column: str | None = None
    turns: Turns = "all"
    source_prefix: str = ""
    max_source_length: int = 64
    max_target_length: int = 64
    recipe: Recipe = "corrected"

    def __post_init__(self) -> None:
        """Reject unknown words, lengths without room for text, and columns named in a format."""
        for flag, kind in (("format", FormatName), ("turns", Turns), ("recipe", Recipe)):
            if getattr(self, flag) not in get_args(kind):
                *others, last = get_args(kind)
                raise ValueError(
                    f"--{flag} is {getattr(self, flag)}; use {', '.join(others)} or {last}."
                )
        for flag in ("max_source_length", "max_target_length"):
            if getattr(self, flag) < SHORTEST:
                raise ValueError(f"--{flag} is {getattr(self, flag)}; use {SHORTEST} or more.")
        if self.format != "auto" and self.named_columns:
            flag, column = next(iter(self.named_columns.items()))
            raise ValueError(
                f"--format is {self.format}, which says what the columns are, and {flag} is "
                f"{column}; leave one of them out."
            )

    @property
    def named_columns(self) -> dict[str, str]:
        """The columns that were named, by flag."""
        columns = {f"--{field}": getattr(self, field) for field in COLUMN_FIELDS}
        return {flag: column for flag, column in columns.items() if column is not None}


class TextRow(NamedTuple):
    """The row contract: its line in the file, prompt, answer and earlier (question, answer) turns.

    A missing answer is "". skipped: why training leaves the row out; None if it does not. system:
    the text that the first question of the history begins with, needed when that turn is dropped.
    """

    line: int
    prompt: str
    response: str = ""
    history: tuple[tuple[str, str], ...] = ()
    skipped: str | None = None
    system: str = ""


class Example(NamedTuple):
    """A row as text: prompt and answer, and the parts the prompt was built from.

    has_rounds: the prompt is written in rounds, so that old turns can be dropped. system: as in
    `TextRow`.
    """

    prompt: str
    response: str
    query: str
    history: tuple[tuple[str, str], ...] = ()
    source_prefix: str = ""
    has_rounds: bool = False
    system: str = ""


def to_example(row: TextRow, row_format: RowFormat, *, for_training: bool = True) -> Example:
    """Build the prompt of a row.

    The published recipe trains on `[Round 0]` where a history column is named but empty, and
    evaluates and chats with the bare query; the corrected one uses the bare query everywhere.

    >>> to_example(TextRow(1, "天气呢？", "好"), RowFormat(source_prefix="问：")).prompt
    '问：天气呢？'
    """
    prefix = row_format.source_prefix
    named = row_format.history_column is not None
    has_rounds = bool(row.history) or (named and row_format.recipe == "published" and for_training)
    prompt = build_rounds(row.prompt, row.history) if has_rounds else row.prompt
    return Example(
        prefix + prompt, row.response, row.prompt, row.history, prefix, has_rounds, row.system
    )


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


def build_alpaca(instruction: str, text: str, template: Template = "alpaca-en") -> str:
    r"""Write an instruction and its input, "" for none, as an Alpaca prompt.

    >>> build_alpaca("译成英文", "苹果", "alpaca-zh")[-33:]
    '### 指令：\n译成英文\n\n### 输入：\n苹果\n\n### 回复：'
    """
    with_input, without = ALPACA[template]
    return (with_input if text else without).format(instruction=instruction, input=text)


# transformers' chats: lists of {"role": ..., "content": ...}


def as_chats(conversation: list[Any]) -> list[Any]:
    """Return a batch of chats as it is, and a chat as the only one of a batch."""
    is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
    return conversation if is_batch else [conversation]


def check_contents(chats: list[Any]) -> None:
    """Reject contents in blocks: `CHAT_TEMPLATE` would write the list itself into the prompt."""
    for chat in chats:
        for number, message in enumerate(chat, 1):
            if isinstance(message.get("content"), list):
                raise ValueError(
                    f"the content of message {number} is a list, and ChatGLM-6B reads only text; "
                    f'write {{"role": "{message.get("role")}", "content": "..."}}.'
                )


def end_in_answer(chats: list[Any]) -> bool:
    """Return whether all chats end in an answer, or none; reject a mixture."""
    ends = {bool(chat) and chat[-1].get("role") == "assistant" for chat in chats}
    if len(ends) > 1:
        raise ValueError(
            "some chats of the batch end in an answer and others in a question; encode the two "
            "kinds apart, or pass add_generation_prompt=True for questions only."
        )
    return ends == {True}


def last_text(chat: list[Any]) -> str:
    """Return the text of the last message."""
    text = chat[-1].get("content")
    if not isinstance(text, str):
        raise ValueError(
            f"the last message has no text: its content is of type {type(text).__name__}; "
            'write {"role": "assistant", "content": "..."}.'
        )
    return text
