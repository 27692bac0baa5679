"""The predictions file: its published bytes, and what a stopped run leaves and finds."""

import json
import logging
from pathlib import Path

import pytest

from ptuning.scoring.predictions import (
    Prediction,
    PredictionFile,
    write_results,
)

ROWS = [("标签一", "预测<b>一"), ('引号"二', "换行\n二"), ("三", ""), ("四\u2028", "😀")]


def read_predictions(path: Path) -> list[Prediction]:
    lines = path.read_bytes().splitlines()
    return [Prediction(row["labels"], row["predict"]) for row in map(json.loads, lines)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "output" / "generated_predictions.txt"


def write_rows(path: Path, count: int, fingerprint: str = "a") -> None:
    with PredictionFile(path, fingerprint=fingerprint) as file:
        for index in range(len(file.finished), count):
            file.add(index, *ROWS[index])


def test_lines_have_the_published_bytes(path: Path) -> None:
    write_rows(path, 2)
    assert path.read_bytes().decode("utf-8") == (
        '{"labels": "标签一", "predict": "预测<b>一"}\n'
        '{"labels": "引号\\"二", "predict": "换行\\n二"}\n'
    )


def test_what_is_written_reads_back(path: Path) -> None:
    write_rows(path, 4)
    assert read_predictions(path) == [Prediction(*row) for row in ROWS]


def test_rows_are_on_disk_as_soon_as_they_are_added(path: Path) -> None:
    with PredictionFile(path, fingerprint="a") as file:
        file.add(0, *ROWS[0])
        assert read_predictions(path) == [ROWS[0]]


def test_rows_added_out_of_order_are_written_in_order(path: Path) -> None:
    with PredictionFile(path, fingerprint="a") as file:
        for index in (2, 0, 3):
            file.add(index, *ROWS[index])
        assert len(read_predictions(path)) == 1
        file.add(1, *ROWS[1])
    assert read_predictions(path) == ROWS


def test_a_stopped_run_goes_on_where_it_ended(path: Path) -> None:
    file = PredictionFile(path, fingerprint="a")
    file.add(0, *ROWS[0])
    file.add(1, *ROWS[1])
    file.add(3, *ROWS[3])  # still waits for row 2, and is lost
    with pytest.raises(KeyboardInterrupt), file:
        raise KeyboardInterrupt
    again = PredictionFile(path, fingerprint="a")
    assert again.finished == ROWS[:2]
    again.add(2, *ROWS[2])
    again.add(3, *ROWS[3])
    again.close()
    assert read_predictions(path) == ROWS


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_line_is_cut_off_and_said(
    path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # 1 takes only the newline
    with caplog.at_level(logging.WARNING):
        file = PredictionFile(path, fingerprint="a")
    assert file.finished == ROWS[:2]
    assert "after row 2" in caplog.text
    file.add(2, *ROWS[2])
    file.close()
    assert path.read_bytes() == whole


def test_rows_after_a_broken_line_are_made_again(path: Path) -> None:
    write_rows(path, 3)
    lines = path.read_bytes().split(b"\n")
    lines[1] = b"\0" * len(lines[1])  # what a power cut leaves
    path.write_bytes(b"\n".join(lines))
    assert PredictionFile(path, fingerprint="a").finished == ROWS[:1]
    assert read_predictions(path) == ROWS[:1]


def test_another_fingerprint_keeps_the_old_rows_until_its_first_row(path: Path) -> None:
    write_rows(path, 3, fingerprint="a")
    file = PredictionFile(path, fingerprint="b")
    assert file.finished == []
    assert PredictionFile(path, fingerprint="a").finished == ROWS[:3]
    file.add(0, "新", "行")
    file.close()
    assert read_predictions(path) == [("新", "行")]
    assert PredictionFile(path, fingerprint="a").finished == []
    assert PredictionFile(path, fingerprint="b").finished == [("新", "行")]


def test_a_failure_before_the_first_row_leaves_the_old_file(path: Path) -> None:
    write_rows(path, 2, fingerprint="a")
    with pytest.raises(MemoryError), PredictionFile(path, fingerprint="b"):
        raise MemoryError
    assert PredictionFile(path, fingerprint="a").finished == ROWS[:2]


def test_a_finished_run_without_rows_leaves_no_old_ones(path: Path) -> None:
    write_rows(path, 2, fingerprint="a")
    with PredictionFile(path, fingerprint="b"):
        pass
    assert path.read_bytes() == b""


@pytest.mark.parametrize("state", [None, "{", "[]", '{"version": 99, "fingerprint": "a"}'])
def test_rows_of_unknown_origin_are_not_taken_over(path: Path, state: str | None) -> None:
    write_rows(path, 2)
    state_path = path.with_name("generated_predictions.state.json")
    assert json.loads(state_path.read_text(encoding="utf-8"))["fingerprint"] == "a"
    state_path.unlink()
    if state is not None:
        state_path.write_text(state, encoding="utf-8")
    file = PredictionFile(path, fingerprint="a")
    file.add(0, "新", "行")
    file.close()
    assert read_predictions(path) == [("新", "行")]


def test_half_a_surrogate_pair_survives_the_file(path: Path) -> None:
    with PredictionFile(path, fingerprint="a") as file:
        file.add(0, "好", "坏\ud83d字")
    assert read_predictions(path) == [("好", "坏\ud83d字")]


def test_results_are_whole_json_with_published_names(tmp_path: Path) -> None:
    path = tmp_path / "predict_results.json"
    write_results(
        path, {"predict_rouge-1": 31.12, "predict_bleu-4": 8.1, "predict_loss": float("nan")}
    )
    text = path.read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["predict_bleu-4", "predict_loss", "predict_rouge-1"]
    assert json.loads(text)["predict_loss"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["predict_results.json"]
