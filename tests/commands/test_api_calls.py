"""`python -m ptuning api`: rows, questions, answers and scores; what is refused, nothing executed."""

import json
import re
from random import Random

import pytest

from ptuning import __main__ as program
from ptuning.apicalls.cards import FAMILIES, read_cards
from ptuning.apicalls.pairs import RETRIEVERS, published_prompt
from ptuning.apicalls.verdicts import REASONS
from ptuning.commands import asking_flags
from ptuning.completions.source import Completion
from ptuning.data.prompts import RowFormat
from ptuning.data.reading import read_rows
from tests.apicalls.test_calls import Watch
from tests.completions.scripted import ScriptedSource, completed, sentence

WEATHER = "weather.get(city='Oslo', days=3)"
TITLE = "hub.load(repo='shop/Title-v2', size=1)"
MUSIC = "music.play(song='x')"
CARDS = [
    {
        **{"api_name": "city-weather", "api_call": WEATHER, "domain": "Weather"},
        "description": "The weather forecast of a city.",
        "questions": ["How warm will it be in Oslo?", "Will it rain in Oslo?"],
    },
    {
        **{"api_name": "shop/Title-v2", "api_call": TITLE, "domain": "Titles"},
        **{"description": "Write the title of a product.", "framework": "Shop"},
        **{"identify": ["repo"], "questions": ["Name my boots, please"]},
    },
    {
        **{"api_name": "music-play", "api_call": MUSIC, "domain": "Music"},
        "description": "Play a song in a city.",
    },
]
BARE = [{name: card[name] for name in card if name != "questions"} for card in CARDS]
FUNCTIONS = [
    {
        "id": f"simple_{n}",
        "question": [],
        "function": [
            {"name": f"f{n}", "description": "d", "parameters": {"properties": {"a": {}, "b": {}}}}
        ],
    }
    for n in range(2)
]
PREPARE = ["prepare", "--cards", "cards.jsonl", "--out", "rows.jsonl"]
ASK = ["ask", "the weather forecast of my city", "--cards", "cards.jsonl"]
WRITE = ["write", "--cards", "cards.jsonl", "--language", "en", "--out", "pairs.jsonl"]
EVAL = ["eval", "--cards", "cards.jsonl", "--reference", "ref.jsonl", "--responses", "said.jsonl"]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, caplog):
    """Files to name, in the current directory."""
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": "Is it cold?", "response": WEATHER}]
    for name, text in {
        "cards": lines(CARDS),
        "bare": lines(BARE),
        "pairs0": lines(pairs),
        "broken": lines(CARDS[:1]) + '{"api_name": "x"',
        "partly": lines([*BARE[:1], {"api_name": "x", "api_call": "x()", "domain": "y"}]),
        "empty": "",
        "functions": lines(FUNCTIONS),
        "ref": lines(
            {"question_id": n, "api_call": call, "domain": domain}
            for n, (call, domain) in enumerate([(WEATHER, "Weather"), (MUSIC, "Music")])
        ),
        "said": lines({"question_id": n, "text": WEATHER} for n in (1, 0)),
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def api(*arguments):
    return program.main(["api", *arguments])


def refused(capsys, folder, *arguments):
    """Return the one line about what cannot work; nothing is written, and stdout stays empty."""
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    assert api(*arguments) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    out, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert out == ""
    return line.removeprefix("ptuning api: ")


def prepared(folder, *arguments):
    """Return the rows of `prepare`, which main.py's reader takes as they are."""
    assert api(*PREPARE, *arguments) == 0
    path = folder / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    read = read_rows(path, RowFormat())
    assert [(one.prompt, one.response) for one in read.kept] == [
        (row["prompt"], row["response"]) for row in rows
    ]
    return rows


def documents(row):
    """Return the api_name of the documents that a prompt shows."""
    return re.findall(r'"api_name": "([^"]+)"', row["prompt"])


# prepare


def test_prepare_writes_rows_of_the_contract_from_the_questions_of_the_cards(folder, caplog):
    rows = prepared(folder, "--vary", "0", "--p", "1")
    assert [row["id"] for row in rows] == ["api:1", "api:2", "api:3"]
    assert {tuple(row) for row in rows} == {
        ("id", "prompt", "response", "history", "source", "meta")
    }
    assert rows[2]["prompt"].startswith(
        "Name my boots, please\nUse this API documentation for reference:\n{"
    )
    assert rows[2]["response"] == (
        f"<<<domain>>>: Titles\n<<<api_call>>>: {TITLE}\n<<<api_provider>>>: Shop\n"
        "<<<explanation>>>: Write the title of a product."
    )
    assert {len(documents(row)) for row in rows} == {3}  # the right one, and --distractors 2
    assert "wrote 3 rows about 2 of 3 APIs to rows.jsonl" in caplog.messages
    assert any(one.endswith("python -m ptuning data check rows.jsonl") for one in caplog.messages)


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_p_distractors_and_copies_say_what_a_prompt_shows(folder, retriever):
    flags = ("--retriever", retriever, "--p", "0", "--distractors", "1", "--copies", "4")
    rows = prepared(folder, *flags)
    assert [len(documents(row)) for row in rows] == [1] * 12
    assert len({row["id"] for row in rows}) == 12
    right = ["city-weather", "city-weather", "shop/Title-v2"] * 4
    assert all(name not in documents(row) for name, row in zip(right, rows, strict=True))


def test_vary_replaces_names_in_document_and_answer_alike(folder):
    row = prepared(folder, "--vary", "1", "--p", "1")[2]
    assert "shop/Title-v2" not in row["prompt"] + row["response"]
    (name,) = re.findall(r"repo='([^']+)'", row["response"])
    assert f"hub.load(repo='{name}', size=1)" in row["prompt"]


def test_zero_shot_prompts_are_the_questions(folder):
    rows = prepared(folder, "--mode", "zero-shot")
    assert [row["prompt"] for row in rows] == CARDS[0]["questions"] + CARDS[1]["questions"]


def test_the_same_seed_gives_the_same_rows(folder):
    first, again = prepared(folder), prepared(folder, "--overwrite")
    assert first == again
    assert prepared(folder, "--overwrite", "--seed", "7", "--copies", "9")[:3] != first


@pytest.mark.parametrize(("retriever", "shown"), [("bm25", None), ("oracle", 1), (None, None)])
def test_compat_rows_have_the_published_prompts(folder, retriever, shown):
    flags = ("--retriever", retriever) if retriever else ()
    row = prepared(folder, "--compat", *flags)[2]
    cards = read_cards(folder / "cards.jsonl")
    question = " Name my boots, please\\n"
    if retriever == "oracle":
        assert row["prompt"] == published_prompt(question, cards[shown], "oracle")
    else:
        assert row["prompt"].startswith(
            f"{question} \n Use this API documentation for reference: [Document(page_content="
        )


def test_pairs_whose_call_is_of_no_card_are_left_out_and_named(folder, caplog):
    rows = [
        {"prompt": "Is it cold?", "response": "weather.get(city='Rome', days=1)"},
        {"prompt": "Open the door", "response": "door.open()"},
        {"prompt": "Tell a joke", "response": "None"},
        {"prompt": "Close the door", "response": "door.close()"},
        {"prompt": "Shut the door", "response": ""},
    ]
    (folder / "mine.jsonl").write_text(lines(rows), encoding="utf-8")
    made = prepared(folder, "--pairs", "mine.jsonl")
    assert [row["meta"]["question"] for row in made] == ["Is it cold?", "Tell a joke"]
    assert "<<<api_call>>>: weather.get(city='Rome', days=1)\n" in made[0]["response"]
    assert made[1]["response"] == "<<<domain>>>: None\n<<<api_call>>>: None"
    assert documents(made[1])
    assert "left out 3 rows without a call of one of the cards: lines 2, 4-5" in caplog.messages
    assert "wrote 2 rows about 1 of 3 APIs to rows.jsonl" in caplog.messages


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *((["--p", p], f"--p is {p}; use 0 to 1, a share of the rows.") for p in ("1.5", "nan")),
        (["--vary", "-0.1"], "--vary is -0.1; use 0 to 1, a share of the rows."),
        (["--distractors", "-1"], "--distractors is -1; use 0 or more."),
        (["--copies", "0"], "--copies is 0; use 1 or more."),
        *(
            ([*mode, f"--{name}", "1"], f"--{name} does nothing with {' '.join(mode)}; leave one")
            for mode in (["--compat"], ["--mode", "zero-shot"])
            for name in ("p", "vary", "distractors", "copies")
        ),
        (["--mode", "zero-shot", "--retriever", "bm25"], "--retriever does nothing with --mode"),
        (["--cards", "bare.jsonl"], '--cards bare.jsonl has no "questions"; name questions with'),
        (["--out", "rows.txt"], "--out is rows.txt; give a name that ends in .jsonl"),
        (["--out", "cards.jsonl"], "--out is cards.jsonl, which is read as well; give another"),
        (["--out", "cards.jsonl", "--overwrite"], "--out is cards.jsonl, which is read as well"),
        (
            ["--pairs", "pairs0.jsonl", "--out", "pairs0.jsonl", "--overwrite"],
            "--out is pairs0.jsonl, which is read as well; give another name.",
        ),
        (["--out", "said.jsonl"], "--out is said.jsonl, which exists already; give another name,"),
        (["--pairs", "said.jsonl"], "said.jsonl: pairs need columns prompt and response, or"),
        (["--pairs", "none.jsonl"], "none.jsonl: cannot be read (No such file"),
    ],
)
def test_prepare_refuses_what_cannot_work(capsys, folder, flags, said):
    assert refused(capsys, folder, *PREPARE, *flags).startswith(said)


