"""Which addresses only this machine can reach; any other needs a key or a password."""

import ipaddress


def check_guarded(host: str, secret: str | None, *, flag: str) -> None:
    """Refuse to serve other machines without the secret that flag takes (ValueError)."""
    if secret is not None and not secret.strip():
        raise ValueError(f"{flag} is empty; give some letters, or leave it out on 127.0.0.1.")
    if secret is None and not is_loopback(host):
        raise ValueError(
            f"--host is {host}, which other machines can reach; add {flag} SECRET, or use "
            "--host 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Tell whether only programs on this machine can reach host.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name that may point anywhere
        return False
