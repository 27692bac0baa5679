"""Step 4 of 5: examples to token ids, `prompt [gMASK] <sop> answer <eop>`, cut to their lengths.

A row is at most max_source_length + max_target_length tokens, and is never padded here. The
published recipe keeps the head of every prompt and ends every answer with <eop>. The corrected one
ends only whole answers so, and cuts rounds from the oldest: the question and `答：` stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ptuning.data.prompts import SHORTEST, Example, Recipe, build_rounds, check_recipe
from ptuning.data.tokenizer import ChatGLMTokenizer

IGNORED_LABEL = -100  # what PyTorch's cross entropy leaves out


class TokenizedExample(NamedTuple):
    """One training row: its ids, where `<sop>` stands in them, and what had to be cut."""

    input_ids: list[int]
    context_length: int
    prompt_cut: bool
    answer_cut: bool


def to_training_batch(
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[Example],
    *,
    max_source_length: int,
    max_target_length: int,
    recipe: Recipe = "corrected",
) -> list[TokenizedExample]:
    """Encode rows for training: context of max_source_length, answer of max_target_length tokens.

    `[gMASK]` counts to the context; `<sop>` and `<eop>` to the answer.
    """
    check_recipe(recipe)
    _check_length("--max_source_length", max_source_length)
    _check_length("--max_target_length", max_target_length)
    texts = [text for example in examples for text in (example.prompt, example.response)]
    encoded = tokenizer.encode_batch(texts)
    rows = []
    for example, prompt_ids, answer_ids in zip(examples, encoded[::2], encoded[1::2], strict=True):
        context, prompt_cut = _fit_prompt(
            tokenizer, example, prompt_ids, max_source_length - 1, recipe
        )
        answer = answer_ids[: max_target_length - 2]
        answer_cut = len(answer) < len(answer_ids)
        ids = tokenizer.build_inputs_with_special_tokens(context, answer)
        if answer_cut and recipe == "corrected":
            ids.pop()  # <eop> would teach the model to stop in the middle of a sentence
        rows.append(TokenizedExample(ids, len(context) + 1, prompt_cut, answer_cut))
    return rows


def to_generation_batch(
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[Example],
    *,
    max_source_length: int,
    recipe: Recipe = "corrected",
) -> tuple[list[list[int]], list[bool]]:
    """Return each prompt's ids, `[gMASK] <sop>` included in the length, and whether it was cut."""
    check_recipe(recipe)
    _check_length("--max_source_length", max_source_length)
    encoded = tokenizer.encode_batch([example.prompt for example in examples])
    prompts = []
    cuts = []
    for example, prompt_ids in zip(examples, encoded, strict=True):
        context, was_cut = _fit_prompt(
            tokenizer, example, prompt_ids, max_source_length - 2, recipe
        )
        prompts.append(tokenizer.build_inputs_with_special_tokens(context))
        cuts.append(was_cut)
    return prompts, cuts


def _check_length(flag: str, length: int) -> None:
    if length < SHORTEST:
        raise ValueError(f"{flag} is {length}; use {SHORTEST} or more tokens.")


def _fit_prompt(
    tokenizer: ChatGLMTokenizer,
    example: Example,
    prompt_ids: list[int],
    budget: int,
    recipe: Recipe,
) -> tuple[list[int], bool]:
    """Return at most budget ids of the prompt, and whether something is missing from them."""
    if len(prompt_ids) <= budget:
        return prompt_ids, False
    if recipe == "published" or not example.has_rounds:
        return prompt_ids[:budget], True
    return _fit_rounds(tokenizer, example, budget), True


def _fit_rounds(tokenizer: ChatGLMTokenizer, example: Example, budget: int) -> list[int]:
    """Leave out the oldest turns until the rest fits; after all of them, the question's end."""
    for start in range(1, len(example.history) + 1):
        ids = _encode_rounds(tokenizer, example, example.query, start)
        if len(ids) <= budget:
            return ids
    num_turns = len(example.history)
    shortest, longest = 0, len(example.query)  # characters kept; ids grow with them
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if len(_encode_rounds(tokenizer, example, example.query[:middle], num_turns)) <= budget:
            shortest = middle
        else:
            longest = middle - 1
    ids = _encode_rounds(tokenizer, example, example.query[:shortest], num_turns)
    return ids[-budget:]  # a budget below the bare `[Round 0]` form still keeps `答：`


def _encode_rounds(
    tokenizer: ChatGLMTokenizer, example: Example, query: str, start: int
) -> list[int]:
    history, system = example.history[start:], example.system
    if system.strip() and start:  # the turn that it was written before is cut
        if history:
            history = ((f"{system}\n{history[0][0]}", history[0][1]), *history[1:])
        else:
            query = f"{system}\n{query}"
    prompt = example.source_prefix + build_rounds(query, history)
    return tokenizer.encode_batch([prompt], num_threads=1)[0]
