import logging
from pathlib import Path

import pytest

from ptuning.__main__ import main
from ptuning.model.checkpoint.layout import check_checkpoint
from tests.model.published import make_published


def test_convert_writes_what_it_says(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_published(golden, tmp_path / "source")
    with caplog.at_level(logging.INFO, logger="ptuning"):
        assert main(["convert", str(source), str(tmp_path / "out"), "--quantization_bit", "4"]) == 0
    summary = check_checkpoint(tmp_path / "out")
    assert summary.quantization_bits == 4
    assert f"{tmp_path / 'out'}: {summary}" in caplog.messages


def test_convert_refuses_a_destination_in_use(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_published(golden, tmp_path / "source")
    assert main(["convert", str(source), str(source)]) == 2
    text = capsys.readouterr().err
    assert (
        text == f"ptuning convert: {source} is already there and not empty; give a new directory.\n"
    )
