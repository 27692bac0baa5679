"""Task score against forgetting on the nano model: presets, with and without --mix.

    python -m benchmarks.retention [--steps 300] [--json FILE] [--picture FILE]

Each case is one run of main.py with the same rows, steps and batch. The task is the style of
AdvertiseGen/sample; forgetting is measured on nano's 40 general prompts. The general rows of --mix
are 400 other prompts of the same kinds that the base answered, or rows that it made up by itself
(`ptuning generate`, templates zh and magpie).
"""

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

from benchmarks.setting import json_file, machine, write_json
from ptuning.data.general_prompts import FILE_NAME, read_general_prompts
from ptuning.nano.corpus import general_text, sample_general_prompts
from ptuning.storage import write_atomically
from ptuning.tunings.loading import NANO_DIR

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "AdvertiseGen" / "sample"
NUM_MIXED, MIXED_SEED = 400, 1
UNTRAINED = ["--max_steps", "1", "--learning_rate", "0"]
NEAR_ZERO = ["--prefix_init_std", "1e-3"]
GENTLE_5E_3 = ["--preset", "gentle", "--learning_rate", "5e-3"]


class Case(NamedTuple):
    """One run: its name in the table, its flags, and the general rows that are mixed in."""

    name: str
    flags: list[str]
    mix: str = ""  # "answers", or a template of `ptuning generate`


CASES = (
    Case("untrained, start 1", UNTRAINED),
    Case("untrained, start 1e-3", [*NEAR_ZERO, *UNTRAINED]),
    Case("task", ["--preset", "task"]),
    Case("task + mix", ["--preset", "task"], "answers"),
    Case("task + generated zh", ["--preset", "task"], "zh"),
    Case("task + generated magpie", ["--preset", "task"], "magpie"),
    Case("task, start 1e-3", ["--preset", "task", *NEAR_ZERO]),
    Case("gentle", ["--preset", "gentle"]),
    Case("gentle + mix", ["--preset", "gentle"], "answers"),
    Case("gentle, rate 5e-3", GENTLE_5E_3),
    Case("gentle, rate 5e-3 + mix", GENTLE_5E_3, "answers"),
)
FIGURES = {  # column -> key in predict_results.json
    "BLEU-4": "predict_bleu-4",
    "ROUGE-L": "predict_rouge-l",
    "loss change": "retention_loss_change",
    "divergence": "retention_divergence",
    "same answers": "retention_same_answers",
}


def main() -> int:
    """Run all cases and print the table."""
    parser = ArgumentParser(prog="benchmarks.retention", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each case")
    parser.add_argument("--batch_size", type=int, default=16, help="rows per step")
    parser.add_argument("--prefix", type=int, default=128, help="prefix length in tokens")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of general rows in --mix")
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, help="run these cases alone")
    parser.add_argument("--output", type=Path, default=Path("output/retention-table"))
    parser.add_argument("--json", type=json_file, help="write the figures here too")
    parser.add_argument("--picture", type=Path, help="draw score against retention here")
    flags = parser.parse_args()
    cases = [case for case in CASES if flags.only is None or case.name in flags.only]
    kinds = dict.fromkeys(case.mix for case in cases if case.mix)
    mixes = {kind: make_general_rows(kind, flags.output.absolute()) for kind in kinds}
    results = {case.name: run(case, mixes.get(case.mix), flags) for case in cases}
    sys.stdout.write(
        f"{flags.steps} steps of {flags.batch_size} rows, prefix of {flags.prefix} tokens, mix "
        f"{flags.ratio:g}; {machine()}\n\n{table(results)}\n"
    )
    write_json(flags, {"machine": machine(), "steps": flags.steps, "cases": dict(results)})
    if flags.picture:
        draw(results, flags.picture)
    return 0


def make_general_rows(kind: str, folder: Path) -> Path:
    """Let the base answer prompts that are not used for measuring, or make up rows by itself."""
    rows = folder / f"{kind}.jsonl"
    if kind != "answers":
        launch(
            *("-m", "ptuning", "generate", "--template", kind, "--num", str(NUM_MIXED)),
            "--out",
            str(rows),
        )
        return rows
    measured = read_general_prompts(NANO_DIR / FILE_NAME).prompts
    prompts = sample_general_prompts(NUM_MIXED, seed=MIXED_SEED, without=measured)
    asked = folder / "prompts.json"
    write_atomically(asked, general_text(prompts).encode())
    launch("-m", "ptuning", "answer", str(asked), "--output", str(rows))
    return rows


def run(case: Case, mix: Path | None, flags: Namespace) -> dict[str, float]:
    """Train and score one case; return its figures and the seconds of training."""
    folder = flags.output.absolute() / case.name.replace(" ", "-").replace(",", "")
    mixed = ["--mix", f"{mix}:{flags.ratio}:prompt,response"] if mix else []
    launch(
        *("main.py", "--do_train", "--do_predict", "--train_file", str(SAMPLE / "train.json")),
        *("--test_file", str(SAMPLE / "dev.json"), "--model_name_or_path", str(NANO_DIR)),
        *("--output_dir", str(folder), "--overwrite_output_dir", "--disable_tqdm", "true"),
        *("--pre_seq_len", str(flags.prefix), "--compare_base", "false"),
        *("--measure_retention", "true", "--max_source_length", "64"),
        *("--max_target_length", "64", "--per_device_train_batch_size", str(flags.batch_size)),
        *("--per_device_eval_batch_size", "32", "--max_steps", str(flags.steps)),
        *("--save_steps", str(flags.steps), "--logging_steps", "20", *case.flags, *mixed),
    )
    figures = json.loads((folder / "predict_results.json").read_text(encoding="utf-8"))
    times = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    found = {name: float(figures[key]) for name, key in FIGURES.items()}
    return {**found, "train_s": float(times["train_runtime"])}


def launch(*command: str) -> None:
    """Run a Python command of this project; RuntimeError if it fails."""
    sys.stderr.write(f"python {' '.join(command)}\n")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"python {' '.join(command)} ended with {done.returncode}.")


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the table in Markdown, one row per case."""
    lines = [["", *FIGURES], ["---", *["---:"] * len(FIGURES)]]
    for name, found in results.items():
        shown = [f"{found['BLEU-4']:.2f}", f"{found['ROUGE-L']:.2f}"]
        shown += [f"{found['loss change']:+.3f}", f"{found['divergence']:.3f}"]
        lines.append([name, *shown, f"{found['same answers']:.0f} of 40"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Draw BLEU-4 against the share of identical answers, one point per case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    placed: list[tuple[float, float]] = []
    results = {name: found for name, found in results.items() if not name.startswith("untrained")}
    points = [(found["same answers"], found["BLEU-4"]) for found in results.values()]
    for name, found in results.items():
        kept, score = found["same answers"], found["BLEU-4"]
        colour = "tab:blue" if name.startswith("task") else "tab:orange"
        axes.scatter(kept, score, c=colour, marker="s" if "+" in name else "o", s=60)
        clashes = sum(abs(kept - x) < 9 and abs(score - y) < 4 for x, y in placed)
        placed.append((kept, score))
        covers = any(0 < x - kept < 12 and abs(score - y) < 2 for x, y in points)
        offset = (8, -4 + 13 * max(clashes, covers))  # points, above a label or a point
        axes.annotate(name, (kept, score), xytext=offset, textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 46)
    axes.set(
        xlabel="general answers unchanged by tuning, of 40",
        ylabel="BLEU-4 on the task",
        xlim=(0, 46),
    )
    axes.set_ylim(0, 1.1 * max(score for _, score in points))
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
