"""The pydantic models of a request's timeline: why it waited, what was computed when, what it had to give up."""

from typing import Literal

from pydantic import Field

from octavo_client.wire import _Answer

__all__ = [
    "RequestTimeline",
    "TimelineCached",
    "TimelineChoice",
    "TimelineChunk",
    "TimelinePreemption",
    "TimelineWait",
]


class TimelineWait(_Answer):
    """A stay of one of the request's sequences in the queue."""

    index: int = Field(ge=0, description="The sequence: the number of its choice.")
    start: float = Field(ge=0, description="When it began, in seconds since the request came.")
    seconds: float = Field(ge=0, description="How long it was, or is so far.")
    ended: bool = Field(description="False while it lasts.")
    reasons: dict[str, float] = Field(
        description="The seconds by what kept the queue from moving: step (one was under way), rows (max_num_seqs), "
        "blocks (the KV cache), token_budget (max_num_batched_tokens)."
    )


class TimelineChunk(_Answer):
    """Tokens of a prompt, or of a sequence that resumes, that one step computed together."""

    index: int = Field(ge=0, description="The sequence.")
    start: float = Field(ge=0, description="When the step was submitted, in seconds since the request came.")
    seconds: float | None = Field(default=None, description="Until its answer; null while it is in flight.")
    tokens: int = Field(ge=0, description="How many.")
    resumes: bool = Field(description="Whether the sequence came back after a preemption with it.")


class TimelinePreemption(_Answer):
    """A sequence lost its place to others."""

    index: int = Field(ge=0, description="The sequence.")
    start: float = Field(ge=0, description="When, in seconds since the request came.")
    kind: Literal["recompute", "swap"] = Field(description="Whether its blocks were given up, or kept on the host.")


class TimelineChoice(_Answer):
    """The first token and the end of a choice."""

    index: int = Field(ge=0, description="The choice.")
    first_token: float | None = Field(default=None, description="In seconds since the request came.")
    finished: float | None = Field(default=None, description="The same; null while it runs.")
    finish_reason: str | None = Field(default=None, description="stop, length, abort or error.")
    tokens: int = Field(ge=0, description="Generated so far.")


class TimelineCached(_Answer):
    """Tokens of the prompt that were not computed, by where they were."""

    full: int = Field(ge=0, description="In whole blocks of the prefix cache.")
    partial: int = Field(ge=0, description="At the beginning of one more block.")
    fork: int = Field(ge=0, description="With the request's parent.")


class RequestTimeline(_Answer):
    """The answer of GET /v1/requests/{id}/timeline."""

    id: str = Field(
        description="Of the request: that of its answer, with a hyphen and a number if it has several prompts."
    )
    object: Literal["request.timeline"] = "request.timeline"
    state: Literal["waiting", "running", "finished"] = Field(description="Where it stands.")
    arrival: float = Field(description="When it came to the engine, as Unix time in seconds.")
    grammar_seconds: float = Field(ge=0, description="What compiling its grammar took before it came.")
    prompt_tokens: int = Field(ge=0, description="Tokens of its prompt.")
    cached_tokens: TimelineCached = Field(description="Those of them that were cached when it was first admitted.")
    waiting_before: int = Field(ge=0, description="Sequences in the queue when it came.")
    waits: list[TimelineWait] = Field(description="In the order of their ends.")
    chunks: list[TimelineChunk] = Field(description="What was computed of its prompt, or again.")
    preemptions: list[TimelinePreemption] = Field(description="In order.")
    choices: list[TimelineChoice] = Field(description="Those that have a token or an end.")
    omitted: int = Field(default=0, ge=0, description="Waits, chunks and preemptions beyond 256 of a kind.")
