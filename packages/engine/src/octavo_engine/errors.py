"""The errors this package raises for mistakes that a user, a file or a machine can make.

    Exception
    └── EngineError
        ├── InvalidConfig        (also ValueError)  an engine setting is out of range or contradicts another
        ├── ModelNotFound        no model under this name, path or hub id
        ├── CorruptModelFile     a model file is truncated, damaged or contradicts itself
        ├── UnsupportedModel     the file is sound, but we cannot run this architecture, tensor type or tokenizer
        ├── InvalidRequest       (also ValueError)  a request's value is wrong; names the parameter
        │   ├── PromptTooLong    the prompt does not fit the context
        │   ├── PinLimitReached  pins hold as much of the cache as they may
        │   ├── UnknownPin       no pin has this id
        │   ├── UnknownAdapter   no adapter has this name
        │   └── InvalidAdapter   an adapter's files cannot be read, or do not fit the model or its limits
        ├── RequestFailed        the engine could not compute this request; the others go on
        │   └── RequestLost      a process or machine with a part of the model was lost; it may be sent again
        ├── IncompatibleWeights  weights that were to replace others are of another model, or changed unasked
        ├── RankMismatch         processes that are to run one model together have other files or versions
        ├── WorkerLost           a process that holds a part of the model has ended, does not answer, or never joined
        │   └── RankUnreachable  its machine cannot be reached any more
        ├── ClusterFull          a cluster has no room for the processes that a model is split over
        ├── EngineInUse          what was asked for needs an idle engine, and this one is at work
        ├── EngineBusy           the engine could not take this request now; the same one may succeed later
        │   └── EngineAsleep     it sleeps, or is about to, or its weights are being replaced
        ├── EngineStuck          the engine makes no step though it should; it may go on
        └── EngineDead           the engine has stopped and serves nobody

The server maps this tree to HTTP in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo_engine.types import RequestOutput


class EngineError(Exception):
    """The root of every error that this package raises on purpose."""


class InvalidConfig(EngineError, ValueError):
    """An engine setting is out of range or contradicts another one."""


class ModelNotFound(EngineError):
    """No model was found under the name, path or hub id that was given."""


class CorruptModelFile(EngineError):
    """A model file is truncated, damaged, or contradicts itself."""


class UnsupportedModel(EngineError):
    """The model's files are sound, but this version cannot run them."""


class InvalidRequest(EngineError, ValueError):
    """A request holds a value that cannot be served.

    Args:
        message: What was expected, what came, and what to do.
        param: The request's parameter that is wrong, as the caller spells it; None if it is no single one.
        code: A short machine-readable word for the kind of mistake; None if there is none.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and the tokens asked for, do not fit the model's context."""

    def __init__(
        self, message: str, *, param: str | None = "prompt", code: str | None = "context_length_exceeded"
    ) -> None:
        super().__init__(message, param=param, code=code)


class PinLimitReached(InvalidRequest):
    """Pins would hold more blocks of the cache than they may; the message has the numbers."""

    def __init__(self, message: str, *, param: str | None = "prompt", code: str | None = "pin_limit_reached") -> None:
        super().__init__(message, param=param, code=code)


class UnknownPin(InvalidRequest):
    """No pin has this id, or it belongs to another salt."""

    def __init__(self, message: str, *, param: str | None = "pin_id", code: str | None = "pin_not_found") -> None:
        super().__init__(message, param=param, code=code)


class UnknownAdapter(InvalidRequest):
    """No adapter is served under this name."""

    def __init__(self, message: str, *, param: str | None = "model", code: str | None = "adapter_not_found") -> None:
        super().__init__(message, param=param, code=code)


class InvalidAdapter(InvalidRequest):
    """An adapter cannot be served: of another model, damaged, too large, or of a kind that is not supported."""

    def __init__(self, message: str, *, param: str | None = "lora_path", code: str | None = "invalid_adapter") -> None:
        super().__init__(message, param=param, code=code)


class RequestFailed(EngineError):
    """The engine could not compute this request; it goes on serving the others.

    Args:
        message: What happened.
        outputs: Of an offline batch, what came of each prompt, None for those that failed; empty elsewhere.
    """

    def __init__(self, message: str, outputs: Sequence[RequestOutput | None] = ()) -> None:
        super().__init__(message)
        self.outputs = outputs


class RequestLost(RequestFailed):
    """A process or a machine that had a part of the model was lost while the request ran; it may be sent again."""


class EngineBusy(EngineError):
    """The engine had no room for this request when it came; nothing of it was begun, and it may succeed later."""


class EngineAsleep(EngineBusy):
    """The engine takes no requests until it is woken, or until its weights have been replaced."""


class EngineInUse(EngineError):
    """Requests run, or an operation of the same kind does, and this one would disturb them; nothing was begun."""


class IncompatibleWeights(EngineError):
    """The files are sound, but not those of the model that is served: another shape, tokenizer or content."""


class RankMismatch(EngineError):
    """Processes that were to run one model together have different files, or different versions of the software."""


class WorkerLost(EngineError):
    """A process that holds a part of the model has ended, does not answer, or never joined; names it and the reason."""


class ClusterFull(EngineError):
    """A cluster has no room for the processes that a model is split over; says what they need and what is free."""


class RankUnreachable(WorkerLost):
    """A process that holds a part of the model may well live, but its machine has not answered for some seconds."""


class EngineStuck(EngineError):
    """The engine makes no step though it should; it may go on later, and until then takes no requests."""


class EngineDead(EngineError):
    """The engine has stopped; every request in flight and every later one ends with this error."""


_LOSSES = (WorkerLost.__name__, RankUnreachable.__name__)


def request_error(reason: str | None, otherwise: str) -> RequestFailed:
    """Return the error of a request that the engine could not compute.

    Args:
        reason: the name of an error and its text, as updates of sequences have it; None if it is not known.
        otherwise: the text in place of a reason.
    """
    kind = RequestLost if reason is not None and reason.partition(":")[0] in _LOSSES else RequestFailed
    return kind(reason or otherwise)
