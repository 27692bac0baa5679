"""Every GPU measurement in one run of at most eight minutes.

    python -m benchmarks.cuda [--out DIR] [--budget 480] [--only NAME ...]
    python -m benchmarks.cuda --device cpu --size tiny      # try the stages without a GPU

The stages of `benchmarks.cuda_stages` run in order of size, each in its own process with a time
limit, so that a failing stage does not affect the others. DIR/results.json is rewritten after each
stage; the table is printed at the end. A failed stage leaves its log in DIR and its last lines in
both. ChatGLM-6B needs 16 GB of GPU memory; no weights are read.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.cuda_stages import STAGES, Figure, Stage, Target
from benchmarks.setting import ROOT, SIZES
from ptuning.storage import write_atomically

MARK = "FIGURE "  # prefix of an output line that holds a figure as JSON
LEAST_S = 10  # a stage with less time left is not started
OUTPUT_LINES, TABLE_LINES = 30, 6  # of a failed stage's log: kept, and shown
ENDING_S = 5  # for a stopped stage to exit
OK, TIMED_OUT, STOPPED = "ok", "timed out", "stopped"


@dataclass
class Result:
    """How a stage ended; output holds the last lines of a failed one."""

    status: str
    time_s: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    output: list[str] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        """Whether it was started and failed."""
        return self.status.startswith(("failed", TIMED_OUT))


def run_stage(command: list[str], limit_s: float, log: Path) -> Result:
    """Run a command for at most limit_s; Ctrl-C stops it and is reported as its result."""
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
            status = f"failed with status {code}" if code else OK
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        except KeyboardInterrupt:
            status = STOPPED
        finally:
            end_session(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    marked = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    result = Result(status, time.monotonic() - started, [Figure(*json.loads(m)) for m in marked])
    if status == OK:
        log.unlink()
    else:
        others = [line for line in lines if line.strip() and not line.startswith(MARK)]
        result.output = others[-OUTPUT_LINES:]
    return result


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a stage and all processes that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_S)


def run_all(
    stages: Mapping[str, Stage],
    command_for: Callable[[str], list[str]],
    *,
    on_cuda: bool,
    budget_s: float,
    out: Path,
) -> dict[str, Result]:
    """Run the stages in order until budget_s is used up; write results.json after each."""
    started, results = time.monotonic(), {}
    for name, stage in stages.items():
        left = budget_s - (time.monotonic() - started)
        if stage.needs_cuda and not on_cuda:
            results[name] = Result("skipped: it needs CUDA")
        elif left < LEAST_S:
            results[name] = Result(f"not started: less than {LEAST_S} s of --budget left")
        else:
            log = out / f"{name}.log"
            results[name] = run_stage(command_for(name), min(stage.limit_s, left), log)
        write_results(out, results)
        say(f"{name}: {results[name].status}, {results[name].time_s:.0f} s")
        if results[name].status == STOPPED:
            break
    return results


def write_results(out: Path, results: Mapping[str, Result]) -> None:
    """Write results.json atomically."""
    values = {
        name: asdict(result) | {"figures": [figure._asdict() for figure in result.figures]}
        for name, result in results.items()
    }
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / "results.json", text.encode())


def say(text: str) -> None:
    """Print a line and flush."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(results: Mapping[str, Result]) -> str:
    """Return one line per figure, and the last lines of failed stages."""
    lines = []
    for name, result in results.items():
        for figure in result.figures:
            lines.append(f"{name:<15}{figure.name:<50}{shown(figure.value):>10} {figure.unit}")
        if result.status != OK:
            lines.append(f"{name:<15}{result.status}, {result.time_s:.0f} s")
            lines += [f"{'':<15}| {line[:150]}" for line in result.output[-TABLE_LINES:]]
    return "\n".join(line.rstrip() for line in lines)


def shown(value: float | str) -> str:
    """Return a figure with three digits, thousands in full.

    >>> shown(0.01234), shown(4.7), shown(123.4), shown(9876.5), shown("none")
    ('0.0123', '4.7', '123', '9,876', 'none')
    """
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def run_one(name: str, target: Target) -> int:
    """Run a stage in this process and print its figures for the parent process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for figure in STAGES[name].run(target):
        say(f"\n{MARK}{json.dumps(figure)}")  # the previous line may be a progress bar
    return 0


def parse(argv: list[str]) -> Namespace:
    """Read the flags."""
    parser = ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "output" / "cuda", help="results' folder"
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds for all stages")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages alone")
    parser.add_argument("--device", default="cuda", help="cpu, at a small --size, tries the stages")
    parser.add_argument("--size", choices=SIZES, default="chatglm-6b")
    parser.add_argument("--stage", choices=STAGES, help="run one stage in this process")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Return 0, 1 if a stage failed, 2 without a GPU, 130 after Ctrl-C or SIGTERM."""
    flags = parse(argv)
    target = Target(flags.device, flags.size)
    if target.on_cuda and not torch.cuda.is_available():
        sys.stderr.write(
            f"benchmarks.cuda: torch {torch.__version__} sees no CUDA device; run it where there "
            "is one, or try the stages with --device cpu --size tiny.\n"
        )
        return 2
    if flags.stage:
        return run_one(flags.stage, target)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    flags.out.mkdir(parents=True, exist_ok=True)
    wanted = {name: stage for name, stage in STAGES.items() if name in (flags.only or STAGES)}
    same = ["--device", flags.device, "--size", flags.size]
    results = run_all(
        wanted,
        lambda name: [sys.executable, "-m", "benchmarks.cuda", "--stage", name, *same],
        on_cuda=target.on_cuda,
        budget_s=flags.budget,
        out=flags.out,
    )
    say(f"\n{table(results)}\n\n{flags.out / 'results.json'}")
    if any(result.status == STOPPED for result in results.values()):
        return 130
    return int(any(result.has_failed for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
