"""The list of commands; a new one is a line here and a module with `add_arguments` and `run`."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command's name on the command line, one line of help, and the module that does it.

    takes_main_flags: whatever is typed behind it is handed to the module as it is, in `flags`.
    """

    name: str
    help: str
    module: str
    takes_main_flags: bool = False


COMMANDS = (
    Command(
        "convert",
        "Write a checkpoint once more as safetensors, quantised if asked",
        "ptuning.commands.convert",
    ),
    Command(
        "export",
        "Write a trained prefix in a form that other programs read",
        "ptuning.commands.export",
    ),
    Command(
        "data",
        "Check data files before training: faults, repeats, overlaps, lengths",
        "ptuning.commands.data",
    ),
    Command(
        "answer",
        "Have a base answer a file of prompts: general rows for --mix",
        "ptuning.commands.answer",
    ),
    Command(
        "plan",
        "Say what a run of main.py will take, before any weight is loaded",
        "ptuning.commands.plan",
        takes_main_flags=True,
    ),
    Command(
        "doctor",
        "Show versions, devices and back ends, and what each command would pick",
        "ptuning.commands.doctor",
    ),
    Command(
        "chat",
        "Talk to a trained prefix, or to the base, in the terminal or a pipe",
        "ptuning.commands.chat",
    ),
    Command(
        "serve",
        "Serve any number of prefixes on one base over OpenAI's HTTP API",
        "ptuning.commands.serve",
    ),
    Command(
        "web",
        "Open a page to talk to a prefix and the base, side by side",
        "ptuning.commands.web",
    ),
)
