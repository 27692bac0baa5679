"""Which addresses only this machine can reach; any other needs a key or a password."""

import ipaddress


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