def test_overwrite_replaces_the_rows(folder, capsys):
    prepared(folder)
    assert "add --overwrite" in refused(capsys, folder, *PREPARE)
    assert len(prepared(folder, "--overwrite", "--copies", "2")) == 6


@pytest.mark.parametrize("command", [PREPARE, ASK, WRITE], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("none.jsonl", "none.jsonl: cannot be read (No such file or directory)"),
        ("broken.jsonl", "broken.jsonl:2: broken JSON"),
        ("partly.jsonl", 'partly.jsonl:2: an API card needs "description", a text that is not'),
        ("empty.jsonl", "empty.jsonl: no rows; write one JSON object per line"),
        ("functions.jsonl", "--cards is functions.jsonl, whose functions belong to single"),
    ],
)
def test_cards_that_cannot_be_used_are_named(capsys, folder, command, file, said):
    assert refused(capsys, folder, *command, "--cards", file).startswith(said)


# ask


@pytest.fixture
def answers(monkeypatch):
    """Let a source answer with a text; return what puts it in place, and gives the source back."""

    def put(answer):
        given = answer if callable(answer) else lambda ask: completed(answer)
        source = ScriptedSource(given)
        monkeypatch.setattr("ptuning.commands.api_calls.open_source", lambda arguments: source)
        return source

    return put


