"""A question and its history to a prompt of the right length, by the builder of evaluation.

What is too long loses its oldest turns first. The question is cut only where it alone is too long,
exactly as evaluation cuts it, and whatever was left out is said.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ptuning.data.prompts import Example, RowFormat, TextRow, build_rounds, to_example
from ptuning.data.tokenization import to_generation_batch
from ptuning.data.tokenizer import ChatGLMTokenizer


@dataclass(frozen=True)
class ChatPrompt:
    """Token ids that end in [gMASK] <sop>, and a sentence on what had to be left out of them."""

    input_ids: list[int]
    notice: str | None


def build_chat_prompt(
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: Sequence[tuple[str, str]] = (),
    *,
    max_source_length: int,
    source_prefix: str = "",
    system: str = "",
) -> ChatPrompt:
    """Return the prompt in at most max_source_length tokens, [gMASK] and <sop> included.

    system stands before the first question that is kept.
    """

    def encode(dropped: int) -> tuple[list[int], bool]:
        example = _to_example(query, history[dropped:], source_prefix, system, bool(history))
        prompts, cuts = to_generation_batch(
            tokenizer, [example], max_source_length=max_source_length
        )
        return prompts[0], cuts[0]

    # Fewer turns are never more tokens, so halving finds the fewest to drop.
    dropped = bisect_left(range(len(history)), True, key=lambda start: not encode(start)[1])
    input_ids, question_cut = encode(dropped)
    return ChatPrompt(input_ids, _notice(dropped, question_cut, max_source_length))


def _to_example(
    query: str,
    history: Sequence[tuple[str, str]],
    source_prefix: str,
    system: str,
    has_rounds: bool,
) -> Example:
    """Build the example of evaluation; a chat that lost its turns stays a chat, in rounds."""
    turns = [*history, (query, "")]
    if system:
        turns[0] = (f"{system}\n{turns[0][0]}", turns[0][1])
    row = TextRow(0, turns[-1][0], history=tuple(turns[:-1]))
    example = to_example(row, RowFormat(source_prefix=source_prefix), for_training=False)
    if has_rounds and not example.has_rounds:
        example = example._replace(
            prompt=source_prefix + build_rounds(turns[-1][0]), has_rounds=True
        )
    return example


def _notice(dropped: int, question_cut: bool, limit: int) -> str | None:
    if not dropped and not question_cut:
        return None
    said = []
    if dropped:
        said.append(
            f"the oldest {dropped} turns were left out"
            if dropped > 1
            else "the oldest turn was left out"
        )
    if question_cut:
        said.append("the end of the question was cut off")
    return f"The prompt may have {limit} tokens: {' and '.join(said)}."
