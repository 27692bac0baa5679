"""The versions this toolkit runs on, checked once at start with a one-line message."""

import re
from importlib import metadata

# Package, lowest version, first version that is too new (None for no bound).
SUPPORTED: tuple[tuple[str, tuple[int, int], tuple[int, int] | None], ...] = (
    ("torch", (2, 8), None),
    ("transformers", (5, 10), (6, 0)),
)


def parse_version(text: str) -> tuple[int, int]:
    """Return major and minor of a version string.

    >>> parse_version("2.13.0+cpu")
    (2, 13)
    """
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"the version {text!r} does not start with two numbers, as in 2.13.0.")
    return int(match[1]), int(match[2])


def check_versions() -> None:
    """Raise a one-line ImportError when torch or transformers is missing or out of range."""
    for package, lowest, too_new in SUPPORTED:
        wanted = f"{package} >= {lowest[0]}.{lowest[1]}" + (f", < {too_new[0]}" if too_new else "")
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "not installed"
        else:
            version = parse_version(found)
            if lowest <= version and (too_new is None or version < too_new):
                continue
        raise ImportError(
            f"{package} is {found}; this toolkit needs {wanted}: "
            f"pip install '{wanted.replace(' ', '')}'"
        )
