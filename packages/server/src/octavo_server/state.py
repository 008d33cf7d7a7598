"""What the routes of one app share."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version

from starlette.requests import Request

from octavo_engine.api import EngineClient
from octavo_server.admission import Admission
from octavo_server.config import MAX_CHOICES_PER_PROMPT, ServerSettings
from octavo_server.drain import Drain
from octavo_server.errors import ApiError
from octavo_server.metrics import Metrics
from octavo_server.protocol.violations import summarise


@dataclass(frozen=True, slots=True, eq=False)
class ServerState:
    """One app's engine and what belongs to it; fixed after the start."""

    engine: EngineClient
    settings: ServerSettings
    metrics: Metrics
    admission: Admission
    drain: Drain
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def build(cls, engine: EngineClient, settings: ServerSettings) -> ServerState:
        """Make the state of an app."""
        metrics = Metrics(engine)
        admission = Admission(settings.max_num_requests, lambda: metrics.reject("overloaded"))
        return cls(engine, settings, metrics, admission, Drain(lambda: metrics.reject("shutting_down")))

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may use."""
        return self.settings.served_model_names or (self.engine.info.model_name,)

    @property
    def max_n(self) -> int:
        """The most choices of one prompt."""
        return min(MAX_CHOICES_PER_PROMPT, self.engine.info.max_num_seqs)

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: the same as long as the same software serves the same model."""
        info = self.engine.info
        computed = (info.dtype, info.kv_dtype, info.mode, info.device, info.kernel_backend)
        parts = (_own_version(), info.model_name, info.weights_digest, *computed, str(info.deterministic))
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that a model's name stands for; None for the base model, or a name that is not served."""
        if model in self.model_names:
            return None
        return next((info.name for info in self.engine.adapters() if info.name == model), None)

    def resolve_model(self, name: str | None) -> str:
        """Return the name under which a request is answered; none means the model that is served.

        Raises:
            ApiError: 404 if no model of this name is served.
        """
        if name is None:
            return self.model_names[0]
        if name not in self.model_names and self.adapter_of(name) is None:
            known = (*self.model_names, *(info.name for info in self.engine.adapters()))
            raise ApiError(
                404,
                f"the model {summarise(name)} does not exist; this server has {', '.join(known)}",
                param="model",
                code="model_not_found",
            )
        return name


@cache
def _own_version() -> str:
    return version("octavo-server")  # reads a file, and every answer needs it


def state_of(request: Request) -> ServerState:
    """Return the state of the app that serves a request."""
    state: ServerState = request.app.state.server
    return state