ANSWER = f"<<<domain>>>: Weather\n<<<api_call>>>: {WEATHER}\n<<<api_provider>>>: Sky\n"


def test_a_valid_call_is_printed_alone_with_its_verdict_on_stderr(answers, capsys, caplog):
    source = answers(f"{ANSWER}<<<explanation>>>: It tells.")
    assert api(*ASK) == 0
    assert capsys.readouterr().out == f"{WEATHER}\n"
    assert caplog.messages == [
        "documents: city-weather",
        "verdict: valid (city-weather)",
        *("domain: Weather", "provider: Sky", "explanation: It tells."),
    ]
    assert source.samplings[0][0].temperature == 0


@pytest.mark.parametrize(
    ("answer", "printed", "reason"),
    [
        ("weather.got(city=1)", "weather.got(city=1)", "unknown_callee"),
        ("hub.load(repo='a')", "hub.load(repo='a')", "unknown_model"),
        ("hub.load(size=2)", "hub.load(size=2)", "missing_argument"),
        ("<<<api_call>>>: hub.load(size=", "<<<api_call>>>: hub.load(size=", "syntax"),
    ],
)
def test_an_invalid_call_is_printed_with_its_reason(
    answers, capsys, caplog, answer, printed, reason
):
    answers(answer)
    assert api(*ASK) == 1
    assert capsys.readouterr().out == f"{printed}\n"
    assert f"verdict: invalid, {reason} ({REASONS[reason]})" in caplog.messages


def test_no_api_fits_is_an_answer(answers, capsys, caplog):
    answers("<<<domain>>>: None\n<<<api_call>>>: None")
    assert api(*ASK) == 0
    assert capsys.readouterr().out == ""
    assert caplog.messages[-1] == "no API fits"


