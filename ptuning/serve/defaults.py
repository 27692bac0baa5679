"""What is served when nothing is named: the newest local prefix, else the nano model alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ptuning.model.prefix_artefact import CONFIG_NAME, read_info
from ptuning.nano.paths import NANO_DIR

NEWEST_NAME = "newest"


class Served(NamedTuple):
    """A base (directory or hub id) and prefixes by name."""

    model: str
    prefixes: dict[str, Path]


def find_newest_prefix(output: Path = Path("output")) -> Path | None:
    """Return the prefix written last under output, as evaluate.sh finds it; None without one."""
    found = [*output.glob(f"*/{CONFIG_NAME}"), *output.glob(f"*/checkpoint-*/{CONFIG_NAME}")]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def parse_prefixes(given: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=DIRECTORY` words.

    >>> parse_prefixes(["adgen=output/adgen"])
    {'adgen': PosixPath('output/adgen')}
    """
    prefixes: dict[str, Path] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ValueError(
                f"--prefix is {word!r}; give NAME=DIRECTORY, such as adgen=output/run."
            )
        if name in prefixes:
            raise ValueError(f"--prefix names {name!r} twice; use another name for one of them.")
        prefixes[name] = Path(path)
    return prefixes


def choose_served(
    model: str | None, prefixes: Sequence[str] = (), *, output: Path = Path("output")
) -> Served:
    """Fill in what is not named: the newest local prefix, and the base of the first prefix.

    A model without prefixes is served alone.
    """
    named = parse_prefixes(prefixes)
    if not named and model is None:
        newest = find_newest_prefix(output)
        if newest is not None:
            named = {NEWEST_NAME: newest}
    if model is None and named:
        model = _base_of(next(iter(named.values())))
    return Served(model or str(NANO_DIR), named)


def _base_of(prefix: Path) -> str:
    """Return the base that a prefix says it was trained on."""
    info = read_info(prefix)
    if info is None or not info.base_model_name_or_path:
        raise ValueError(
            f"the prefix at {prefix} does not name its base model (no {CONFIG_NAME}, or an empty "
            "name); give it with --model."
        )
    base = info.base_model_name_or_path
    checkout = NANO_DIR.parents[2]
    if not Path(base).is_dir() and (checkout / base / "config.json").is_file():
        return str(checkout / base)  # trained by train.sh, which runs in the checkout
    return base
