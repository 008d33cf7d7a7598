"""own_address: the address of this machine at which the other ranks of a model can reach it."""

from __future__ import annotations

import os
import socket
import struct
import sys

from octavo_engine.errors import InvalidConfig

INTERFACE = "GLOO_SOCKET_IFNAME"
"""The variable that names the interface to use, for gloo as for us."""

_SIOCGIFADDR = 0x8915


def own_address(host: str, port: int) -> str:
    """Return the address that this machine shows to another one; nothing is sent.

    Args:
        host: of the other one; a name or an address. A loopback address returns itself.
        port: of it.

    Raises:
        InvalidConfig: there is no way to the host, or no such interface as the environment names.
    """
    names = os.environ.get(INTERFACE, "")
    if names and sys.platform == "linux":
        return _address_of(names.split(",")[0])
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # a datagram socket only looks for a route
            found: str = probe.getsockname()[0]
    except OSError as error:
        raise InvalidConfig(f"there is no way from here to {host}: {error}; use another address") from error
    return found


def _address_of(interface: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise InvalidConfig(
                f"{INTERFACE} names the network interface {interface!r}, which has no IPv4 address here: {error}; "
                "name another one, or unset it"
            ) from error
    return socket.inet_ntoa(found[20:24])
