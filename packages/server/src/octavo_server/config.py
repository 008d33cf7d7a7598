"""How the HTTP server is set up, apart from its engine."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from octavo_engine.errors import InvalidConfig
from octavo_server.adapters import AdapterModule
from octavo_server.keys import ApiKey, KeyRing

FREE_ROUTES = frozenset({"/health", "/ready", "/version", "/metrics"})
"""What monitors ask: it needs no key, and is answered while the server drains."""

DRAIN_SECONDS = 25.0
"""In which requests may end once the server is to stop: Kubernetes waits 30 seconds by default."""

MAX_CHOICES_PER_PROMPT = 128
"""OpenAI's limit on `n`; an engine that runs fewer sequences lowers it."""

MAX_CHOICES = 2048
"""The most choices, over all prompts, that one HTTP request may ask for."""

_ABOVE_ZERO = (
    "max_num_requests",
    "max_body_bytes",
    "body_timeout",
    "request_timeout",
    "max_num_background",
    "max_file_bytes",
    "max_stored_bytes",
    "retention_days",
    "keep_alive",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What an operator may choose about the HTTP side.

    Attributes:
        served_model_names: names that requests may use for the model; the first is reported where none was given.
            Empty serves the engine's own name.
        api_keys: if not empty, every route but health, readiness, version and metrics needs one of them.
        named_keys: further ones, with names and limits.
        admin_api_key: the one that opens the admin routes, and all others; see `admin_only` for those without one.
        local_only: whether only programs of this machine can reach the server.
        max_num_requests: prompts that may run or wait at once; what comes beyond is answered with 503.
        max_body_bytes: the largest request body that is read.
        body_timeout: seconds within which a request's body must have come.
        request_timeout: seconds that a request may take, its answer included; None sets no limit, requests may.
        allowed_origins: web origins that browsers may call from; empty allows none.
        log_prompts: whether the log has the prompts of requests.
        max_num_background: lines of batches and background responses that run at once; the others wait.
        max_file_bytes: the largest file that is taken.
        max_stored_bytes: when the stored files have reached this, no further one is taken.
        retention_days: for so long stored responses and ended batches are kept, counted from their beginning.
        otlp_traces_endpoint: URL of a collector that traces are sent to, by OTLP over HTTP; None makes none.
        lora_dir: folder that adapters may be loaded from over HTTP; None allows none.
        lora_modules: adapters that are served from the start.
        keep_alive: seconds of silence in a stream after which a comment is sent, so that proxies keep it open.

    Raises:
        InvalidConfig: if a limit is not positive, a name or key is empty, or two keys are the same.
    """

    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    named_keys: tuple[ApiKey, ...] = ()
    admin_api_key: str | None = None
    local_only: bool = False
    max_num_requests: int = 1024
    max_body_bytes: int = 8 << 20
    body_timeout: float = 60.0
    request_timeout: float | None = None
    allowed_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None
    max_num_background: int = 16
    max_file_bytes: int = 512 << 20
    max_stored_bytes: int = 16 << 30
    retention_days: int = 30
    lora_dir: Path | None = None
    lora_modules: tuple[AdapterModule, ...] = ()
    keep_alive: float = 15.0

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidConfig(f"{name} must be above 0, got {value}")
        for name in ("served_model_names", "api_keys", "allowed_origins"):
            if not all(getattr(self, name)):
                raise InvalidConfig(f"{name} must not hold an empty string")
        if self.admin_api_key == "":
            raise InvalidConfig("admin_api_key must not be empty; leave it out for none")
        if self.otlp_traces_endpoint is not None:
            if not self.otlp_traces_endpoint.startswith(("http://", "https://")):
                raise InvalidConfig(f"otlp_traces_endpoint must be an http URL, got {self.otlp_traces_endpoint!r}")
            check_tracing()
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise InvalidConfig(f"lora_dir {str(self.lora_dir)!r} is no folder; give one that exists")
        self.key_ring()

    @property
    def has_keys(self) -> bool:
        """Whether callers need a key."""
        return bool(self.api_keys or self.named_keys)

    def key_ring(self) -> KeyRing:
        """Return all keys.

        Raises:
            InvalidConfig: if two have one name, or are the same.
        """
        unnamed = (ApiKey.of(f"key-{number}", key) for number, key in enumerate(dict.fromkeys(self.api_keys), 1))
        return KeyRing([*unnamed, *self.named_keys], self.admin_api_key)


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone; a name other than localhost is not taken so."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_tracing() -> None:
    """Check that OpenTelemetry is installed.

    Raises:
        InvalidConfig: if not; says what to install.
    """
    try:
        found = find_spec("opentelemetry.sdk.trace") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InvalidConfig("traces need OpenTelemetry; install it: pip install 'octavo-server[otel]'")
