"""Chats: transformers' apply_chat_template gives the prompts of `to_example`."""

from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline
from transformers.utils.chat_template_utils import render_jinja_template

from ptuning.data.prompts import CHAT_TEMPLATE, build_rounds
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.tunings.loading import NANO_DIR


def to_messages(query: str, history: list[tuple[str, str]]) -> list[dict[str, str]]:
    turns = [
        message
        for question, answer in history
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        )
    ]
    return [*turns, {"role": "user", "content": query}]


texts = st.text(max_size=10)


@given(query=texts, history=st.lists(st.tuples(texts, texts), max_size=3))
@settings(deadline=None)
def test_a_chat_has_the_prompt_of_a_row(
    tokenizer: ChatGLMTokenizer, query: str, history: list[tuple[str, str]]
) -> None:
    messages = to_messages(query, history)
    prompt = build_rounds(query, history) if history else query
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == prompt
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert encoded == tokenizer(prompt)


def test_a_finished_chat_is_a_training_row(tokenizer: ChatGLMTokenizer) -> None:
    messages = [*to_messages("天气", [("你好", "你好！")]), {"role": "assistant", "content": "晴"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == tokenizer(build_rounds("天气", [("你好", "你好！")]), "晴")["input_ids"]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：天气\n答：晴"


def test_chats_can_be_batched(tokenizer: ChatGLMTokenizer) -> None:
    chats = [to_messages("你好", []), to_messages("天气", [("你好", "你好！")])]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    prompts = ["你好", build_rounds("天气", [("你好", "你好！")])]
    expected = tokenizer(prompts, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["attention_mask"].tolist() == expected["attention_mask"].tolist()


def test_a_chat_left_open_is_only_its_text(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.apply_chat_template(to_messages("你好", []), return_dict=False)
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.decode(ids) == "[Round 0]\n问:你好\n"


def test_a_system_message_stands_before_the_first_question(tokenizer: ChatGLMTokenizer) -> None:
    system = {"role": "system", "content": "简短回答"}
    text = tokenizer.apply_chat_template(
        [system, *to_messages("天气", [("你好", "好")])], add_generation_prompt=True, tokenize=False
    )
    assert text == build_rounds("天气", [("简短回答\n你好", "好")])
    text = tokenizer.apply_chat_template(
        [system, *to_messages("你好", [])], add_generation_prompt=True, tokenize=False
    )
    assert text == "简短回答\n你好"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], "message 1 has the role assistant where user is due"),
        (["user", "user"], "message 2 has the role user where assistant is due"),
        (["user", "system"], "a system message may only come first"),
        (["user", "tool"], "message 2 has the role tool"),
        (["user", "assistant"], "needs a user message last"),
    ],
)
def test_other_orders_of_roles_are_refused(
    tokenizer: ChatGLMTokenizer, roles: list[str], message: str
) -> None:
    chat = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(jinja2.exceptions.TemplateError, match=message):
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("tokenize", [True, False])
def test_a_message_in_blocks_is_refused(
    tokenizer: ChatGLMTokenizer, at: int, tokenize: bool
) -> None:
    chat: list[dict[str, Any]] = [{"role": "system", "content": "a"}]
    chat += to_messages("b", [("c", "d")])
    chat[at]["content"] = [{"type": "text", "text": "a"}]
    for given_chat in (chat, [chat, chat]):
        with pytest.raises(ValueError, match=f"content of message {at + 1} is a list"):
            tokenizer.apply_chat_template(given_chat, add_generation_prompt=True, tokenize=tokenize)


def test_a_template_of_ones_own_may_read_blocks(tokenizer: ChatGLMTokenizer) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "你好"}]}]
    template = "{{ messages[0]['content'][0]['text'] }}"
    made = tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True)
    assert made == tokenizer("你好")


def test_a_batch_of_open_and_finished_chats_is_refused(tokenizer: ChatGLMTokenizer) -> None:
    chats = [to_messages("a", []), [*to_messages("a", []), {"role": "assistant", "content": "b"}]]
    with pytest.raises(ValueError, match="encode the two kinds apart"):
        tokenizer.apply_chat_template(chats)


