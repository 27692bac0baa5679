"""What is served when nothing is named: what was tuned last here, else the nano model alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptuning.storage import INFO_NAME
from ptuning.tunings.artefact import PREFIX_CONFIG_NAME
from ptuning.tunings.loading import NANO_DIR, base_of, find_model

NEWEST_NAME = "newest"


class Served(NamedTuple):
    """A model (directory or hub id; an adapter's directory too) and prefixes by name."""

    model: str
    prefixes: dict[str, Path]


def find_newest(output: Path) -> Path | None:
    """Return what was tuned last under output, as evaluate.sh finds it: a prefix, an adapter or a
    whole model; None without any.
    """
    found = [
        file
        for name in (PREFIX_CONFIG_NAME, INFO_NAME)
        for file in (*output.glob(f"*/{name}"), *output.glob(f"*/checkpoint-*/{name}"))
    ]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def parse_prefixes(given: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=DIRECTORY` words; a DIRECTORY alone is named after its last part.

    >>> parse_prefixes(["adgen=output/run-1", "output/run-2"])
    {'adgen': PosixPath('output/run-1'), 'run-2': PosixPath('output/run-2')}
    """
    prefixes: dict[str, Path] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            name, path = Path(word).resolve().name, word
        if not (name and path and word):
            raise ValueError(
                f"--prefix is {word!r}; give DIRECTORY or NAME=DIRECTORY, such as adgen=output/run."
            )
        if name in prefixes:
            raise ValueError(f"--prefix names {name!r} twice; use another name for one of them.")
        prefixes[name] = Path(path)
    return prefixes


def choose_served(
    model: str | None, prefixes: Sequence[str] = (), *, output: Path = Path("output")
) -> Served:
    """Fill in what is not named: what was tuned last here, and the base of the first prefix.

    A model without prefixes is served alone.
    """
    named = parse_prefixes(prefixes)
    if not named and model is None:
        newest = find_newest(output)
        if newest is not None and (newest / PREFIX_CONFIG_NAME).is_file():
            named = {NEWEST_NAME: newest}
        elif newest is not None:
            model = str(newest)
    if model is None and named:
        model = base_of(next(iter(named.values())))
    model = model or str(NANO_DIR)
    find_model(model)  # a name that stands for no model is refused before anything heavy is loaded
    return Served(model, named)


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `Session.load` takes of the flags."""
    return {
        "dtype": arguments.dtype,
        "device": arguments.device,
        "quantization_bit": arguments.quantization_bit,
    }
