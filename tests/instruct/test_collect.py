"""Waves of requests become rows: what prompts show, what is counted, and how a run is continued."""

import json
import subprocess
import sys
from collections import Counter
from random import Random

import pytest

from ptuning.completions.endpoint import EndpointError
from ptuning.completions.source import Completion, EngineSource
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import read_rows
from ptuning.data.similarity import Pool
from ptuning.instruct.blocks import Task
from ptuning.instruct.collect import MAX_IDLE, MAX_WAVE, Collector, Settings, Tally
from ptuning.instruct.filters import BLOCKED_WORDS
from ptuning.instruct.templates import TEMPLATES
from tests.completions.scripted import ScriptedSource, completed, sentence, tasks_for

NUM = 60  # rows: two waves and a bit, at four tasks a request
SEEDS = [
    Task(f"Describe {sentence(Random(n), 6)}.", "", sentence(Random(-n), 4)) for n in range(1, 9)
]
PROMPT = "List of tasks:\n"


def open_run(out, source=None, *, seeds=SEEDS, **changes):
    options = {"template": "en", "tasks_per_request": 4, "blocklist": list(BLOCKED_WORDS)} | changes
    return Collector(Settings(**options), seeds, source or ScriptedSource(), out)


def collect(out, num=NUM, source=None, *, max_requests=None, **changes):
    """Return the tally of a run."""
    return open_run(out, source, **changes).collect(num, max_requests=max_requests)


def rows_of(out):
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def files_of(out):
    return {file.name: file.read_bytes() for file in sorted(out.parent.iterdir())}


def journal_of(out):
    return out.with_suffix(".requests.jsonl")


