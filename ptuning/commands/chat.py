"""`python -m ptuning chat`: talk to a prefix, or to the base, in the terminal."""

import argparse
import importlib.util
import io
import sys

from ptuning.serve.defaults import choose_served, loading_options


def run(arguments: argparse.Namespace) -> int:
    """Load, then chat until the end of the input."""
    served = choose_served(arguments.model, arguments.prefix)
    from ptuning.serve.cli import TerminalChat  # heavy, and not needed to parse a command line
    from ptuning.serve.session import Session

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        _edit_lines()
    else:
        _read_and_write_utf8()
    with Session.load(served.model, max_rows=1, **loading_options(arguments)) as session:
        for name, path in served.prefixes.items():
            session.add_prefix(name, path)
        TerminalChat(
            session,
            prefix=next(iter(served.prefixes), None),
            sampling={
                "temperature": arguments.temperature,
                "top_p": arguments.top_p,
                "seed": arguments.seed,
            },
            read_line=input if is_terminal else read_piped_line,
            output=sys.stdout,
            notices=sys.stderr,
            is_terminal=is_terminal,
        ).run()
    return 0


def _edit_lines() -> None:
    """Give input() its line editing and history, where Python has them."""
    if importlib.util.find_spec("readline") is not None:  # Windows has none
        importlib.import_module("readline")


def _read_and_write_utf8() -> None:
    """Take pipes for UTF-8 whatever the locale says."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def read_piped_line(prompt: str) -> str:
    """Read a line of standard input; EOFError at its end."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
