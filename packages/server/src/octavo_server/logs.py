"""Logs: how records are written, as text or as JSON, and the one line that each request gets."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from octavo_engine.errors import InvalidConfig
from octavo_server.config import FREE_ROUTES
from octavo_server.context import Answer
from octavo_server.exchange import EngineWork, current_exchange

LOG_FORMATS = ("text", "json")
REQUESTS = "octavo_server.requests"
"""The logger of requests."""

_FIELDS = "octavo_fields"  # of a record: what it says beside its message
_log = logging.getLogger(REQUESTS)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON: time, level, logger, message, the request it belongs to, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | dict(_fields(record)), ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Writes a record for people, with its fields at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the standard library's name
        """Return the line, without what a traceback adds."""
        shown = (f"{name}={_shown(value)}" for name, value in _fields(record) if value is not None)
        return " ".join((super().formatMessage(record), *shown))


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Write this program's log to standard error.

    Raises:
        InvalidConfig: if the level or the format is unknown.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise InvalidConfig(f"log_level {level!r} is not one of debug, info, warning, error")
    if log_format not in LOG_FORMATS:
        raise InvalidConfig(f"log_format {log_format!r} is not one of {', '.join(LOG_FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=number, handlers=[handler])


def request_logger(decode: Callable[[Sequence[int]], str] | None) -> Callable[[Answer], None]:
    """Return what logs each answer; given a way to read token ids, with the prompts."""

    def log(answer: Answer) -> None:
        level = logging.DEBUG if answer.route in FREE_ROUTES else logging.INFO
        if _log.isEnabledFor(level):
            fields = _answer_fields(answer)
            if decode is not None and answer.exchange.work:
                fields["prompts"] = [decode(work.request.prompt_token_ids) for work in answer.exchange.work]
            _log.log(level, "%s %s %d", answer.method, answer.route, answer.status, extra={_FIELDS: fields})

    return log


def _answer_fields(answer: Answer) -> dict[str, Any]:
    exchange = answer.exchange
    fields: dict[str, Any] = {
        "method": answer.method,
        "route": answer.route,
        "status": answer.status,
        "key": exchange.key and exchange.key.name,
        "duration": round(answer.seconds, 6),
    }
    if exchange.ended_by is not None:
        fields["ended_by"] = exchange.ended_by.code
    return fields | _work_fields(exchange.work, exchange.arrival) if exchange.work else fields


def _work_fields(work: Sequence[EngineWork], arrival: float) -> dict[str, Any]:
    """Say what the engine did; of several prompts the sums, the longest wait and the first token."""
    queued = [w.times.scheduled - w.times.arrival for w in work if w.times and w.times.scheduled is not None]
    firsts = [w.first_token - arrival for w in work if w.first_token is not None]
    return {
        "prompt_tokens": sum(len(w.request.prompt_token_ids) for w in work),
        "cached_tokens": sum(w.num_cached_tokens for w in work),
        "generated_tokens": sum(w.num_tokens for w in work),
        "queue_time": round(max(queued), 6) if queued else None,
        "time_to_first_token": round(min(firsts), 6) if firsts else None,
        "finish_reason": ",".join(dict.fromkeys(reason for w in work for reason in w.finish_reasons)) or None,
    }


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    exchange = current_exchange()
    if exchange is not None:
        yield "request_id", exchange.request_id
    yield from getattr(record, _FIELDS, {}).items()


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) and value != "" else str(value)