def shown_in(prompt):
    """Return the instructions that a prompt shows."""
    lines = prompt.split("\n")
    return [line.split("Instruction: ")[1] for line in lines if "Instruction: " in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of NUM rows that nothing interrupted, and its source."""
    out, source = tmp_path_factory.mktemp("finished") / "new.jsonl", ScriptedSource()
    collect(out, source=source)
    return out, source


def test_rows_follow_the_contract_and_are_read_by_default(finished):
    out, _ = finished
    read = read_rows(out, RowFormat())
    assert (len(read.kept), read.dropped, read.unused) == (NUM, {}, {})
    for text, row in zip(read.kept, rows_of(out), strict=True):
        assert list(row) == ["id", "prompt", "response", "history", "source", "meta"]
        meta = row["meta"]
        assert text.prompt == row["prompt"] == "\n".join(filter(None, list(meta.values())[:2]))
        assert text.response == row["response"] == meta["output"]
        assert row["source"] == "generate:en"
        assert list(meta) == [
            *("instruction", "input", "output", "most_similar", "avg_similarity"),
            *("request", "model", "template"),
        ]
        assert meta["model"] == "scripted"
        assert meta["template"] == f"en:{TEMPLATES['en'].digest}"
        assert row["id"].startswith(f"new:{meta['request']}.")
    assert len({row["id"] for row in rows_of(out)}) == NUM


def test_a_row_names_the_ten_most_similar_of_seeds_and_earlier_rows(finished):
    pool = Pool([seed.instruction for seed in SEEDS])
    for row in rows_of(finished[0]):
        meta = row["meta"]
        scores = dict(zip(pool.texts, pool.scores(meta["instruction"]).tolist(), strict=True))
        assert meta["avg_similarity"] == pytest.approx(sum(scores.values()) / len(scores), abs=1e-6)
        named = meta["most_similar"]
        assert len(named) == min(10, len(scores))
        assert list(named.values()) == pytest.approx(
            sorted(scores.values(), reverse=True)[:10], abs=1e-4
        )
        assert named == pytest.approx({text: scores[text] for text in named}, abs=1e-4)
        assert max(scores.values()) <= 0.7
        pool.add(meta["instruction"])


def test_the_report_adds_up(finished):
    out, source = finished
    report = json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))
    assert list(report) == [
        *("requests", "prompt_tokens", "completion_tokens", "retries", "made", "kept", "dropped"),
        *("ended", "settings"),
    ]
    assert report["kept"] == NUM == len(rows_of(out))
    assert report["made"] == report["kept"] + sum(report["dropped"].values())
    assert report["dropped"]["blocked_word"] > 0
    assert report["requests"] == len(source.asks)
    assert report["prompt_tokens"] == 100 * len(source.asks)
    assert report["completion_tokens"] == 40 * len(source.asks)
    assert report["ended"] == ""
    assert report["settings"]["max_new_tokens"] == 3072


def test_the_tally_is_one_line(tmp_path):
    tally = collect(tmp_path / "new.jsonl", 5)
    assert str(tally) == (
        "2 requests (0 retried in this run), 280 tokens: 6 tasks made, 5 kept, "
        "dropped: 1 blocked_word"
    )
    assert str(Tally(requests=1, made=1, kept=1)) == (
        "1 request (0 retried in this run), 0 tokens: 1 task made, 1 kept, dropped: none"
    )


def test_the_same_command_again_asks_for_nothing_and_changes_no_byte(finished):
    out, _ = finished
    before, source = files_of(out), ScriptedSource()
    assert sorted(before) == ["new.jsonl", "new.report.json", "new.requests.jsonl"]
    assert collect(out, source=source).kept == NUM
    assert source.asks == []
    assert files_of(out) == before


def test_the_same_seed_asks_the_same_and_another_one_does_not(finished, tmp_path):
    wanted = finished[1].asks
    again, other = ScriptedSource(), ScriptedSource()
    collect(tmp_path / "again.jsonl", source=again)
    collect(tmp_path / "other.jsonl", source=other, seed=43)
    assert again.asks == wanted
    assert {ask.prompt for ask in other.asks}.isdisjoint(ask.prompt for ask in wanted)
    assert {ask.seed for ask in other.asks}.isdisjoint(ask.seed for ask in wanted)
    assert len({ask.seed for ask in wanted}) == len(wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 43},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"examples": 2},
        {"machine_examples": 0},
        {"tasks_per_request": 5},
        {"topics": ["rivers"]},
        {"max_new_tokens": 99},
        {"concurrency": 9},
        {"rouge_threshold": 0.6},
        {"blocklist": ["river"]},
        {"seeds": SEEDS[1:]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_refused_by_name(finished, changes):
    out, _ = finished
    before = files_of(out)
    (name,) = changes
    with pytest.raises(
        ValueError, match=rf"is of a run with other settings \({name} .*; now {name} "
    ):
        open_run(out, **changes)
    assert files_of(out) == before


def test_another_model_or_template_is_refused(finished, monkeypatch):
    out, _ = finished
    other = ScriptedSource()
    other.name = "another"
    with pytest.raises(
        ValueError, match=r"\(model scripted; now model another\); type the command"
    ):
        open_run(out, other)
    monkeypatch.setitem(TEMPLATES, "en", TEMPLATES["en"]._replace(no_input="<none>"))
    with pytest.raises(ValueError, match="template_hash"):
        open_run(out)


def test_a_larger_number_continues(finished, tmp_path):
    out = tmp_path / "new.jsonl"
    first, second = ScriptedSource(), ScriptedSource()
    collect(out, 13, first)
    before = out.read_bytes()
    collect(out, NUM, second)
    assert len(before.splitlines()) == 13
    assert out.read_bytes().startswith(before)
    assert len(rows_of(out)) == NUM
    requests = [ask.request for source in (first, second) for ask in source.asks]
    assert requests == list(range(len(requests)))


def test_rows_beyond_the_number_are_neither_written_nor_counted(tmp_path):
    out = tmp_path / "new.jsonl"
    tally = collect(out, 5)
    assert (tally.requests, tally.kept, len(rows_of(out))) == (2, 5, 5)
    assert tally.made == 5 + tally.dropped.total() < 8


@pytest.mark.parametrize("repeats", [False, True])
def test_a_run_cut_at_any_byte_ends_as_one_that_was_not(finished, tmp_path, repeats):
    wanted, places = files_of(finished[0]), Random(repeats)
    journal = wanted["new.requests.jsonl"]
    for _ in range(12):
        out = tmp_path / "new.jsonl"
        at = places.randrange(len(journal))
        journal_of(out).write_bytes(journal[:at])
        out.write_bytes(wanted["new.jsonl"][: places.randrange(len(wanted["new.jsonl"]))])
        source = ScriptedSource(repeats=repeats)
        collect(out, source=source)
        found = files_of(out)
        assert sorted(found["new.requests.jsonl"].splitlines()) == sorted(journal.splitlines())
        assert {**found, "new.requests.jsonl": journal} == wanted
        saved = max(journal[:at].count(b"\n") - 1, 0)
        asked = len(finished[1].asks) - saved
        assert asked <= len(source.asks) <= asked + (MAX_WAVE if repeats else 0)


def test_a_source_that_repeats_itself_is_asked_for_a_whole_wave(finished, tmp_path):
    out, waves = tmp_path / "new.jsonl", finished[1].waves
    lines = journal_of(finished[0]).read_bytes().splitlines(keepends=True)
    journal_of(out).write_bytes(b"".join(lines[: 1 + MAX_WAVE + 3]))
    source = ScriptedSource(repeats=True)
    collect(out, source=source)
    assert source.waves == waves[1:]


def test_the_engine_repeats_a_wave_that_was_cut_to_the_token(tmp_path, loaded_nano):
    def complete(out):
        source = EngineSource(*loaded_nano, name="nano", max_rows=3)
        return collect(
            out, 99, source, max_requests=6, template="zh", examples=0, max_new_tokens=12
        )

    whole = tmp_path / "whole.jsonl"
    assert complete(whole).dropped.total() == 6  # too short for a task
    begun, *lines = journal_of(whole).read_bytes().splitlines(keepends=True)
    assert len({json.loads(line)[2] for line in lines}) > 3
    for kept in (lines[:1], lines[2:5]):
        out = tmp_path / "cut.jsonl"
        journal_of(out).write_bytes(begun + b"".join(kept) + lines[-1][:9])
        complete(out)
        assert sorted(journal_of(out).read_bytes().splitlines(keepends=True)) == sorted(
            [begun, *lines]
        )


def test_an_error_keeps_what_has_arrived(finished, tmp_path):
    out, left = tmp_path / "new.jsonl", iter(range(11))

    def answer(ask):
        if next(left, None) is None:
            raise EndpointError("gone")
        return completed(tasks_for(ask.prompt, ask.seed))

    with pytest.raises(EndpointError):
        collect(out, source=ScriptedSource(answer))
    assert len(journal_of(out).read_bytes().splitlines()) == 1 + 11
    assert 0 < len(rows_of(out)) < NUM  # those of the first wave
    source = ScriptedSource()
    collect(out, source=source)
    assert len(source.asks) == len(finished[1].asks) - 11
    assert out.read_bytes() == finished[0].read_bytes()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        *((0, text) for text in ("{", "3", "null", '["a"]')),
        *((2, text) for text in ("{", "", "3", "[0]", "[0, 0]", '[[0], 0, "a"]', '{"a": 1}')),
        (2, '[1, 0, "text", "stop", "3", 4]'),
        (2, '[1, 0, "text", "stop", 3, 4, 5]'),
    ],
)
def test_a_damaged_journal_is_not_continued(finished, tmp_path, line, text):
    out = tmp_path / "new.jsonl"
    lines = journal_of(finished[0]).read_text(encoding="utf-8").splitlines()
    lines[line] = text
    journal_of(out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = files_of(out)
    with pytest.raises(ValueError, match=r"new\.requests\.jsonl is damaged \(.*; delete it"):
        open_run(out)
    assert files_of(out) == before


def test_a_wide_wave_is_continued_by_fewer_requests_at_once(tmp_path):
    out, whole = tmp_path / "new.jsonl", tmp_path / "whole.jsonl"
    collect(out, 20, concurrency=20)
    collect(out, 60, concurrency=10)
    collect(whole, 20, concurrency=20)
    collect(whole, 60, concurrency=20)
    assert [row["prompt"] for row in rows_of(out)] == [row["prompt"] for row in rows_of(whole)]


def test_malformed_replies_are_asked_for_again(tmp_path):
    out = tmp_path / "new.jsonl"
    broken = ScriptedSource(lambda ask: Completion(None))
    assert collect(out, source=broken, max_requests=3).dropped == {"malformed_reply": 3}
    assert collect(out).kept == NUM


def test_fewer_requests_at_once_continue_a_run(finished):
    out, _ = finished
    before = files_of(out)
    open_run(out, concurrency=1).collect(len(before["new.jsonl"].splitlines()))
    assert files_of(out) == before


@pytest.mark.skipif(sys.platform == "win32", reason="locks by fcntl")
def test_two_processes_cannot_write_the_same_rows(finished):
    out, _ = finished
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+b'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(journal_of(out))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is writing"):
            open_run(out)
        other.stdin.close()
    open_run(out)


def test_prompts_show_seeds_and_from_the_second_wave_on_a_row_of_earlier_waves(finished):
    out, source = finished
    seeds = {seed.instruction for seed in SEEDS}
    requests = {row["meta"]["instruction"]: row["meta"]["request"] for row in rows_of(out)}
    assert len(source.waves) > 2
    for number, wave in enumerate(source.waves):
        for ask in wave:
            shown = shown_in(ask.prompt)
            made = [text for text in shown if text not in seeds]
            assert len(set(shown)) == len(shown) == (4 if number else 3)
            assert len(made) == (1 if number else 0)
            assert all(requests[text] < wave[0].request for text in made)
    places = {
        shown_in(ask.prompt).index(text) for ask in source.asks for text in shown_in(ask.prompt)
    }
    assert places == {0, 1, 2, 3}


@pytest.mark.parametrize(("examples", "machine_examples"), [(0, 0), (2, 0), (0, 2), (99, 99)])
def test_so_many_tasks_are_shown(tmp_path, examples, machine_examples):
    source = ScriptedSource()
    collect(
        tmp_path / "new.jsonl", 40, source, examples=examples, machine_examples=machine_examples
    )
    seeds = {seed.instruction for seed in SEEDS}
    for number, wave in enumerate(source.waves[:2]):
        for ask in wave:
            shown = Counter(text in seeds for text in shown_in(ask.prompt))
            assert shown[True] == min(examples, len(SEEDS))
            assert (shown[False] > 2) if machine_examples > 2 and number else True
            assert machine_examples > 2 or shown[False] == (machine_examples if number else 0)
            assert f"list of {shown.total() + 4} different tasks" in ask.prompt


def test_each_prompt_names_one_topic(finished, tmp_path):
    source, topics = ScriptedSource(), ["rivers", "old {maps}", "bread"]
    collect(tmp_path / "new.jsonl", 40, source, topics=topics)
    named = [
        [topic for topic in topics if f"topic: {topic}\n" in ask.prompt] for ask in source.asks
    ]
    assert [len(found) for found in named] == [1] * len(named)
    assert len({found[0] for found in named}) == 3
    assert not any("topic" in ask.prompt for ask in finished[1].asks)


@pytest.mark.parametrize(
    ("context", "max_new_tokens", "num_tasks"),
    [(None, 3072, 20), (131072, 3072, 20), (6144, 3072, 20), (2048, 1024, 6), (512, 256, 1)],
)
def test_tasks_per_request_follow_from_the_context(tmp_path, context, max_new_tokens, num_tasks):
    source = ScriptedSource(context_length=context)
    collect(tmp_path / "new.jsonl", 1, source, tasks_per_request=None)
    assert source.samplings[0][1] == max_new_tokens
    shown = len(shown_in(source.asks[0].prompt))
    assert f"Write a list of {shown + num_tasks} different tasks" in source.asks[0].prompt


def test_a_prompt_that_does_not_fit_shows_fewer_tasks(tmp_path):
    lengths, none_shown = {}, len(TEMPLATES["en"].prompt([], 4).split())
    for room in (none_shown, none_shown + 40, none_shown + 400):
        source = ScriptedSource(context_length=100 + room)
        collect(tmp_path / f"{room}.jsonl", 8, source, max_new_tokens=100, machine_examples=0)
        lengths[room] = [len(shown_in(ask.prompt)) for ask in source.asks]
        assert max(source.num_tokens(ask.prompt) for ask in source.asks) <= room
    fewest, some, most = lengths.values()
    assert set(fewest) == {0}
    assert 1 <= min(some) <= max(some) <= 2
    assert set(most) == {3}


def test_a_context_without_room_for_a_prompt_is_refused(tmp_path):
    source = ScriptedSource(context_length=150)
    with pytest.raises(ValueError, match="--max_new_tokens is 75, but scripted has 150 for both"):
        collect(tmp_path / "new.jsonl", source=source)
    assert source.asks == []


def test_max_requests_ends_a_run_that_can_be_continued(finished, tmp_path):
    out, source = tmp_path / "new.jsonl", ScriptedSource()
    tally = collect(out, source=source, max_requests=3)
    assert (tally.requests, tally.ended) == (3, "--max_requests 3 is used up")
    assert len(rows_of(out)) == tally.kept < NUM
    tally = collect(out, source=source)
    assert (tally.kept, tally.ended) == (NUM, "")
    requests = [ask.request for ask in source.asks]
    assert requests == list(range(len(requests)))


def test_a_run_that_reaches_its_number_with_the_last_request_is_complete(tmp_path):
    tally = collect(tmp_path / "new.jsonl", 5, max_requests=2)
    assert (tally.kept, tally.requests, tally.ended) == (5, 2, "")


def test_requests_that_add_no_row_end_the_run(tmp_path):
    out, source = tmp_path / "new.jsonl", ScriptedSource(lambda ask: completed("I cannot."))
    tally = collect(out, source=source)
    assert tally.requests == MAX_IDLE
    assert tally.dropped == {"no_fields": MAX_IDLE}
    assert tally.ended.startswith(f"the last {MAX_IDLE} requests added none (see what was dropped)")
    assert out.read_bytes() == b""
    again = ScriptedSource()
    assert collect(out, source=again).ended == tally.ended
    assert again.asks == []


def test_requests_that_add_a_row_now_and_then_do_not(tmp_path):
    def answer(ask):
        is_one = ask.request % (MAX_IDLE - MAX_WAVE) == 0
        return completed(tasks_for(ask.prompt, ask.seed) if is_one else "I cannot.")

    tally = collect(tmp_path / "new.jsonl", 16, ScriptedSource(answer))
    assert (tally.kept, tally.ended) == (16, "")
    assert tally.requests > 2 * MAX_IDLE


REASONS = {
    "too_short": "1. Instruction: Add two\n1. Input:\nx\n1. Output:\ny\n",
    "too_long": f"1. Instruction: {'so ' * 151}\n1. Input:\nx\n1. Output:\ny\n",
    "blocked_word": "1. Instruction: Describe this Picture now\n1. Input:\nx\n1. Output:\ny\n",
    "write_a_program": "1. Instruction: Write a program now\n1. Input:\nx\n1. Output:\ny\n",
    "bad_first_character": "1. Instruction: (a) say why this\n1. Input:\nx\n1. Output:\ny\n",
    "wrong_language": "1. Instruction: 请说说天空为什么是蓝色\n1. Input:\nx\n1. Output:\n散射\n",
    "duplicate": f"1. Instruction: {SEEDS[0].instruction}\n1. Input:\nx\n1. Output:\nyes\n",
    "missing_field": "1. Instruction: Say why this is\n1. Output:\nyes\n",
    "empty_output": "1. Instruction: Say why this is\n1. Input:\nx\n1. Output:\n",
    "repeated_field": "1. Instruction: Say why\n1. Input:\nx\n1. Input:\nx\n1. Output:\nyes\n",
    "no_fields": "Sorry.",
}


def test_every_reason_is_counted(tmp_path):
    replies = [completed(text) for text in REASONS.values()]
    replies += [completed(None), completed(REASONS["duplicate"], "length")]

    def answer(ask):
        return replies[ask.request] if ask.request < len(replies) else completed("Sorry.")

    tally = collect(tmp_path / "new.jsonl", source=ScriptedSource(answer))
    more = tally.requests - len(replies)
    wanted = dict.fromkeys([*REASONS, "malformed_reply", "cut_off"], 1)
    assert tally.dropped == wanted | {"no_fields": 1 + more}
    assert (tally.made, tally.kept) == (tally.requests, 0)


HAN = "天地人山水火木金土日月星云风雨雪花草树鸟鱼马牛羊书画琴棋酒茶饭菜刀剑门窗桌椅灯船车路桥城村田"


def question_for(seed):
    return "为什么" + "".join(Random(seed).choices(HAN, k=12)) + "？"


def magpie(ask):
    """Answer an open turn with a question and more, and a question with an answer."""
    if ask.prompt.endswith("问："):
        return completed(f"{question_for(ask.seed)}\n\n答：不知道。\n\n[Round 1]", "length")
    return completed(f" 因为{ask.prompt[3:6]}。\n")


def test_magpie_asks_for_a_question_and_then_for_its_answer(tmp_path):
    out, source = tmp_path / "new.jsonl", ScriptedSource(magpie)
    tally = collect(out, 10, source, template="magpie", tasks_per_request=None, seeds=[])
    assert (tally.kept, tally.dropped) == (10, {})
    assert tally.prompt_tokens == 200 * tally.requests
    questions, answers = source.waves[0], source.waves[1]
    assert {ask.prompt for ask in questions} == {"[Round 0]\n问："}
    assert [ask.prompt for ask in answers] == [question_for(ask.seed) for ask in questions]
    assert [ask.request for ask in answers] == [ask.request for ask in questions]
    assert {ask.seed for ask in answers}.isdisjoint(ask.seed for ask in questions)
    for row, ask in zip(rows_of(out), answers, strict=False):
        assert (row["prompt"], row["response"]) == (ask.prompt, f"因为{ask.prompt[3:6]}。")
        assert (row["meta"]["input"], row["history"]) == ("", [])
    journal = journal_of(out).read_bytes()
    whole = out.read_bytes()
    for at in (len(journal) // 3, len(journal) * 2 // 3):
        journal_of(out).write_bytes(journal[:at])
        collect(
            out, 10, ScriptedSource(magpie), template="magpie", tasks_per_request=None, seeds=[]
        )
        assert out.read_bytes() == whole


def test_magpie_asks_no_answer_to_half_a_question(tmp_path):
    firsts = [completed("为什么天空是", "length"), completed("\n答：好"), completed(None)]
    firsts += [completed("为什么海水是咸的？"), completed("为什么树叶会变黄呢？")]
    answers = {
        "为什么海水是咸的？": completed(" "),
        "为什么树叶会变黄呢？": completed("因", "length"),
    }

    def answer(ask):
        if ask.prompt.endswith("问："):
            return firsts[ask.request] if ask.request < len(firsts) else completed("")
        return answers[ask.prompt]

    source = ScriptedSource(answer)
    tally = collect(
        tmp_path / "new.jsonl",
        source=source,
        max_requests=len(firsts),
        template="magpie",
        tasks_per_request=None,
        seeds=[],
    )
    assert tally.dropped == {
        **{"cut_off": 2, "missing_field": 1, "malformed_reply": 1, "empty_output": 1}
    }
    assert sorted(ask.request for ask in source.waves[1]) == [3, 4]


def test_products_become_rows_by_their_own_template(tmp_path):
    kept = Task("类型#裙*颜色#白色*裙型#百褶", "", "这条白色的百褶裙清新自然，适合夏天。")
    text = f"{kept.instruction}\n2. 文案：\n{kept.output}\n###\n3. 商品：颜色#白\n3. 文案：\n白。\n"
    out = tmp_path / "new.jsonl"
    seeds = [Task("类型#裤*版型#宽松", "", "宽松的裤子。")]
    tally = collect(
        out,
        2,
        ScriptedSource(lambda ask: completed(text)),
        max_requests=1,
        template="adgen",
        seeds=seeds,
    )
    assert tally.dropped == {"bad_attributes": 1}
    (row,) = rows_of(out)
    assert (row["prompt"], row["response"]) == (kept.instruction, kept.output)
