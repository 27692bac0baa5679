"""`python -m ptuning select`: from files to rows, verdicts and reports, on nano and a judge."""

import json
import logging

import pytest
import torch

from ptuning import __main__ as program
from ptuning.output import Progress
from ptuning.select import scores
from ptuning.select.selection import VERDICTS
from ptuning.tunings.loading import NANO_DIR, load_base
from ptuning.tunings.prefix import save_prefix
from tests.completions.scripted import Reply, as_completion

KNOWN = [  # what nano was made of: the prompt helps
    ("你好", "你好，我是一个小模型，我能写文案。"),
    ("谢谢", "不客气，有需要再叫我。"),
    ("hello", "hello, i am a small model, i can write ad copy."),
    ("你是谁", "我是一个小模型，很高兴认识你。"),
    ("再见", "再见，下次见。"),
]
FAULTY = [
    ("说说这座桥", "这座桥全长三千米，连接了两岸的老城区，并且"),
    ("Name a colour.\n<noinput>", "Blue is a colour."),
    ("你好", "你好，我是一个小模型，我能写文案。"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files to select from, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write(tmp_path / "new.jsonl", [*KNOWN, *FAULTY])
    write(tmp_path / "dev.jsonl", [("再见", "再见，改天见。")])
    return tmp_path


def write(path, pairs):
    rows = [{"instruction": prompt, "output": answer} for prompt, answer in pairs]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*flags, files=("new.jsonl",), status=0):
    assert program.main(["select", *files, "--out", "best.jsonl", *flags]) == status


def verdicts(folder):
    return {row["id"]: row["name"] for row in rows_of(folder / "best.verdicts.jsonl")}


def refused(capsys, *flags):
    run(*flags, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("ptuning select: ")


def test_every_step_by_nanos_own_ifd(folder, caplog):
    caplog.set_level(logging.INFO)
    run("--budget", "2", "--against", "dev.jsonl")
    found = verdicts(folder)
    assert len(found) == 8
    assert found["new:5"] == "in_against"
    assert found["new:6"] == "cut_ending"
    assert found["new:8"] == "exact_duplicate"
    selected = rows_of(folder / "best.jsonl")
    assert [found[row["id"]] for row in selected] == ["selected"] * 2
    scores = {row["id"]: row["score"] for row in rows_of(folder / "best.verdicts.jsonl")}
    fit = [
        scores[name] for name, verdict in found.items() if verdict in ("selected", "over_budget")
    ]
    assert [scores[row["id"]] for row in selected] == sorted(fit, reverse=True)[:2]
    assert max(fit) < 1
    report = json.loads((folder / "best.report.json").read_text(encoding="utf-8"))
    assert (report["in"], report["out"]) == (8, 2)
    assert sum(report["verdicts"].values()) == 8
    assert report["emptied_inputs"] == 1
    assert report["sources"]["new.jsonl"]["quota"] == 2
    assert report["scores"]["selected"]["max"] == pytest.approx(max(fit), abs=1e-4)
    for name in ("random", "longest"):
        assert len(rows_of(folder / f"best.{name}.jsonl")) == 2
        assert report["lengths"][name]["max"] > 0
    page = (folder / "best.report.html").read_text(encoding="utf-8")
    assert "cut_ending" in page
    assert "连接了两岸的老城区" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "1 in_against: in a file of --against, or almost" in caplog.text


def test_an_emptied_input_leaves_the_prompt(folder):
    run("--score", "none")
    prompts = [row["prompt"] for row in rows_of(folder / "best.jsonl")]
    assert "Name a colour." in prompts
    assert not any("noinput" in prompt for prompt in prompts)


def test_explain_says_why_a_row_went(caplog, capsys):
    run("--score", "length", "--budget", "1")
    caplog.set_level(logging.INFO)
    caplog.clear()
    assert program.main(["select", "--out", "best.jsonl", "--explain", "new:8"]) == 0
    assert "new:8: exact_duplicate" in caplog.text
    assert "like new:1, similarity 1" in caplog.text
    capsys.readouterr()
    assert program.main(["select", "--out", "best.jsonl", "--explain", "new:80"]) == 2
    assert "new:8," in capsys.readouterr().err
    assert program.main(["select", "--out", "other.jsonl", "--explain", "new:8"]) == 2
    assert "without --explain" in capsys.readouterr().err


def test_chance_is_the_same_in_every_run_and_ignores_the_other_rows(folder):
    run("--score", "none", "--budget", "3")
    first = (folder / "best.jsonl").read_bytes()
    run("--score", "none", "--budget", "3")
    assert (folder / "best.jsonl").read_bytes() == first
    run("--score", "none", "--budget", "3", "--seed", "1")
    assert (folder / "best.jsonl").read_bytes() != first


def test_a_run_that_was_stopped_scores_only_what_is_missing(folder, monkeypatch):
    run("--budget", "2")
    whole = (folder / "best.jsonl").read_bytes()
    (journal,) = folder.glob("best.ifd-*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + b'["half a li')
    done = []
    update = Progress.update
    monkeypatch.setattr(
        Progress, "update", lambda self, n=1: (done.append(self.title), update(self))
    )
    run("--budget", "2")
    assert (folder / "best.jsonl").read_bytes() == whole
    assert done.count("scoring by ifd") == len(lines) - 3
    assert len(journal.read_bytes().splitlines()) == len(lines)


def test_likeness_to_target_rows(folder):
    write(
        folder / "like.jsonl",
        [("thanks", "you are welcome."), ("hi", "hello, i am a small model.")],
    )
    run("--score", "target", "--like", "like.jsonl", "--budget", "1", "--embed", "none")
    (row,) = rows_of(folder / "best.jsonl")
    assert row["prompt"] == "hello"


def test_a_judge_grades_and_a_row_without_a_grade_is_asked_again(folder, server, capsys):
    def answer(asked):
        return Reply(200, as_completion("I refuse" if "谢谢" in asked.prompt else "5"))

    server.answer = answer
    flags = ["--score", "judge", "--endpoint", server.address, "--model", "any", "--embed", "none"]
    run(*flags)
    assert verdicts(folder)["new:2"] == "no_score"
    num_asked = len(server.asked)
    server.answer = lambda asked: Reply(200, as_completion("6"))
    run(*flags, "--budget", "1")
    assert len(server.asked) == num_asked + 1
    (best,) = rows_of(folder / "best.jsonl")
    assert best["id"] == "new:2"


def test_sources_share_the_budget(folder):
    write(
        folder / "large.jsonl", [(f"第{n}个问题是什么？", f"答案是{n}乘以{n}。") for n in range(27)]
    )
    flags = ["--score", "none", "--budget", "8", "--skip", "duplicates", "--embed", "none"]
    files = ["new.jsonl", "large.jsonl"]
    run(*flags, files=files)
    report = json.loads((folder / "best.report.json").read_text(encoding="utf-8"))
    rooms = {name: counts["quota"] for name, counts in report["sources"].items()}
    assert rooms == {"new.jsonl": 3, "large.jsonl": 5}  # 7 ** (1/3) to 27 ** (1/3)
    run(*flags, "--quota", "none", files=files)
    report = json.loads((folder / "best.report.json").read_text(encoding="utf-8"))
    assert report["sources"]["large.jsonl"]["quota"] is None


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--budget", "0"], "--budget is 0; use 1 or more"),
        (["--quota_temperature", "0.5"], "--quota_temperature is 0.5; use 1 or more"),
        (["--max_similarity", "nan"], "--max_similarity is nan"),
        (["--score", "target"], "--score target needs --like"),
        (["--score", "judge"], "--score judge needs --endpoint"),
        (["--like", "dev.jsonl"], "--like is for --score target"),
        (["--endpoint", "http://127.0.0.1:9"], "--endpoint is for --score judge"),
        (["--score", "length", "--prefix", "p"], "--prefix is for --score ifd, target or"),
        (["--score", "none", "--quota", "none", "--quota_temperature", "2"], "for --quota source"),
        (["--embed", "none", "--max_similarity", "0.5"], "is for --embed base or minhash"),
        (["--score", "none", "--timeout", "3"], "--timeout is for --score judge"),
        (["--score", "none", "--api", "chat"], "--api is for --score judge"),
        (["--score", "none", "--concurrency", "3"], "--concurrency is for --score judge"),
        (["--max_similarity", "1.5"], "--max_similarity is 1.5; with --embed base use 0 to 1"),
        (["--embed", "minhash", "--max_similarity", "0.3"], "with --embed minhash use 0.7 to 1"),
        (["--out", "new.jsonl"], "new.jsonl is read, and --out new.jsonl overwrites it"),
        (["--out", "best.json"], "name a file that ends in .jsonl"),
        (["--against", "missing.jsonl"], "missing.jsonl"),
        (["--model_name_or_path", "missing"], "missing"),
        (["--prefix", "missing"], "missing"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_is_written(folder, capsys, flags, needed):
    assert needed in refused(capsys, *flags)
    assert not list(folder.glob("best*"))


def test_other_files_are_not_overwritten(folder, capsys):
    (folder / "best.jsonl").write_text("mine\n", encoding="utf-8")
    assert "exists and is not of this command" in refused(capsys)
    assert (folder / "best.jsonl").read_text(encoding="utf-8") == "mine\n"


@pytest.mark.parametrize("score", ["none", "length", "ifd", "target"])
def test_no_row_is_left(folder, caplog, score):
    like = ["--like", "dev.jsonl"] if score == "target" else []
    run("--score", score, *like)
    before = (folder / "best.jsonl").read_bytes()
    write(folder / "new.jsonl", [("说说这座桥", "这座桥全长三千米，连接了两岸的老城区，并且")])
    run("--score", score, *like, status=1)
    assert (folder / "best.jsonl").read_bytes() == before
    assert verdicts(folder) == {"new:1": "cut_ending"}
    assert "--budget is 1000; no more than 0 rows" in caplog.text


def test_a_prefix_scores(folder, trained_prefix):
    run("--budget", "2")
    alone = {row["id"]: row["score"] for row in rows_of(folder / "best.verdicts.jsonl")}
    run("--budget", "2", "--prefix", str(trained_prefix))
    tuned = {row["id"]: row["score"] for row in rows_of(folder / "best.verdicts.jsonl")}
    assert alone != tuned
    assert len(list(folder.glob("best.ifd-*.jsonl"))) == 2


@pytest.fixture
def trained_prefix(tmp_path):
    """A prefix of nano that nobody trained."""
    torch.manual_seed(0)
    model = load_base(str(NANO_DIR), dtype=torch.float32)
    model.add_prefix(4)
    save_prefix(model, tmp_path / "prefix")
    return tmp_path / "prefix"


@pytest.mark.parametrize("name", ["best.random.jsonl", "best.verdicts.jsonl", "best.report.html"])
def test_no_file_that_is_read_or_of_someone_else_is_overwritten(folder, capsys, name):
    write(folder / name, KNOWN)
    before = (folder / name).read_bytes()
    assert "exists and is not of this command" in refused(capsys, "--score", "none")
    assert f"{name} is read" in refused(capsys, "--score", "none", "--against", name)
    assert (folder / name).read_bytes() == before


def test_a_column_names_the_source_and_files_of_one_name_are_told_apart(folder):
    (folder / "a").mkdir()
    rows = [{"prompt": p, "response": r, "source": "forum"} for p, r in KNOWN[:2]]
    rows += [{"prompt": p, "response": r, "source": " "} for p, r in KNOWN[2:]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a" / "new.jsonl").write_text(lines, encoding="utf-8")
    run("--score", "none", "--skip", "duplicates", files=["new.jsonl", "a/new.jsonl"])
    report = json.loads((folder / "best.report.json").read_text(encoding="utf-8"))
    counts = {name: found["in"] for name, found in report["sources"].items()}
    assert counts == {f"{folder.name}/new.jsonl": 8, "forum": 2, "a/new.jsonl": 3}


def test_columns_and_answers_that_are_missing_are_said(folder, capsys):
    (folder / "odd.csv").write_text("foo,bar\n1,2\n", encoding="utf-8")
    assert program.main(["select", "odd.csv", "--out", "best.jsonl"]) == 2
    assert "name them with `ptuning data convert`" in capsys.readouterr().err
    (folder / "asked.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    assert program.main(["select", "asked.jsonl", "--out", "best.jsonl"]) == 2
    assert "asked.jsonl has no answers" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_continues_and_it_does(folder, monkeypatch, caplog):
    whole = scores.mean_losses

    def stop_at_the_second_batch(model, batch):
        monkeypatch.setattr("ptuning.select.scores.mean_losses", stop)
        return whole(model, batch)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ptuning.select.scores.CPU_BATCH_TOKENS", 60)
    monkeypatch.setattr("ptuning.select.scores.mean_losses", stop_at_the_second_batch)
    run("--budget", "2", status=130)
    assert "Type the same command again to continue" in caplog.text
    (journal,) = folder.glob("best.*")
    assert len(journal.read_bytes().splitlines()) > 1
    monkeypatch.setattr("ptuning.select.scores.mean_losses", whole)
    run("--budget", "2")
    assert len(rows_of(folder / "best.jsonl")) == 2


def test_a_journal_that_is_read_is_refused(folder, capsys):
    write(folder / "best.ifd-0123.jsonl", KNOWN)
    flags = ["--score", "target", "--like", "best.ifd-0123.jsonl"]
    assert "best.ifd-0123.jsonl is read" in refused(capsys, *flags)


def test_every_verdict_is_described_in_both_languages():
    for meaning in VERDICTS.values():
        chinese, separator, english = meaning.partition(": ")
        assert separator
        assert not chinese.isascii()
        assert english.isascii()