@pytest.mark.parametrize("text", ["It is sunny.", "", None])
def test_an_answer_without_a_call_is_shown_and_is_status_1(answers, capsys, caplog, text):
    answers(lambda ask: Completion(text))
    assert api(*ASK) == 1
    assert capsys.readouterr().out == ""
    assert caplog.messages[-1] == f"no API call in the answer: {text or ''}"


@pytest.mark.parametrize(
    ("top_k", "shown"), [(0, []), (1, [0]), (2, [0, 2]), (9, [0, 2, 1])], ids=str
)
def test_top_k_documents_are_shown_best_first(answers, folder, caplog, top_k, shown):
    source = answers(ANSWER)
    assert api(*ASK, "--top_k", str(top_k)) == 0
    cards = read_cards(folder / "cards.jsonl")
    texts = [cards[index].document for index in shown]
    heading = ["Use this API documentation for reference:"] if shown else []
    assert source.asks[0].prompt == "\n".join([ASK[1], *heading, *texts])
    names = [cards[index].fields["api_name"] for index in shown]
    assert caplog.messages[0] == f"documents: {', '.join(names) or 'none'}"


class ExecutionWatch(Watch):
    """Notes what an answer would do; the command itself opens files and imports modules."""

    watched = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "subprocess.")


HOSTILE = "__import__('os').system('touch pwned')"


@pytest.mark.parametrize("asked", [ASK[1], HOSTILE])
def test_neither_answer_nor_question_is_executed(answers, capsys, folder, asked):
    answers(f"<<<api_call>>>: {HOSTILE}, weather.get(open('pwned', 'w'))")
    with ExecutionWatch() as seen:
        status = api("ask", asked, "--cards", "cards.jsonl")
    assert seen == []
    assert not (folder / "pwned").exists()
    assert status == 0  # the second call is one of a card: it is printed, and not made
    assert capsys.readouterr().out == "weather.get(open('pwned', 'w'))\n"


def test_the_hook_sees_a_command_that_is_executed(folder):
    watch = ExecutionWatch()
    with watch as seen:
        eval(HOSTILE)
    assert seen
    assert (folder / "pwned").exists()


def test_half_a_surrogate_pair_in_an_answer_is_printed_as_an_escape(answers, capsys):
    answers("<<<api_call>>>: f('\ud800')")
    assert api(*ASK) == 1
    assert "f('\\ud800')" in capsys.readouterr().out


@pytest.mark.parametrize("command", [ASK, WRITE], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *(
            ([f"--{name}", value], f"--{name} is for --endpoint URL; give that too, or leave it")
            for name, value in (
                *(("model", "x"), ("api", "chat"), ("api_key_env", "X"), ("timeout", "3")),
            )
        ),
        (
            ["--endpoint", "http://127.0.0.1:9"],
            "--endpoint needs the name of a model: --model NAME",
        ),
        (
            ["--endpoint", "http://127.0.0.1:9", "--model", "x", "--prefix", "p"],
            "--prefix loads a model in this process; leave it out with --endpoint.",
        ),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0; use 1 or more."),
        (["--prefix", "none"], "none does not exist, so it has no prefix"),
    ],
)
def test_flags_of_the_model_that_cannot_work_are_named(capsys, folder, command, flags, said):
    assert refused(capsys, folder, *command, *flags).startswith(said)


def test_a_prompt_that_does_not_fit_the_context_is_refused(monkeypatch, capsys, folder):
    source = ScriptedSource(context_length=50)
    monkeypatch.setattr("ptuning.commands.api_calls.open_source", lambda arguments: source)
    said = refused(capsys, folder, *ASK, "--max_new_tokens", "45")
    assert "--max_new_tokens is 45, but scripted has 50 for both" in said
    assert source.asks == []


def test_a_negative_top_k_is_refused(capsys, folder):
    assert refused(capsys, folder, *ASK, "--top_k", "-1") == "--top_k is -1; use 0 or more."


# write


def questions(ask):
    """Return two new questions for the card that a prompt shows, and one that names its API."""
    card = next(card for card in CARDS if f'"{card["api_name"]}"' in ask.prompt)
    words = Random(f"{ask.prompt}\n{ask.seed}")
    asked = [f"Please {sentence(words, 6)} now" for _ in range(2)]
    texts = [*asked, f"Use {card['api_call'].partition('(')[0]} for {sentence(words, 4)}"]
    return completed(
        "".join(
            f"{'' if n == 7 else f'{n}. Request:'} {text}\n{n}. Call: {card['api_call']}\n###\n"
            for n, text in enumerate(texts, 7)
        )
    )


