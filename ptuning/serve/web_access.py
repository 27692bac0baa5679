"""Who may open the demo page; known before anything heavy is loaded."""

from ptuning.serve.addresses import check_guarded


def check_address(host: str, password: str | None) -> None:
    """Refuse to serve other machines without a password."""
    check_guarded(host, password, flag="--password")
