"""A process that has imported everything and forks the processes of one run, as torchrun starts them.

Started as `python -m tests.train.launching`. A request is one JSON line, the answer another:
{"argv": main.py's, "processes": n, "log": path before the process's number, "no_dropout": bool,
 "signal": {"number", "to": [process, ...], "after": text in the log of process 0} or null,
 "fail": {"process", "step"} or {"process", "row"} or null: an error that nobody foresaw, in a step
 or after so many answered rows}
{"statuses": [exit status or -signal, ...], "seconds"}
As torchrun does, it ends the others where one process fails: SIGTERM, and SIGKILL later.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tests.train.preloading import import_for_runs

LIMIT_S = 60.0
PATIENCE_S = 10.0  # from SIGTERM to SIGKILL; torchrun waits 30 s


def main() -> None:
    """Answer requests until the end of standard input."""
    import peft  # noqa: F401

    import_for_runs()
    tell("ready")
    for line in sys.stdin:
        tell(json.dumps(Launch(json.loads(line)).run()))


def tell(line: str) -> None:
    """Write one line to the test that asked."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Launch:
    """The processes of one run."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.logs = [Path(f"{request['log']}{i}") for i in range(request["processes"])]
        self.port = free_port()
        self.statuses: dict[int, int] = {}
        self.pids: list[int] = []

    def run(self) -> dict[str, Any]:
        """Start them, and wait until all have ended."""
        started = time.monotonic()
        for index, log in enumerate(self.logs):
            log.write_bytes(b"")
            pid = os.fork()
            if pid == 0:
                be_a_process(self.request, index, log, self.port)
            self.pids.append(pid)
        self._watch(started)
        statuses = [self.statuses[pid] for pid in self.pids]
        return {"statuses": statuses, "seconds": time.monotonic() - started}

    def _watch(self, started: float) -> None:
        wanted = self.request["signal"]
        failed_at = None
        while len(self.statuses) < len(self.pids):
            time.sleep(0.01)
            for pid in set(self.pids) - set(self.statuses):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
            if wanted and wanted["after"] in self.logs[0].read_text("utf-8"):
                self._send(wanted["number"], [self.pids[index] for index in wanted["to"]])
                wanted = None
            now = time.monotonic()
            if failed_at is None and (any(self.statuses.values()) or now - started > LIMIT_S):
                failed_at = now
                self._send(signal.SIGTERM, self.pids)
            if failed_at is not None and now - failed_at > PATIENCE_S:
                self._send(signal.SIGKILL, self.pids)

    def _send(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            if pid not in self.statuses:
                os.kill(pid, number)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def be_a_process(request: dict[str, Any], index: int, log: Path, port: int) -> None:
    """Run main.py's main in this forked process; does not return."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if request["processes"] > 1:
        os.environ |= {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(request["processes"]),
            "LOCAL_WORLD_SIZE": str(request["processes"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    code = 70
    try:
        import main

        if request["no_dropout"]:
            leave_dropout_out()
        if request["fail"] and request["fail"]["process"] == index:
            fail_at(request["fail"])
        code = main.main(request["argv"])
    finally:
        sys.stdout.flush()
        if sys.exc_info()[0] is not None:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def leave_dropout_out() -> None:
    """Train the prefix without dropout, whose masks depend on how rows lie in batches."""
    from ptuning.train.tuning import PrefixTuning

    attach = PrefixTuning.attach

    def attach_without(tuning: Any, model: Any) -> None:
        attach(tuning, model)
        model.prefix_encoder.dropout = 0.0

    PrefixTuning.attach = attach_without  # type: ignore[method-assign]


def fail_at(where: dict[str, int]) -> None:
    """Raise in that optimiser step, or at the row after so many answered ones."""
    from ptuning.scoring.predictions import PredictionFile
    from trainer_seq2seq import Seq2SeqTrainer

    training_step, add = Seq2SeqTrainer.training_step, PredictionFile.add

    def failing_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step + 1 == where["step"]:
            raise ValueError("a fault of the program, made for a test")
        return training_step(trainer, *args, **kwargs)

    def failing_add(file: Any, *args: Any, **kwargs: Any) -> None:
        if file.next_index == where["row"]:
            raise ValueError("a fault of the program, made for a test")
        add(file, *args, **kwargs)

    if "step" in where:
        Seq2SeqTrainer.training_step = failing_step  # type: ignore[method-assign]
    else:
        PredictionFile.add = failing_add  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
