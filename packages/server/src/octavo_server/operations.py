"""The operations of the HTTP interface: for each route its body, its answer and its query, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from openai.types import Batch
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel

from octavo_client import wire, wire_adapters, wire_admin, wire_cache, wire_rerank, wire_server, wire_timeline
from octavo_server.protocol import answers
from octavo_server.protocol.adapters import LoadAdapterBody, UnloadAdapterBody
from octavo_server.protocol.admin import UpdateWeightsBody
from octavo_server.protocol.batches import BatchBody
from octavo_server.protocol.cache import CachePinBody, CacheWarmBody
from octavo_server.protocol.chat import ChatBody
from octavo_server.protocol.completions import CompletionBody
from octavo_server.protocol.embeddings import EmbeddingBody
from octavo_server.protocol.generate import GenerateBody
from octavo_server.protocol.messages import CountBody, MessagesBody
from octavo_server.protocol.rerank import RerankBody, ScoreBody
from octavo_server.protocol.responses import ResponsesBody
from octavo_server.protocol.tokens import DetokenizeBody, TokenizeBody


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one route.

    Attributes:
        answer: of status 200; a string is a media type that is not JSON.
        body: of the request; None takes none, a JSON Schema is that of a form.
        query: the query's parameters, each with its JSON Schema; none is required.
        streams: whether the answer is a stream of events where the body asks for one.
        error: the body of every answer that is an error.
    """

    answer: type[BaseModel] | str
    body: type[BaseModel] | dict[str, Any] | None = None
    query: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    streams: bool = False
    error: type[BaseModel] = answers.ErrorBody


_PAGE: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer"},
    "after": {"type": "string"},
    "order": {"enum": ["asc", "desc"]},
}
_UPLOAD = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"]},
    },
    "required": ["file", "purpose"],
}
_SALT: dict[str, dict[str, Any]] = {"cache_salt": {"type": "string"}}
_SLEEP = {
    "level": {"enum": list(get_args(wire_admin.SleepLevel))},
    "mode": {"enum": list(get_args(wire_admin.SleepMode))},
}
_WAKE = {"tags": {"type": "array", "items": {"enum": list(get_args(wire_admin.SleepTag))}}}

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(body=ChatBody, answer=ChatCompletion, streams=True),
    ("POST", "/v1/completions"): Operation(body=CompletionBody, answer=answers.TextCompletion, streams=True),
    ("POST", "/v1/messages"): Operation(
        body=MessagesBody, answer=answers.Message, streams=True, error=answers.MessagesErrorBody
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        body=CountBody, answer=answers.TokenCount, error=answers.MessagesErrorBody
    ),
    ("POST", "/v1/embeddings"): Operation(body=EmbeddingBody, answer=answers.EmbeddingList),
    ("POST", "/v1/responses"): Operation(body=ResponsesBody, answer=Response, streams=True),
    ("POST", "/v1/responses/input_tokens"): Operation(body=ResponsesBody, answer=answers.InputTokens),
    ("GET", "/v1/responses/{response_id}"): Operation(
        answer=Response, streams=True, query={"stream": {"type": "boolean"}, "starting_after": {"type": "integer"}}
    ),
    ("DELETE", "/v1/responses/{response_id}"): Operation(answer=answers.Deleted),
    ("POST", "/v1/responses/{response_id}/cancel"): Operation(answer=Response),
    ("GET", "/v1/responses/{response_id}/input_items"): Operation(answer=answers.Listing, query=_PAGE),
    ("POST", "/v1/files"): Operation(body=_UPLOAD, answer=answers.File),
    ("GET", "/v1/files"): Operation(answer=answers.FileList, query=_PAGE | {"purpose": {"type": "string"}}),
    ("GET", "/v1/files/{file_id}"): Operation(answer=answers.File),
    ("GET", "/v1/files/{file_id}/content"): Operation(answer="application/octet-stream"),
    ("DELETE", "/v1/files/{file_id}"): Operation(answer=answers.Deleted),
    ("POST", "/v1/batches"): Operation(body=BatchBody, answer=Batch),
    ("GET", "/v1/batches"): Operation(answer=answers.BatchList, query=_PAGE),
    ("GET", "/v1/batches/{batch_id}"): Operation(answer=Batch),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation(answer=Batch),
    **{
        ("POST", path): Operation(body=RerankBody, answer=wire_rerank.RerankResponse)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    },
    **{("POST", path): Operation(body=ScoreBody, answer=wire_rerank.ScoreResponse) for path in ("/v1/score", "/score")},
    ("POST", "/generate"): Operation(body=GenerateBody, answer=answers.Generated, error=answers.GenerateErrorBody),
    ("POST", "/generate_stream"): Operation(
        body=GenerateBody, answer="text/event-stream", error=answers.GenerateErrorBody
    ),
    ("POST", "/"): Operation(
        body=GenerateBody, answer=answers.GeneratedList, streams=True, error=answers.GenerateErrorBody
    ),
    ("GET", "/info"): Operation(answer=answers.GenerateInfo),
    ("GET", "/v1/requests/{request_id}/timeline"): Operation(answer=wire_timeline.RequestTimeline),
    ("GET", "/v1/models"): Operation(answer=answers.ModelList),
    ("GET", "/v1/models/{model_id}"): Operation(answer=answers.ModelCard),
    ("DELETE", "/v1/requests/{request_id}"): Operation(answer=wire.ReleasedRequest),
    ("POST", "/v1/cache/warm"): Operation(body=CacheWarmBody, answer=wire_cache.CacheWarmResponse),
    ("POST", "/v1/cache/pins"): Operation(body=CachePinBody, answer=wire_cache.CachePin),
    ("GET", "/v1/cache/pins"): Operation(answer=wire_cache.CachePinList, query=_SALT),
    ("DELETE", "/v1/cache/pins/{pin_id}"): Operation(answer=wire_cache.CachePinDeleted, query=_SALT),
    ("POST", "/tokenize"): Operation(body=TokenizeBody, answer=wire.TokenizeResponse),
    ("POST", "/detokenize"): Operation(body=DetokenizeBody, answer=wire.DetokenizeResponse),
    ("POST", "/v1/load_lora_adapter"): Operation(body=LoadAdapterBody, answer=wire_adapters.Adapter),
    ("POST", "/v1/unload_lora_adapter"): Operation(body=UnloadAdapterBody, answer=wire_adapters.AdapterUnloaded),
    ("POST", "/sleep"): Operation(answer=wire_admin.MemoryReport, query=_SLEEP),
    ("POST", "/wake_up"): Operation(answer=wire_admin.MemoryReport, query=_WAKE),
    ("GET", "/is_sleeping"): Operation(answer=wire_admin.SleepState),
    ("POST", "/update_weights_from_disk"): Operation(body=UpdateWeightsBody, answer=wire_admin.MemoryReport),
    ("POST", "/reset_prefix_cache"): Operation(answer=wire_admin.PrefixCacheReset),
    ("GET", "/health"): Operation(answer=wire_server.Health),
    ("GET", "/ready"): Operation(answer=wire_server.Ready),
    ("GET", "/version"): Operation(answer=wire_server.Version),
    ("GET", "/metrics"): Operation(answer="text/plain"),
    ("GET", "/openapi.json"): Operation(answer=answers.OpenApi),
}
