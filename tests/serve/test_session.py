"""The session answers as evaluation does, streams what it will not take back, and stops when told."""

import queue
import threading

import pytest
import torch

import ptuning
from ptuning.data.prompts import RowFormat, TextRow, to_example
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import Decoding, generate_answers
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.cpu.linear import Linear, has_onednn
from ptuning.serve.scheduler import QueueFullError
from ptuning.serve.session import Session, UnknownPrefixError, build_chat_prompt
from ptuning.serve.text_stream import clean_response
from ptuning.tunings.loading import NANO_DIR
from tests.data.one_row import to_generation_prompt
from tests.serve.live_server import wait_until_idle

QUESTIONS = [
    "类型#裤*版型#宽松",
    "类型#裙*颜色#白色*图案#条纹*风格#简约" * 4,
    "你好",
    "hello, who are you?",
    "类型#上衣*材质#棉",
]
HISTORY = [("你好", "你好，我是会写商品文案的小模型。"), ("谢谢", "不客气，很高兴帮到你。")]


def evaluated(nano, tokenizer, directory, questions, *, max_source_length, max_target_length):
    """The answers of evaluation, through its own builder and decoding."""
    if directory is not None:
        ptuning.load_prefix(nano, directory)
    prompts = [
        to_generation_prompt(
            tokenizer,
            to_example(TextRow(1, question), RowFormat()),
            max_source_length=max_source_length,
        )
        for question in questions
    ]
    answers = dict(
        generate_answers(
            nano,
            prompts,
            batch_size=3,
            decoding=Decoding(max_new_tokens=max_target_length),
        )
    )
    nano.remove_prefix()
    return [
        tokenizer.decode(answers[index], skip_special_tokens=True)
        for index in range(len(questions))
    ]


def test_answers_are_those_of_evaluation_without_saying_a_length(nano, session, prefix_dirs):
    expected = evaluated(
        nano,
        session.tokenizer,
        prefix_dirs["adgen"],
        QUESTIONS,
        max_source_length=64,
        max_target_length=24,
    )
    answers = [session.chat(question, prefix="adgen", clean=False) for question in QUESTIONS]
    assert [answer.read() for answer in answers] == expected
    cleaned = [session.chat(question, prefix="adgen").read() for question in QUESTIONS]
    assert cleaned == [clean_response(text.rstrip("\ufffd")) for text in expected]