def test_write_makes_questions_for_each_card_which_prepare_takes(answers, folder, caplog):
    source = answers(questions)
    assert api(*WRITE, "--per_card", "3") == 0
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open(encoding="utf-8")]
    assert sorted(pair["response"] for pair in pairs) == sorted([WEATHER, TITLE, MUSIC] * 3)
    assert not any("Use " in pair["prompt"] for pair in pairs)
    assert len({pair["prompt"] for pair in pairs}) == 9
    assert "wrote 9 rows to pairs.jsonl" in caplog.messages
    assert caplog.messages[-1] == "make rows of them with api prepare --pairs pairs.jsonl"
    assert all("API: {" in ask.prompt for ask in source.asks)
    rows = prepared(folder, "--pairs", "pairs.jsonl", "--vary", "0")
    assert [row["meta"]["question"] for row in rows] == [pair["prompt"] for pair in pairs]
    assert "wrote 9 rows about 3 of 3 APIs to rows.jsonl" in caplog.messages


def test_write_again_asks_for_nothing_new(answers, folder):
    first = answers(questions)
    assert api(*WRITE, "--per_card", "2") == 0
    written = (folder / "pairs.jsonl").read_bytes()
    again = answers(questions)
    assert api(*WRITE, "--per_card", "2") == 0
    assert (len(first.asks) > 0, again.asks) == (True, [])
    assert (folder / "pairs.jsonl").read_bytes() == written


def test_cards_that_get_too_few_questions_are_named_and_status_is_1(answers, caplog):
    answers(lambda ask: questions(ask) if "music-play" in ask.prompt else completed("no idea"))
    assert api(*WRITE, "--per_card", "1") == 1
    assert caplog.messages[-1] == "2 of 3 with fewer than --per_card 1: city-weather, shop/Title-v2"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--per_card", "0"], "--per_card is 0; use 1 or more."),
        (["--temperature", "-1"], "temperature is -1.0; use 0 (greedy) or more."),
        (["--temperature", "nan"], "temperature is nan; use 0 (greedy) or more."),
        (["--concurrency", "0"], "--concurrency is 0; use 1 or more."),
        (["--out", "pairs.txt"], "--out is pairs.txt; name a file that ends in .jsonl."),
        (["--out", "cards.jsonl"], "cards.jsonl is read, and --out cards.jsonl overwrites it"),
        (["--out", "said.jsonl"], "--out said.jsonl exists and is not of this command; give"),
    ],
)
def test_write_refuses_what_cannot_work(capsys, folder, flags, said):
    assert refused(capsys, folder, *WRITE, *flags).startswith(said)


# eval


def test_eval_prints_the_table_and_writes_the_details(capsys, folder, caplog):
    assert api(*EVAL, "--details", "out.jsonl") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "2 answers to questions that an API fits:"
    assert [line.split()[:3] for line in printed[1:9]] == [
        *(["format", "0", "0.0%"], ["parsed", "2", "100.0%"], ["hallucination", "0", "0.0%"]),
        *(["error", "1", "50.0%"], ["domain_first", "1", "50.0%"], ["domain_any", "1", "50.0%"]),
        *(["right_api", "1", "50.0%"], ["arguments", "1", "50.0%"]),
    ]
    assert [line.split()[:2] for line in printed[9:]] == [["wrong_domain", "1"]]
    assert caplog.messages == [
        "3 cards of the family generic",
        "rows: out.jsonl; page: out.html",
    ]
    details = [json.loads(line) for line in (folder / "out.jsonl").open(encoding="utf-8")]
    assert [(one["question_id"], one["reason"]) for one in details] == [
        ("1", "wrong_domain"),
        ("0", None),
    ]
    assert "wrong_domain" in (folder / "out.html").read_text(encoding="utf-8")


def test_references_without_an_answer_are_counted_in_a_warning(folder, caplog):
    (folder / "said.jsonl").write_text(lines([{"question_id": 1, "text": ""}]), encoding="utf-8")
    assert api(*EVAL) == 0
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
        "1 reference without an answer"
    ]


