"""LoRA, full fine-tuning and P-Tuning on the nano model: same rows, steps and batch, one table.

    python -m benchmarks.tuning [--steps 150] [--output output/tuning-table] [--json FILE]

Each method is one run of main.py in its own process. Peak memory is that of the whole process,
Python and libraries included, in training and answering; seconds are training only. "Stored" is
what is needed to use the result; "checkpoint" adds what resuming needs. Each learning rate is the
best of a short search (docs/tuning.md).
"""

import json
import math
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

from benchmarks.setting import json_file, machine, write_json
from ptuning.model.checkpoint.files import open_safetensors
from ptuning.tunings.loading import NANO_DIR

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "AdvertiseGen" / "sample"
# Flags of main.py in addition to the shared ones.
WAYS = {
    "full": ["--tuning", "full", "--learning_rate", "1e-3"],
    "ptuning": ["--tuning", "ptuning", "--pre_seq_len", "128", "--learning_rate", "6e-2"],
    "lora": ["--tuning", "lora", "--learning_rate", "3e-2"],
}
RESUMING = ("optimizer", "scheduler", "rng_state", "trainer_state", "run_state", "checkpoint.json")
SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
KIB = 1024 if sys.platform != "darwin" else 1  # the unit of ru_maxrss, in bytes


class Outcome(NamedTuple):
    """Cost and scores of one method."""

    trained_parameters: int
    stored_bytes: int
    checkpoint_bytes: int
    train_s: float
    peak_memory_bytes: int
    loss: float
    scores: dict[str, float]


def main() -> int:
    """Run the three methods and print the table."""
    parser = ArgumentParser(prog="benchmarks.tuning", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each way")
    parser.add_argument("--batch_size", type=int, default=16, help="rows per step")
    parser.add_argument("--output", type=Path, default=Path("output/tuning-table"))
    parser.add_argument("--json", type=json_file, help="write the figures here too")
    flags = parser.parse_args()
    outcomes = {way: run(way, flags) for way in WAYS}
    base = base_scores(flags.output / "full")
    setting = f"{flags.steps} steps of {flags.batch_size} rows of AdvertiseGen/sample; {machine()}"
    sys.stdout.write(f"{setting}\n\n{table(outcomes, base)}\n")
    figures: dict[str, object] = {way: outcome._asdict() for way, outcome in outcomes.items()}
    write_json(flags, figures | {"base": base})
    return 0


def run(way: str, flags: Namespace) -> Outcome:
    """Train and score one method; RuntimeError if main.py fails."""
    folder = flags.output.absolute() / way
    command = [
        *(sys.executable, "main.py", "--do_train", "--do_eval", "--do_predict"),
        *("--train_file", str(SAMPLE / "train.json"), "--test_file", str(SAMPLE / "dev.json")),
        *("--validation_file", str(SAMPLE / "dev.json"), "--model_name_or_path", str(NANO_DIR)),
        *("--output_dir", str(folder), "--overwrite_output_dir", "--disable_tqdm", "true"),
        *("--max_source_length", "64", "--max_target_length", "64"),
        *("--per_device_train_batch_size", str(flags.batch_size)),
        *("--per_device_eval_batch_size", "32", "--max_steps", str(flags.steps)),
        *("--save_steps", str(flags.steps), "--logging_steps", "10", *WAYS[way]),
    ]
    sys.stderr.write(f"{way}: {' '.join(command[1:])}\n")
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{way}: main.py ended with {os.waitstatus_to_exitcode(status)}.")
    process.returncode = 0
    checkpoint = folder / f"checkpoint-{flags.steps}"
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    stored = [path for path in files if not path.name.startswith(RESUMING)]
    results = read_json(folder / "predict_results.json")
    return Outcome(
        trained_parameters=sum(map(count_parameters, stored)),
        stored_bytes=sum(path.stat().st_size for path in stored),
        checkpoint_bytes=sum(path.stat().st_size for path in files),
        train_s=read_json(folder / "train_results.json")["train_runtime"],
        peak_memory_bytes=usage.ru_maxrss * KIB,
        loss=read_json(folder / "eval_results.json")["eval_loss"],
        scores={name: results[f"predict_{name}"] for name in SCORES},
    )


def base_scores(folder: Path) -> dict[str, float]:
    """Return the untouched base's scores, equal in every run."""
    results = read_json(folder / "predict_results.json")
    return {name: results[f"base_{name}"] for name in SCORES}


def read_json(file: Path) -> dict[str, float]:
    """Return the figures in a file written by main.py."""
    figures: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def count_parameters(file: Path) -> int:
    """Count the numbers in a .safetensors file; 0 for any other file."""
    if file.suffix != ".safetensors":
        return 0
    with open_safetensors(file) as opened:
        names = list(opened.keys())
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in names)


def table(outcomes: dict[str, Outcome], base: dict[str, float]) -> str:
    """Return the table in Markdown, one column per method and one for the base."""
    ways = list(outcomes.values())
    rows = [
        ["", *outcomes, "base"],
        ["---", *["---:"] * (len(ways) + 1)],
        ["trained parameters", *(f"{way.trained_parameters:,}" for way in ways), "0"],
        ["stored, MB", *(f"{way.stored_bytes / 1e6:.2f}" for way in ways), ""],
        ["checkpoint, MB", *(f"{way.checkpoint_bytes / 1e6:.2f}" for way in ways), ""],
        ["training, s", *(f"{way.train_s:.0f}" for way in ways), ""],
        ["peak memory, MB", *(f"{way.peak_memory_bytes / 1e6:.0f}" for way in ways), ""],
        ["validation loss", *(f"{way.loss:.3f}" for way in ways), ""],
    ]
    for name in SCORES:
        rows.append(
            [name.upper(), *(f"{way.scores[name]:.2f}" for way in ways), f"{base[name]:.2f}"]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
