"""What evaluate.sh writes and what the API answers on the same rows is the same text, byte for byte."""

import json

from main import main
from ptuning.tunings.loading import NANO_DIR, SAMPLE_DIR
from tests.serve.live_server import client, running

ROWS = 12


def predictions(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["predict"] for line in lines]


def test_the_api_answers_dev_rows_as_evaluation_does(tmp_path, prefix_dirs, session):
    dev = SAMPLE_DIR / "dev.json"
    flags = {
        "--test_file": dev,
        "--model_name_or_path": NANO_DIR,
        "--ptuning_checkpoint": prefix_dirs["adgen"],
        "--output_dir": tmp_path,
        "--max_predict_samples": ROWS,
        "--per_device_eval_batch_size": 5,
        "--prompt_column": "content",
        "--response_column": "summary",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    assert main(["--do_predict", "--predict_with_generate", *words]) == 0
    rows = [json.loads(line) for line in dev.read_text(encoding="utf-8").splitlines()[:ROWS]]

    with running(session) as address, client(address) as api:

        def ask(model, **extra):
            return [
                api.completions.create(model=model, prompt=row["content"], extra_body=extra)
                .choices[0]
                .text
                for row in rows
            ]

        tuned = ask("adgen")
        base = ask("base", max_tokens=24, max_source_length=64)
    assert tuned == predictions(tmp_path / "generated_predictions.txt")
    assert base == predictions(tmp_path / "generated_predictions_base.txt")
    assert len({*tuned, *base}) > ROWS