def test_the_base_is_exactly_the_base(nano, session):
    expected = evaluated(
        nano, session.tokenizer, None, QUESTIONS, max_source_length=80, max_target_length=20
    )
    asked = [
        session.chat(q, prefix=name, clean=False, max_source_length=80, max_new_tokens=20).read()
        for q, name in zip(QUESTIONS, [None, "base"] * 3, strict=False)
    ]
    assert asked == expected
    untouched = ChatGLMForConditionalGeneration.from_pretrained(NANO_DIR, dtype=torch.float32)
    ids = torch.tensor([session.tokenizer(QUESTIONS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(session.model(ids).logits, untouched.eval()(ids).logits)


def test_strength_and_blend(session):
    question = QUESTIONS[0]

    def ask(prefix, **options):
        return session.chat(question, prefix=prefix, max_new_tokens=20, **options).read()

    assert len({ask(name) for name in ("base", "adgen", "other", "chatty")}) == 4
    assert ask("adgen", strength=0.0) == ask("base")
    assert ask("adgen", strength=1.0, blend=("other", 0.0)) == ask("adgen")
    assert ask("adgen", blend=("other", 1.0)) == ask("other")
    assert ask("adgen", blend=("other", 0.5)) == ask("other", blend=("adgen", 0.5))
    with pytest.raises(ValueError, match="gives 'other' the weight 1"):
        ask("adgen", blend=("other", 1.5))
    with pytest.raises(ValueError, match="blend adds"):
        ask(None, blend=("other", 0.5))
    with pytest.raises(UnknownPrefixError, match="there is no prefix 'nobody'; there are: adgen"):
        ask("adgen", blend=("nobody", 0.5))


def test_pieces_join_to_the_whole_answer_and_come_one_by_one(session):
    answer = session.chat("你好", HISTORY)
    pieces = list(answer)
    assert len(pieces) > 5
    assert "".join(pieces) == answer.text == session.chat("你好", HISTORY).read()
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens >= len(pieces)


def test_a_long_history_loses_its_oldest_turns_and_says_so(session):
    answer = session.chat("类型#裤", HISTORY, "adgen", max_source_length=55)
    assert answer.usage.prompt_tokens <= 55
    assert answer.notice == "The prompt may have 55 tokens: the oldest turn was left out."
    assert answer.read() == session.chat("类型#裤", HISTORY[1:], "adgen").read()
    assert session.chat("类型#裤", HISTORY, "other").notice is None


def test_cancelling_stops_the_computation(session):
    cancel = threading.Event()
    answer = session.chat("你好", temperature=5.0, seed=1, cancel=cancel, max_new_tokens=1500)
    next(answer)
    assert session.scheduler.num_rows == 1
    cancel.set()
    list(answer)
    assert answer.finish_reason == "cancelled"
    wait_until_idle(session)
    assert answer.usage.completion_tokens < 1500


def test_an_answer_that_nobody_reads_is_not_computed(session):
    answer = session.chat("你好", temperature=5.0, seed=1, max_new_tokens=1500)
    next(answer)
    del answer
    wait_until_idle(session)


def test_stop_strings_end_the_answer_before_them(session):
    whole = session.chat("你好").read()
    stop = whole[6:8]
    answer = session.chat("你好", stop=[stop, "never said"])
    assert answer.read() == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    wait_until_idle(session)


def test_many_threads_get_their_own_answers(session):
    names = ["base", "adgen", "other", "short", "chatty"]
    jobs = [(QUESTIONS[i % 5], names[i % 5 - i % 2]) for i in range(20)]
    alone = [session.chat(q, prefix=n, max_new_tokens=15).read() for q, n in jobs]
    found = [""] * len(jobs)

    def ask(place):
        question, name = jobs[place]
        found[place] = session.chat(question, prefix=name, max_new_tokens=15).read()

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_prefixes_come_and_go_while_answers_run(session, prefix_dirs):
    expected = session.chat("你好", prefix="adgen").read()
    session.add_prefix("again", prefix_dirs["adgen"])
    answer = session.chat("你好", prefix="again")
    session.remove_prefix("again")
    assert answer.read() == expected
    assert "again" not in session.prefixes
    with pytest.raises(UnknownPrefixError, match="'again'"):
        session.chat("你好", prefix="again")
    with pytest.raises(ValueError, match="already"):
        session.add_prefix("adgen", prefix_dirs["adgen"])
    for name in ("base", "", "a/b", "x" * 65):
        with pytest.raises(ValueError, match="cannot name a prefix"):
            session.add_prefix(name, prefix_dirs["adgen"])


def test_the_engine_lets_go_of_a_removed_prefix_in_its_own_thread(
    session, prefix_dirs, monkeypatch
):
    session.chat("你好", max_new_tokens=2).read()
    released = queue.Queue()
    monkeypatch.setattr(
        session.scheduler.engine, "release", lambda: released.put(threading.current_thread().name)
    )
    session.add_prefix("passing", prefix_dirs["adgen"])
    session.remove_prefix("passing")
    assert released.get(timeout=10) == "engine"


@pytest.mark.parametrize("length", [0, -3, 5000])
def test_lengths_that_do_not_fit_are_refused(session, length):
    with pytest.raises(ValueError, match=f"max_new_tokens is {length}"):
        session.chat("你好", max_new_tokens=length)


def test_a_full_queue_refuses_and_a_closed_session_too(nano, session):
    small = Session(nano, session.tokenizer, max_rows=1, max_queue=1)
    running = [small.chat("你好", temperature=5.0, max_new_tokens=1500) for _ in range(2)]
    with pytest.raises(QueueFullError, match="which is the limit"):
        small.chat("你好")
    small.close()
    assert {answer.read() is None or answer.finish_reason for answer in running} == {"cancelled"}
    with pytest.raises(RuntimeError, match="closed"):
        small.chat("你好")


def test_a_callback_may_close_the_session(nano, session):
    small = Session(nano, session.tokenizer)
    answer = small.chat("你好", max_new_tokens=30, on_progress=lambda finished: small.close())
    assert "你好".startswith(answer.read()[:2])
    assert answer.finish_reason == "cancelled"


def test_a_failure_reaches_who_waits_and_the_next_answer_works(session, monkeypatch):
    expected = session.chat("你好").read()
    with monkeypatch.context() as patch:
        patch.setattr(session.model.lm_head, "forward", lambda hidden: 1 // 0)
        with pytest.raises(RuntimeError, match="could not be computed"):
            session.chat("你好").read()
    assert session.chat("你好").read() == expected


# Prompts are those of evaluation, token by token


LONG_HISTORY = [(f"类型#裤*版型#宽松{i}", f"这款裤子是宽松的版型，穿着舒适{i}。") for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(NANO_DIR)


@pytest.mark.parametrize("limit", [8, 15, 30, 50, 80, 130, 500])
@pytest.mark.parametrize("history", [[], LONG_HISTORY])
@pytest.mark.parametrize("source_prefix", ["", "写:"])
def test_prompts_are_those_of_evaluation(tokenizer, limit, history, source_prefix):
    question = "类型#裙*颜色#白色*风格#简约*图案#条纹"
    example = to_example(
        TextRow(1, question, history=tuple(history)),
        RowFormat(source_prefix=source_prefix),
        for_training=False,
    )
    expected = to_generation_prompt(tokenizer, example, max_source_length=limit)
    input_ids, notice = build_chat_prompt(
        tokenizer, question, history, max_source_length=limit, source_prefix=source_prefix
    )
    assert input_ids == expected
    whole = to_generation_prompt(tokenizer, example, max_source_length=5000)
    assert (notice is None) == (expected == whole)


def test_a_system_message_stays_when_turns_are_dropped(tokenizer):
    input_ids, notice = build_chat_prompt(
        tokenizer, "你好", LONG_HISTORY, max_source_length=70, system="请用活泼的语气"
    )
    text = tokenizer.decode(input_ids, skip_special_tokens=True)
    assert text.startswith("[Round 0]\n问:请用活泼的语气\n类型#裤")
    assert text.endswith("问:你好\n答:")
    assert notice.startswith("The prompt may have 70 tokens: the oldest ")
    assert len(input_ids) <= 70


def test_the_notice_says_what_is_missing(tokenizer):
    _, notice = build_chat_prompt(tokenizer, "类型#裤" * 20, LONG_HISTORY, max_source_length=20)
    assert notice == (
        "The prompt may have 20 tokens: the oldest 4 turns were left out and the end of the "
        "question was cut off."
    )


# Prepacked weights


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch was built without oneDNN")
def test_every_linear_map_of_a_session_is_frozen_and_prepacked():
    with Session.load(NANO_DIR, device="cpu") as session:
        model = session.model
        assert not [name for name, p in model.named_parameters() if p.requires_grad]
        maps = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, Linear) and module.weight.dtype is torch.float32
        ]
        assert len(maps) >= 4 * model.config.num_layers  # attention has two, the MLP two
        assert not [name for name, module in maps if module.prepacked_weight() is None]
        assert session.chat("你好", max_new_tokens=4).read()
        assert not [name for name, module in maps if module.prepacked_weight() is None]