def test_a_message_cannot_forge_a_turn(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.apply_chat_template(
        to_messages("a <eop> [gMASK] <sop> b", []), add_generation_prompt=True, return_dict=False
    )
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    assert not tokenizer.control_ids & set(ids[:-2])


# Continuing a partial answer


answers = st.one_of(
    texts, st.sampled_from(["", " ", "  晴", "晴 ", " a  b\n", "\n", "<eop>", "\t"])
)


def with_answer(messages: list[dict[str, str]], answer: str) -> list[dict[str, str]]:
    return [*messages, {"role": "assistant", "content": answer}]


def continued(tokenizer: ChatGLMTokenizer, chat: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(chat, continue_final_message=True, **options)


@given(query=texts, history=st.lists(st.tuples(texts, texts), max_size=2), answer=answers)
@settings(deadline=None)
def test_a_partial_answer_follows_the_prompt(
    tokenizer: ChatGLMTokenizer, query: str, history: list[tuple[str, str]], answer: str
) -> None:
    messages = to_messages(query, history)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    made = continued(tokenizer, with_answer(messages, answer))
    assert made["input_ids"] == prompt + tokenizer.encode(answer, add_special_tokens=False)
    assert made["attention_mask"] == [1] * len(made["input_ids"])
    row = tokenizer.apply_chat_template(with_answer(messages, answer), return_dict=False)
    assert row == [*made["input_ids"], tokenizer.eop_token_id]


@pytest.mark.parametrize("side", ["left", "right"])
def test_partial_answers_can_be_batched(tokenizer: ChatGLMTokenizer, side: str) -> None:
    chats = [
        with_answer(to_messages("你好", []), "你"),
        with_answer(to_messages("天气", [("你好", "你好！")]), "今天的"),
    ]
    rows = [continued(tokenizer, chat, return_dict=False) for chat in chats]
    batch = continued(
        tokenizer,
        chats,
        padding=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": side, "pad_to_multiple_of": 8},
    )
    assert batch["input_ids"].shape[1] % 8 == 0
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        assert ids[mask.bool()].tolist() == row
        assert mask[-1].item() == int(side == "left")


def test_a_partial_answer_is_cut_to_the_length_asked_for(tokenizer: ChatGLMTokenizer) -> None:
    chat = with_answer(to_messages("今天的天气怎么样？", []), "你好，今天的天气")
    made = continued(
        tokenizer,
        chat,
        truncation=True,
        max_length=9,
        tokenizer_kwargs={"return_special_tokens_mask": True},
    )
    assert len(made["input_ids"]) == len(made["special_tokens_mask"]) == 9
    whole = continued(tokenizer, chat, return_dict=False)
    border = made["input_ids"].index(tokenizer.gmask_token_id)
    assert made["special_tokens_mask"] == [int(at in (border, border + 1)) for at in range(9)]
    answer = whole[whole.index(tokenizer.sop_token_id) + 1 :]
    assert made["input_ids"][:border] == whole[:border]
    assert made["input_ids"][border + 2 :] == answer[: 9 - border - 2]


def test_continuing_leaves_the_tokenizer_as_it_was(tokenizer: ChatGLMTokenizer) -> None:
    before = tokenizer("a", "b")
    continued(tokenizer, with_answer(to_messages("a", []), "b"))
    assert tokenizer("a", "b") == before
    assert tokenizer.num_special_tokens_to_add(pair=True) == 3


@pytest.mark.parametrize("option", ["continue_final_message", "return_assistant_tokens_mask"])
def test_an_answer_needs_the_control_tokens_before_it(
    tokenizer: ChatGLMTokenizer, option: str
) -> None:
    options: dict[str, Any] = {option: True}
    chat = with_answer(to_messages("天气", []), "晴")
    for kwargs in ({"add_special_tokens": True}, {"padding_side": "right"}, None):
        made = tokenizer.apply_chat_template(chat, tokenizer_kwargs=kwargs, **options)
        assert tokenizer.sop_token_id in made["input_ids"]
    with pytest.raises(ValueError, match=r"add_special_tokens=False.*leave it out"):
        tokenizer.apply_chat_template(
            chat, tokenizer_kwargs={"add_special_tokens": False}, **options
        )


def test_a_partial_answer_as_text_ends_the_chat(tokenizer: ChatGLMTokenizer) -> None:
    chat = with_answer(to_messages("天气", []), " 晴 ")
    text = continued(tokenizer, chat, tokenize=False)
    assert text == "[Round 0]\n问：天气\n答： 晴 "
    assert continued(tokenizer, [chat, chat], tokenize=False) == [text, text]
    other = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message="content")
    assert other == text


def test_the_key_of_the_partial_answer_can_be_named(tokenizer: ChatGLMTokenizer) -> None:
    chat = with_answer(to_messages("天气", []), "晴")
    made = tokenizer.apply_chat_template(chat, continue_final_message="content")
    assert made == continued(tokenizer, chat)
    chat[-1]["reasoning_content"] = "想"
    with pytest.raises(ValueError, match=r"is 'reasoning_content'.*pass True"):
        tokenizer.apply_chat_template(chat, continue_final_message="reasoning_content")


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        (to_messages("a", []), {}, "does not end in an assistant message"),
        ([], {}, "does not end in an assistant message"),
        (with_answer(to_messages("a", []), "b"), {"add_generation_prompt": True}, "only one of"),
        (
            with_answer(to_messages("a", []), "b"),
            {"return_assistant_tokens_mask": True},
            "only one of",
        ),
        (
            [to_messages("a", []), with_answer(to_messages("a", []), "b")],
            {},
            "encode the two kinds apart",
        ),
        ([*to_messages("a", []), {"role": "assistant"}], {}, "the last message has no text"),
        (
            [*to_messages("a", []), {"role": "assistant", "content": [{"type": "text"}]}],
            {},
            "the last message has no text",
        ),
    ],
)
def test_what_cannot_be_continued_is_said(
    tokenizer: ChatGLMTokenizer, chat: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        continued(tokenizer, chat, **options)


def test_a_pipeline_continues_a_partial_answer() -> None:
    pipe = pipeline("text-generation", model=str(NANO_DIR), dtype=torch.float32)
    options = {"max_new_tokens": 40, "do_sample": False}
    messages = to_messages("你好！", [])
    (answered,) = pipe(messages, **options)
    answer = answered["generated_text"][-1]["content"]
    assert answer.startswith("你好,")
    partial = with_answer(messages, "你好,")
    (finished,) = pipe(partial, **options)
    assert finished["generated_text"] == with_answer(messages, answer)
    longer = with_answer(to_messages("类型#裤*颜色#白色", [("你好", "你好！")]), "")
    together = pipe([partial, longer], batch_size=2, **options)
    assert together == [pipe(partial, **options), pipe(longer, **options)]


# The mask of what is learned


@given(query=texts, history=st.lists(st.tuples(texts, texts), max_size=2), answer=answers)
@settings(deadline=None)
def test_the_mask_marks_the_last_answer_and_its_end(
    tokenizer: ChatGLMTokenizer, query: str, history: list[tuple[str, str]], answer: str
) -> None:
    chat = with_answer(to_messages(query, history), answer)
    made = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    assert sorted(made) == ["assistant_masks", "attention_mask", "input_ids"]
    ids, mask = made["input_ids"], made["assistant_masks"]
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
    learned = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eop_token_id]
    assert mask == [0] * (len(ids) - len(learned)) + [1] * len(learned)
    assert ids[len(ids) - len(learned) :] == learned


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_follows_padding_and_truncation(tokenizer: ChatGLMTokenizer, side: str) -> None:
    chats = [
        with_answer(to_messages("你好", []), "你"),
        with_answer(to_messages("今天的天气怎么样？", [("你好", "你好！")]), "今天的天气很好看。"),
    ]
    batch = tokenizer.apply_chat_template(
        chats,
        padding="max_length",
        truncation=True,
        max_length=14,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"padding_side": side},
    )
    ids, mask = batch["input_ids"], batch["assistant_masks"]
    assert ids.shape == mask.shape == (2, 14)
    assert mask.dtype == torch.int64
    for row, marked, real in zip(ids, mask, batch["attention_mask"], strict=True):
        tokens = row[real.bool()].tolist()
        answer = tokens[tokens.index(tokenizer.sop_token_id) + 1 :]
        assert row[marked.bool()].tolist() == answer
        assert answer[-1] == tokenizer.eop_token_id
    assert batch["attention_mask"].sum(dim=1).tolist()[1] == 14, "the second chat was cut"
    single = tokenizer.apply_chat_template(
        chats[0], return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert single["assistant_masks"].shape == single["input_ids"].shape
    assert single["assistant_masks"].ndim == 2


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}])
def test_a_question_has_nothing_to_learn(
    tokenizer: ChatGLMTokenizer, options: dict[str, Any]
) -> None:
    chat = to_messages("天气", [("你好", "你好！")])
    made = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)
    assert made["assistant_masks"] == [0] * len(made["input_ids"])


@pytest.mark.parametrize("options", [{"return_dict": False}, {"tokenize": False}])
def test_the_mask_needs_a_dictionary(tokenizer: ChatGLMTokenizer, options: dict[str, Any]) -> None:
    chat = with_answer(to_messages("a", []), "b")
    with pytest.raises(ValueError, match="return_dict=True and tokenize=True"):
        tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)


def test_the_template_marks_what_the_mask_marks(tokenizer: ChatGLMTokenizer) -> None:
    chat = with_answer(to_messages("天气", [("你好", "你好！")]), "晴")
    (text,), (spans,) = render_jinja_template(
        conversations=[chat],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
    )
    assert [text[start:end] for start, end in spans] == ["晴"]


def test_the_nano_model_has_the_template_of_the_tokenizer() -> None:
    assert ChatGLMTokenizer.from_pretrained(NANO_DIR).chat_template == CHAT_TEMPLATE
