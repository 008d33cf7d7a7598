"""The body of POST /update_weights_from_disk, and the queries of POST /sleep and POST /wake_up."""

from __future__ import annotations

from typing import cast, get_args

from starlette.datastructures import QueryParams

from octavo_client.wire_admin import SleepLevel, SleepMode, SleepTag, UpdateWeightsRequest
from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.body import BODY_CONFIG
from octavo_server.protocol.violations import summarise


class UpdateWeightsBody(UpdateWeightsRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG


def sleep_query(query: QueryParams) -> tuple[SleepLevel, SleepMode | None]:
    """Return the level and the mode of a sleep.

    Raises:
        InvalidRequest: names the one that is wrong.
    """
    given, mode = query.get("level", "1"), query.get("mode")
    levels = {str(level): level for level in get_args(SleepLevel)}
    if given not in levels:
        raise InvalidRequest(f"level must be one of {', '.join(levels)}, got {summarise(given)}", param="level")
    if mode is not None and mode not in get_args(SleepMode):
        raise InvalidRequest(f"mode must be wait or abort, or left out, got {summarise(mode)}", param="mode")
    return levels[given], cast("SleepMode | None", mode)


def wake_query(query: QueryParams) -> list[SleepTag] | None:
    """Return the parts to wake, given one by one or with commas between them; None for all.

    Raises:
        InvalidRequest: if there is no such part.
    """
    tags = [tag for given in query.getlist("tags") for tag in given.split(",")]
    for tag in tags:
        if tag not in get_args(SleepTag):
            raise InvalidRequest(f"tags must be weights or kv_cache, got {summarise(tag)}", param="tags")
    return cast("list[SleepTag]", tags) or None
