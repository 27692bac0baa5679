"""What selection does to a prefix: task score and retention of few chosen rows on the nano model.

    python -m benchmarks.selection [--budget 200] [--steps 300] [--seeds 3] [--picture FILE]

Every case trains for the same steps on all rows of AdvertiseGen/sample, or on those that `ptuning
select` chose of them, and is repeated with other seeds (of the start, the order, and what is left
to chance). IFD is measured with a prefix that was trained for a few steps, because nano by itself
knows nothing of the task; `target` looks for rows like the first 50 of the dev set, and all cases
are scored on the others. The judge is a rule behind a loopback endpoint, as there is no model to
ask: it grades by the share of the attributes' values that the copy names.
"""

import json
import os
import statistics
import sys
from argparse import ArgumentParser, Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from benchmarks.retention import FIGURES, SAMPLE, launch
from benchmarks.setting import json_file, machine, write_json
from ptuning.storage import write_atomically
from ptuning.tunings.loading import NANO_DIR

NUM_LIKE = 50
BRIEF_STEPS = 30
CASES = {  # the flags of `ptuning select`
    "random": ["--score", "none", "--embed", "none"],
    "longest": ["--score", "length", "--embed", "none"],
    "ifd": ["--score", "ifd", "--prefix", "brief", "--embed", "none"],
    "ifd, unlike": ["--score", "ifd", "--prefix", "brief", "--max_similarity", "0.9"],
    "judge": ["--score", "judge", "--endpoint", "JUDGE", "--model", "rule", "--embed", "none"],
    "target": ["--score", "target", "--like", "like.json", "--embed", "none"],
    "target, unlike": ["--score", "target", "--like", "like.json", "--max_similarity", "0.9"],
}
ALL = "all rows"


def main() -> int:
    """Run all cases with all seeds and print the table."""
    parser = ArgumentParser(prog="benchmarks.selection", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=int, default=200, help="rows that are chosen")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case")
    parser.add_argument("--only", nargs="+", choices=[ALL, *CASES], help="run these cases alone")
    parser.add_argument("--output", type=Path, default=Path("output/selection-table"))
    parser.add_argument("--json", type=json_file, help="write the figures here too")
    parser.add_argument("--picture", type=Path, help="draw the scores here")
    flags = parser.parse_args()
    flags.output = flags.output.absolute()
    split_dev(flags.output)
    server = ThreadingHTTPServer(("127.0.0.1", 0), RuleJudge)
    flags.judge = f"http://127.0.0.1:{server.server_address[1]}"
    os.environ["NO_PROXY"] = "127.0.0.1"
    Thread(target=server.serve_forever, daemon=True).start()
    names = [name for name in (ALL, *CASES) if flags.only is None or name in flags.only]
    if any("brief" in CASES.get(name, ()) for name in names):
        train(flags, "brief", SAMPLE / "train.json", 0, "--max_steps", str(BRIEF_STEPS))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(flags.seeds):
        for name in names:
            rows = SAMPLE / "train.json" if name == ALL else choose(flags, name, seed)
            results[name].append(run(flags, name, rows, seed))
    sys.stdout.write(
        f"{flags.budget} of 2,000 rows, {flags.steps} steps, {flags.seeds} seeds, mean and "
        f"standard deviation; {machine()}\n\n{table(results)}\n"
    )
    write_json(flags, {"machine": machine(), "steps": flags.steps, "cases": results})
    if flags.picture:
        draw(results, flags.picture)
    return 0


