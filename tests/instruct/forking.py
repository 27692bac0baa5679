"""A process that has imported everything and forks `python -m ptuning` on request, to be killed.

Started as `python -m tests.instruct.forking`. A request is one JSON line: [arguments, path of a
log]. The answers are two lines: the process id as it starts, the exit status or -signal at its end.
"""

import importlib
import json
import os
import signal
import sys


def main() -> None:
    """Answer requests until the end of standard input."""
    from ptuning.__main__ import main as run

    for module in ("openai", "openai.resources.chat", "ptuning.commands.generate"):
        importlib.import_module(module)  # the slow imports, once for all runs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for line in sys.stdin:
        arguments, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = 70
            try:
                code = run(arguments)
            finally:
                sys.stderr.flush()
                os._exit(code)
        tell(str(pid))
        tell(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)  # without the slow end of an interpreter


def tell(line: str) -> None:
    """Write one line to the test that asked."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
