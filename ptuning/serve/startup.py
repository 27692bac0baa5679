"""What `chat`, `serve` and `web` decide and check before anything heavy is loaded.

Without a named model they take the newest tuning result, or the nano model. An address that other
machines can reach requires a key or a password.
"""

import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ptuning.storage import INFO_NAME
from ptuning.tunings.artefact import PREFIX_CONFIG_NAME
from ptuning.tunings.loading import NANO_DIR, base_of, find_model

NEWEST_NAME = "newest"


class Served(NamedTuple):
    """A model (directory, adapter's directory or hub id), and prefixes by name."""

    model: str
    prefixes: dict[str, Path]


def find_newest(output: Path) -> Path | None:
    """Return the newest prefix, adapter or tuned model under output, as evaluate.sh finds it."""
    found = [
        file
        for name in (PREFIX_CONFIG_NAME, INFO_NAME)
        for file in (*output.glob(f"*/{name}"), *output.glob(f"*/checkpoint-*/{name}"))
    ]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def parse_prefixes(given: Sequence[str]) -> dict[str, Path]:
    """Parse `NAME=DIRECTORY`; a DIRECTORY alone is named after its last part.

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
    """Complete what is named: a prefix with its base, nothing with the newest under output.

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
    find_model(model)  # refuses a name that stands for no model
    return Served(model, named)


def check_guarded(host: str, secret: str | None, *, flag: str) -> None:
    """Refuse (ValueError) a host that other machines can reach, unless flag gives a secret."""
    if secret is not None and not secret.strip():
        raise ValueError(f"{flag} is empty; give a word, or leave it out on 127.0.0.1.")
    if secret is None and not is_loopback(host):
        raise ValueError(
            f"--host is {host}, which other machines can reach; add {flag} SECRET, or use "
            "--host 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach host.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may point anywhere
        return False


def check_address(host: str, port: int, api_key: str | None) -> None:
    """Refuse (ValueError) an open address without a key, and one that is in use or impossible."""
    check_guarded(host, api_key, flag="--api_key")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen on --host {host} --port {port}: {error}; give another --port, or stop "
            "what listens there."
        ) from error
