"""The commands other than training: `python -m ptuning COMMAND ...`.

`ptuning.commands.registry` declares them. What a user can cause (ValueError, OSError) is reported
in one line, with exit status 2.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from ptuning.commands.registry import COMMANDS
from ptuning.output import start_logging
from ptuning.train.run_config import parse_arguments

WHAT = "Tools for ChatGLM-6B checkpoints, prefixes and data."


def overview() -> str:
    """Return the usage, one line per command, and where to read more."""
    head = f"{WHAT} Type: python -m ptuning COMMAND ..."
    more = "python -m ptuning COMMAND --help explains one. Training: bash train.sh"
    return f"{head}\n\n{command_lines()}\n\n{more}\n"


def command_lines() -> str:
    """Return one line per command."""
    width = max(len(command.name) for command in COMMANDS) + 2
    return "\n".join(f"  {command.name:<{width}}{command.help}" for command in COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argv is sys.argv[1:] unless given."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        sys.stderr.write(overview())
        return 2
    parser = argparse.ArgumentParser(
        prog="python -m ptuning",
        description=WHAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{command_lines()}",
    )
    names = {command.name: command for command in COMMANDS}
    parser.add_argument("command", choices=names, metavar="COMMAND", help="what to do, see below")
    command = names[parser.parse_args(arguments[:1]).command]
    own = argparse.ArgumentParser(
        prog=f"python -m ptuning {command.name}", description=f"{command.help}."
    )
    command.add_flags(own)
    start_logging(logging.INFO, sys.stderr)
    try:
        if command.takes_main_flags and not {"-h", "--help"} & set(arguments[1:2]):
            given = argparse.Namespace(config=parse_arguments(arguments[1:]))
        else:
            given = own.parse_args(arguments[1:])
        return command.load()(given)
    except BrokenPipeError:  # the reader, such as head, has closed its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"ptuning {command.name}: {message}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"ptuning {command.name}: interrupted.\n")
        return 130  # 128 + SIGINT


if __name__ == "__main__":
    sys.exit(main())
