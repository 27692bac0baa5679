"""Step 3 of 5: rows and chats to prompts, by one builder for training, evaluation and serving.

A question without history is the prompt itself; with history every turn is a numbered round, the
last one open.
Source: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/modeling_chatglm.py (`stream_chat`)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

FormatName = Literal["auto", "columns", "alpaca", "sharegpt", "messages", "history", "lima"]
Turns = Literal["all", "last"]
SHORTEST = 3  # tokens of either side: one of text next to two control tokens
Recipe = Literal["corrected", "published"]

# The prompts of `to_example` for transformers' chats: one question is bare, more messages are
# numbered rounds, and a system message stands before the first question. The `generation`
# tag marks the answer that is trained on; trl's assistant_only_loss requires it.
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
        """Refuse words that --format, --turns and --recipe do not have, and columns in a format."""
        check_word("format", self.format, FormatName)
        check_word("turns", self.turns, Turns)
        check_recipe(self.recipe)
        if self.format != "auto" and self.named_columns:
            flag, column = next(iter(self.named_columns.items()))
            raise ValueError(
                f"--format is {self.format}, which says what the columns are, and {flag} is "
                f"{column}; leave one of them out."
            )

    @property
    def named_columns(self) -> dict[str, str]:
        """The columns that were named, by flag."""
        columns = {
            "--prompt_column": self.prompt_column,
            "--input_column": self.input_column,
            "--response_column": self.response_column,
            "--history_column": self.history_column,
        }
        return {flag: column for flag, column in columns.items() if column is not None}


class TextRow(NamedTuple):
    """The row contract: its line in the file, prompt, answer and earlier (question, answer) turns.

    An answer that is not there is "". `skipped` says why training leaves the row out, None: it does
    not. `system` is the text that the first earlier question begins with, for when that is cut.
    """

    line: int
    prompt: str
    response: str = ""
    history: tuple[tuple[str, str], ...] = ()
    skipped: str | None = None
    system: str = ""


class Example(NamedTuple):
    """One row of data as text: the prompt, the answer, and the parts the prompt was built from.

    `has_rounds` says whether the prompt is written in rounds; only then can old turns be left out.
    `system` is the text that the first turn of history begins with: it outlives that turn.
    """

    prompt: str
    response: str
    query: str
    history: tuple[tuple[str, str], ...] = ()
    source_prefix: str = ""
    has_rounds: bool = False
    system: str = ""


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


def to_example(row: TextRow, row_format: RowFormat, *, for_training: bool = True) -> Example:
    """Build the example of a row (`reading.read_rows`).

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


def check_word(flag: str, word: str, words: Any) -> None:
    """Refuse a word that is none of a Literal's."""
    if word not in get_args(words):
        *others, last = get_args(words)
        raise ValueError(f"--{flag} is {word}; use {', '.join(others)} or {last}.")


def check_recipe(recipe: str) -> None:
    """Refuse any other word than the two recipes."""
    if recipe not in get_args(Recipe):
        raise ValueError(
            f"--recipe is {recipe}; use corrected (the default) or published, which repeats the "
            "published preprocessing for comparison."
        )


def check_contents(conversation: list[Any]) -> None:
    """Refuse contents in blocks: `CHAT_TEMPLATE` would write the list itself into the prompt."""
    for chat in conversation if _is_batch(conversation) else [conversation]:
        for number, message in enumerate(chat, 1):
            if isinstance(message, Mapping) and isinstance(message.get("content"), list):
                raise ValueError(
                    f"the content of message {number} is a list, and ChatGLM-6B reads only text; "
                    f'write {{"role": "{message.get("role")}", "content": "..."}}.'
                )


def ends_in_answer(conversation: list[Any]) -> bool:
    """Say whether the chat, or every chat of the batch, ends in an answer; refuse a mixture."""
    chats = conversation if _is_batch(conversation) else [conversation]
    ends = {bool(chat) and chat[-1].get("role") == "assistant" for chat in chats}
    if len(ends) > 1:
        raise ValueError(
            "some chats of the batch end in an answer and others in a question; encode the two "
            "kinds apart, or pass add_generation_prompt=True for questions only."
        )
    return ends == {True}


def split_answers(conversation: list[Any]) -> tuple[list[Any], Any]:
    """Return the chats without their last message, and those messages' texts."""
    if _is_batch(conversation):
        return [chat[:-1] for chat in conversation], [_text_of(chat[-1]) for chat in conversation]
    return conversation[:-1], _text_of(conversation[-1])


def _text_of(message: Mapping[str, Any]) -> str:
    text = message.get("content")
    if not isinstance(text, str):
        raise ValueError(
            f"the last message has no text: its content is of type {type(text).__name__}; "
            'write {"role": "assistant", "content": "..."}.'
        )
    return text


def _is_batch(conversation: list[Any]) -> bool:
    return bool(conversation) and isinstance(conversation[0], (list, tuple))
