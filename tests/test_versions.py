"""The version check at import: one line that says what to type."""

from importlib import metadata

import pytest

from ptuning import check_versions


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> None:
    """Make importlib.metadata report these versions; None for a package that is missing."""

    def version(package: str) -> str:
        found = installed[package]
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_what_is_installed_here_passes() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("torch", "transformers"),
    [
        ("2.8.0", "5.10.0"),
        ("2.13.0+cpu", "5.23.0"),
        ("3.0.1", "5.99.9"),
        ("2.8.0a0+git1", "5.10.0.dev0"),
        ("2.9-mine", "5.23.0"),
    ],
)
def test_the_range_is_inclusive_below_and_open_above(
    monkeypatch: pytest.MonkeyPatch, torch: str, transformers: str
) -> None:
    pretend(monkeypatch, torch=torch, transformers=transformers)
    check_versions()


@pytest.mark.parametrize(
    ("torch", "transformers", "message"),
    [
        ("2.7.1", "5.23.0", r"^torch is 2\.7\.1; .* torch>=2\.8: pip install 'torch>=2\.8'$"),
        (None, "5.23.0", r"^torch is not installed; .* pip install 'torch>=2\.8'$"),
        (
            "2.13.0",
            "4.27.1",
            r"^transformers is 4\.27\.1; .* pip install 'transformers>=5\.10,<6'$",
        ),
        ("2.13.0", "5.9.1", r"^transformers is 5\.9\.1; this toolkit needs transformers>=5\.10"),
        ("2.13.0", "6.0.0", r"^transformers is 6\.0\.0; this toolkit needs transformers>=5\.10"),
        ("2.13.0", None, r"^transformers is not installed; "),
    ],
)
def test_anything_else_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, torch: str | None, transformers: str | None, message: str
) -> None:
    pretend(monkeypatch, torch=torch, transformers=transformers)
    with pytest.raises(ImportError, match=message) as caught:
        check_versions()
    assert "\n" not in str(caught.value)