class RuleJudge(BaseHTTPRequestHandler):
    """Replies to a judge's prompt with 1 to 6, by how many attributes the answer names."""

    def do_GET(self) -> None:
        """Say nothing of models."""
        self.send_error(404)

    def do_POST(self) -> None:
        """Grade."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        question, _, rest = prompt.partition("【问题】")[2].partition("【回答】")
        values = [pair.partition("#")[2] for pair in question.strip().split("*")]
        share = sum(value in rest for value in values) / len(values)
        message = {"role": "assistant", "content": str(1 + round(5 * share))}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        content = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""


def split_dev(folder: Path) -> None:
    """Write the first rows of the dev set as like.json, the others as test.json."""
    rows = [json.loads(line) for line in (SAMPLE / "dev.json").read_text("utf-8").splitlines()]
    for name, part in (("like", rows[:NUM_LIKE]), ("test", rows[NUM_LIKE:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        write_atomically(folder / f"{name}.json", text.encode())


def choose(flags: Namespace, name: str, seed: int) -> Path:
    """Have `ptuning select` choose rows for a case; those that chance has no part in, once."""
    has_chance = name == "random"
    out = flags.output / f"{name.replace(', ', '-')}{seed if has_chance else ''}.jsonl"
    real = {"JUDGE": flags.judge}
    real |= {name: str(flags.output / name) for name in ("brief", "like.json")}
    own = [real.get(word, word) for word in CASES[name]]
    if has_chance or seed == 0:
        launch(
            *("-m", "ptuning", "select", str(SAMPLE / "train.json"), "--out", str(out), *own),
            *("--budget", str(flags.budget), "--against", str(SAMPLE / "dev.json")),
            *("--seed", str(seed)),
        )
    return out


def train(flags: Namespace, name: str, rows: Path, seed: int, *more: str) -> Path:
    """Train a prefix; return its folder."""
    folder = flags.output / f"{name.replace(', ', '-').replace(' ', '-')}"
    launch(
        *("main.py", "--do_train", "--train_file", str(rows), "--output_dir", str(folder)),
        *("--model_name_or_path", str(NANO_DIR), "--pre_seq_len", "128", "--preset", "task"),
        *("--overwrite_output_dir", "--disable_tqdm", "true", "--seed", str(seed)),
        *("--max_source_length", "64", "--max_target_length", "64"),
        *("--per_device_train_batch_size", "16", "--logging_steps", "50", *more),
    )
    return folder


def run(flags: Namespace, name: str, rows: Path, seed: int) -> dict[str, float]:
    """Train and score a case with a seed; return its figures."""
    folder = train(
        *(flags, f"{name}-{seed}", rows, seed, "--max_steps", str(flags.steps)),
        *("--save_steps", str(flags.steps), "--do_predict", "--compare_base", "false"),
        *("--test_file", str(flags.output / "test.json"), "--measure_retention", "true"),
        *("--per_device_eval_batch_size", "32"),
    )
    figures = json.loads((folder / "predict_results.json").read_text(encoding="utf-8"))
    return {name: float(figures[key]) for name, key in FIGURES.items()}


def spread(values: list[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a few runs, 0 for one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the table in Markdown, one row per case."""
    lines = [["", *FIGURES], ["---", *["---:"] * len(FIGURES)]]
    for name, runs in results.items():
        shown = []
        for figure in FIGURES:
            mean, deviation = spread([run[figure] for run in runs])
            digits = 3 if figure in ("loss change", "divergence") else 1
            shown.append(f"{mean:.{digits}f} ± {deviation:.{digits}f}")
        lines.append([name, *shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw each case's BLEU-4 and forgetting: a point for each seed, mean and deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.45 * len(results)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(results)[::-1]
    for axes, (title, of) in zip(
        figure.subplots(1, 2, sharey=True),
        (
            ("BLEU-4 on the task", "BLEU-4"),
            ("forgetting: loss on the base's answers, change", "loss change"),
        ),
        strict=True,
    ):
        for place, name in enumerate(names):
            values = [run[of] for run in results[name]]
            mean, deviation = spread(values)
            axes.scatter(values, [place] * len(values), s=14, c="tab:grey", zorder=2)
            axes.errorbar(mean, place, xerr=deviation, fmt="o", c="tab:blue", capsize=4, zorder=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