def test_eval_takes_prepared_rows_and_the_predictions_of_main_py(capsys, folder):
    rows = prepared(folder, "--vary", "0")
    said = lines({"labels": row["response"], "predict": row["response"]} for row in rows)
    (folder / "generated_predictions.txt").write_text(said, encoding="utf-8")
    command = ["eval", "--cards", "cards.jsonl", "--reference", "rows.jsonl"]
    assert api(*command, "--responses", "generated_predictions.txt") == 0
    printed = capsys.readouterr().out
    for name in ("format", "parsed", "right_api", "arguments"):
        assert re.search(rf"^  {name} +3  100.0%", printed, re.MULTILINE)


def test_eval_judges_bfcls_rows_as_generic_ones(capsys, folder):
    (folder / "ref.jsonl").write_text(
        lines(
            {"id": f"simple_{n}", "ground_truth": [{f"f{n}": {"a": [1, 2], "b": ["", "x"]}}]}
            for n in range(2)
        )
    )
    said = [{"text": "f0(a=2)"}, {"text": "f1(a=3, b='X')"}]
    (folder / "said.jsonl").write_text(lines(said))
    assert api(*EVAL, "--cards", "functions.jsonl", "--family", "generic") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  right_api +2  100.0%", printed, re.MULTILINE)
    assert re.search(r"^  arguments +1   50.0%", printed, re.MULTILINE)
    assert re.search(r"^  wrong_argument +1 ", printed, re.MULTILINE)


def test_family_overrules_what_the_cards_look_like(capsys, caplog):
    assert api(*EVAL, "--family", "huggingface") == 0
    assert "3 cards of the family huggingface" in caplog.messages


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reference", "cards.jsonl"], "said.jsonl:2: question_id 0 is in no reference."),
        (["--reference", "none.jsonl"], "none.jsonl: cannot be read (No such file"),
        (["--responses", "ref.jsonl"], 'ref.jsonl:1: needs "text" (or "predict"), the answer.'),
        (["--responses", "empty.jsonl"], "empty.jsonl: no rows; write one JSON object per line"),
        (["--details", "out.html"], "--details is out.html; give a name that ends in .jsonl"),
        (["--details", "said.jsonl"], "--details is said.jsonl, which is read as well; give"),
        (["--details", "bare.jsonl"], "--details is bare.jsonl, which exists already; give"),
    ],
)
def test_eval_refuses_what_cannot_work(capsys, folder, flags, said):
    assert refused(capsys, folder, *EVAL, *flags).startswith(said)


def test_overwrite_replaces_the_details(folder):
    (folder / "out.jsonl").write_text("mine\n")
    assert api(*EVAL, "--details", "out.jsonl", "--overwrite") == 0
    assert "mine" not in (folder / "out.jsonl").read_text(encoding="utf-8")


# help


def helped(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        api(*arguments, "--help")
    return capsys.readouterr().out


SOURCE = ("model_name_or_path", "prefix", "quantization_bit", "endpoint", "model", "api", "timeout")


@pytest.mark.parametrize(
    ("action", "flags"),
    [
        (
            "prepare",
            "pairs out overwrite mode retriever p distractors vary copies seed compat".split(),
        ),
        (
            "write",
            ["out", "per_card", "language", "temperature", "max_new_tokens", "seed", *SOURCE],
        ),
        ("ask", ["top_k", "max_new_tokens", *SOURCE]),
        ("eval", ["reference", "responses", "family", "details", "overwrite"]),
    ],
)
def test_help_of_an_action_names_its_flags(capsys, action, flags):
    text = helped(capsys, action)
    assert f"usage: python -m ptuning api {action}" in text
    for flag in ("cards", *flags):
        assert f"--{flag}" in text


def test_help_names_the_actions(capsys):
    text = helped(capsys)
    for action in ("prepare", "write", "ask", "eval"):
        assert re.search(rf"^ +{action} +\w", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "ACTION"),
        (["answer"], "answer"),
        (["prepare", "--out", "rows.jsonl"], "--cards"),
        ([*EVAL, "--family", "soap"], "--family"),
        ([*PREPARE, "--mode", "bare"], "--mode"),
        (["ask", "--cards", "cards.jsonl"], "QUESTION"),
    ],
)
def test_what_argparse_refuses_is_status_2_and_names_the_flag(capsys, arguments, named):
    with pytest.raises(SystemExit, match="2"):
        api(*arguments)
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_the_choices_of_the_flags_are_those_there_are():
    assert asking_flags.API_FAMILIES == FAMILIES
