"""Endpoint: where a server listens, and with which certificates."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo_engine.errors import InvalidConfig
from octavo_server.config import is_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What makes HTTP into HTTPS.

    Attributes:
        certfile: the server's certificate, and those between it and its root, in PEM.
        keyfile: the certificate's private key; None if it is in the same file.
        ca_certs: roots; if given, clients must show a certificate of one of them.

    Raises:
        InvalidConfig: if a file cannot be used; says why.
    """

    certfile: Path
    keyfile: Path | None = None
    ca_certs: Path | None = None

    def __post_init__(self) -> None:
        def ask_passphrase() -> str:
            raise InvalidConfig(f"the private key of {self.certfile} is encrypted; give one without a passphrase")

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certfile, self.keyfile, ask_passphrase)
            if self.ca_certs is not None:
                context.load_verify_locations(self.ca_certs)
        except OSError as error:
            files = ", ".join(str(path) for path in (self.certfile, self.keyfile, self.ca_certs) if path is not None)
            raise InvalidConfig(f"cannot use {files} for TLS: {error}; expected PEM files") from error

    def options(self) -> dict[str, Any]:
        """Return uvicorn's options."""
        return {
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_ca_certs": None if self.ca_certs is None else str(self.ca_certs),
            "ssl_cert_reqs": ssl.CERT_NONE if self.ca_certs is None else ssl.CERT_REQUIRED,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server listens: on a host and port, or on a Unix socket.

    Attributes:
        host: an address, or a name of one.
        port: 0 takes a free one.
        uds: the path of a Unix socket, which takes the place of host and port.
        tls: None for plain HTTP.
    """

    host: str
    port: int
    uds: Path | None = None
    tls: Tls | None = None

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can reach it."""
        return self.uds is not None or is_loopback(self.host)

    def url(self, port: int | None) -> str:
        """Return where OpenAI's clients find it, given the port that it got."""
        if self.uds is not None:
            return f"unix:{self.uds}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{port}/v1"


def tls_of(certfile: Path | None, keyfile: Path | None, ca_certs: Path | None) -> Tls | None:
    """Return what the options of the command line ask for; None if it is plain HTTP.

    Raises:
        InvalidConfig: if there is no certificate for the others, or a file cannot be used.
    """
    if certfile is not None:
        return Tls(certfile=certfile, keyfile=keyfile, ca_certs=ca_certs)
    if keyfile is not None or ca_certs is not None:
        raise InvalidConfig("--ssl-keyfile and --ssl-ca-certs go with --ssl-certfile; give it too")
    return None
