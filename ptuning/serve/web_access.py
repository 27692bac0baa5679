"""Who may open the demo page; known before anything heavy is loaded."""

from ptuning.serve.addresses import is_loopback


def check_address(host: str, password: str | None) -> None:
    """Refuse to serve other machines without a password."""
    if password is not None and not password.strip():
        raise ValueError("--password is empty; give some letters, or leave it out on 127.0.0.1.")
    if password is None and not is_loopback(host):
        raise ValueError(
            f"--host is {host}, which other machines can reach; add --password SECRET, or use "
            "--host 127.0.0.1."
        )
