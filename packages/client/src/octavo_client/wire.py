"""The pydantic models of everything in Octavo's HTTP interface that OpenAI's own types do not have.

The server validates requests with these classes and builds its answers from them; the client sends and returns them.
The prefix cache's are in `wire_cache`, the server's state in `wire_server`.
This module imports pydantic alone: neither the openai SDK nor an HTTP library.

`Extras` and `EmbeddingExtras` refuse unknown fields, so that a misspelt name is found where it was typed; a server
that inherits its request models from them says `model_config = ConfigDict(extra="ignore")`. All other models ignore
unknown fields, so that either side may be the newer one.
"""

from collections.abc import KeysView
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

__all__ = [
    "DetokenizeRequest",
    "DetokenizeResponse",
    "EmbeddingExtras",
    "Extras",
    "Pooling",
    "ReleasedRequest",
    "StructuredOutputs",
    "TokenId",
    "TokenizeRequest",
    "TokenizeResponse",
]

TokenId: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A token's number in the vocabulary; whether it is inside the model's vocabulary is for the server to say."""

Pooling: TypeAlias = Literal["last", "mean"]
"""How the hidden states of a text become one vector: the last token's, or the mean over all tokens."""

_TIMEOUT = "Seconds after which the server gives the request up with status 504. Default: the server's own limit."


class _Body(BaseModel):
    """Fields for a request's JSON body that can stand where the openai SDK takes a mapping.

    The SDK merges `extra_body` with `{**body, **extra_body}`, which asks an object for `keys()` and items. Both answer
    with the fields that were set, so an instance is a valid `extra_body` in every method, of any openai client.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    def keys(self) -> KeysView[str]:
        """Return the names of the fields that were set."""
        return self.body().keys()

    def __getitem__(self, name: str) -> JsonValue:
        return self.body()[name]

    def body(self) -> dict[str, JsonValue]:
        """Return the fields that were set, as JSON values; a field set to None is there as null."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)


class StructuredOutputs(_Body):
    """What the text of an answer must look like: exactly one field is set; the names are vLLM's.

    OpenAI's `response_format` says the same for JSON. Give it as `Extras(structured_outputs=StructuredOutputs(...))`.

    Raises:
        pydantic.ValidationError: a field is unknown, or not exactly one is set.
    """

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, JsonValue] | bool | str | None = Field(
        default=None, alias="json", description="A JSON Schema, or its text. The answer is compact JSON that fits it."
    )
    json_object: bool | None = Field(default=None, description="Any JSON object.")
    regex: str | None = Field(default=None, description="The whole text matches this regular expression (Rust syntax).")
    choice: list[str] | None = Field(default=None, description="The text is one of these.")
    grammar: str | None = Field(default=None, description="A Lark grammar in llguidance's dialect, or GBNF.")
    structural_tag: dict[str, JsonValue] | str | None = Field(
        default=None,
        description="Free text in which tags hold JSON: an object with structures and triggers, or its text.",
    )
    whitespace_pattern: str | None = Field(
        default=None,
        description="With json or json_object: a regular expression of what may stand between the parts of JSON. "
        "Default: nothing may.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in self.keys() - {"whitespace_pattern"} if self[name] not in (None, False)]
        if len(given) != 1 and self.json_ is not False:
            found = ", ".join(sorted(given)) or "none"
            raise ValueError(
                f"expected exactly one of json, json_object, regex, choice, grammar, structural_tag; {found} came"
            )
        return self


class Extras(_Body):
    """Fields of a chat or text completion beyond OpenAI's own, under the names that vLLM's users know.

    Pass it as `extra_body=Extras(top_k=40)`. Only fields that were set are sent; for the others the server's defaults
    hold, which each description names.

    Raises:
        pydantic.ValidationError: a field is unknown or out of its bounds.
    """

    model_config = ConfigDict(extra="forbid")

    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=2**31 - 1,
        description="Sample from the k most probable tokens only; 0 or -1 considers all. Default: all.",
    )
    min_p: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Drop tokens whose probability is below min_p times that of the most probable one. Default: 0.",
    )
    typical_p: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Keep the tokens whose surprise is nearest to the expected one, up to this probability mass. "
        "Default: 1, off.",
    )
    xtc_probability: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="How often all tokens of at least xtc_threshold but the least likely of them are removed. "
        "Default: 0, off.",
    )
    xtc_threshold: float | None = Field(
        default=None, gt=0.0, le=1.0, description="The probability from which XTC removes tokens. Default: 0.1."
    )
    mirostat_mode: int | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Keep the surprise of tokens near mirostat_tau by feedback, in version 1 or 2. Default: 0, off.",
    )
    mirostat_tau: float | None = Field(
        default=None, gt=0.0, le=100.0, description="With mirostat: the surprise aimed at, in bits. Default: 5."
    )
    mirostat_eta: float | None = Field(
        default=None, gt=0.0, le=1.0, description="With mirostat: how fast it learns. Default: 0.1."
    )
    dry_multiplier: float | None = Field(
        default=None,
        ge=0.0,
        le=100.0,
        description="Penalise tokens that would prolong a repetition (DRY): this times dry_base to the power of its "
        "length beyond dry_allowed_length. Default: 0, off.",
    )
    dry_base: float | None = Field(default=None, ge=1.0, le=100.0, description="See dry_multiplier. Default: 1.75.")
    dry_allowed_length: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="The shortest repetition that is penalised, in tokens. Default: 2.",
    )
    dry_sequence_breakers: list[str] | None = Field(
        default=None,
        max_length=1024,
        description="Texts that no repetition spans. Default: newline, colon, quotation mark, asterisk.",
    )
    allowed_token_ids: list[TokenId] | None = Field(
        default=None, min_length=1, description="The only token ids that may be generated. Default: all."
    )
    bad_words: list[str] | None = Field(
        default=None,
        max_length=1024,
        description="Texts that must not be generated, at the start of a word or within a sentence. Default: none.",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Report the prompt's log-probabilities with this many alternatives a token; not in a stream. "
        "Default: none.",
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        le=2**31 - 1,
        description="Keep this many tokens of the prompt's end at most; -1 keeps what the context has room for. "
        "Default: all, or an error.",
    )
    return_token_ids: bool | None = Field(
        default=None, description="Return token_ids with each choice, and prompt_token_ids. Default: false."
    )
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Name tokens in logprobs as token_id:5, not by their text. Default: false."
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0.0,
        le=10.0,
        description="Divide positive and multiply negative logits of tokens that occurred in the prompt or the output; "
        "above 1 discourages repetition. Default: 1, off.",
    )
    min_tokens: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="Generate at least this many tokens before an end token or a stop id may end the output. "
        "Default: 0.",
    )
    ignore_eos: bool | None = Field(
        default=None,
        description="Go on after the model's end token, up to the token limit; for load tests. Default: false.",
    )
    stop_token_ids: list[TokenId] | None = Field(
        default=None,
        max_length=1024,
        description="End the output when one of these token ids is generated. Default: none.",
    )
    include_stop_str_in_output: bool | None = Field(
        default=None,
        description="Keep the stop string that ended the output in its text. Default: false.",
    )
    skip_special_tokens: bool | None = Field(
        default=None,
        description="Leave the tokenizer's special tokens out of the text. Default: true.",
    )
    use_beam_search: bool | None = Field(
        default=None,
        description="Search for the likeliest answers with best_of (or else n) beams and return n of them, best first. "
        "Default: false.",
    )
    length_penalty: float | None = Field(
        default=None,
        ge=-10.0,
        le=10.0,
        description="With beams: a hypothesis scores its log-probability divided by its length to this power; above 0 "
        "favours long ones. Default: 1.",
    )
    early_stopping: bool | Literal["never"] | None = Field(
        default=None,
        description="With beams: stop once there are as many hypotheses as beams (true), when the best beam scores no "
        "better than they do (false), or when no beam ever could (never). Default: false.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None,
        description="Hold the text to a JSON Schema, a regular expression, choices, a grammar or structural tags. "
        "Default: free text.",
    )
    keep: bool | None = Field(
        default=None,
        description="Keep the answer's tokens, and its part of the cache while there is room, so that later requests "
        "can go on from any of its tokens. Default: false.",
    )
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="Chats: further variables of the model's chat template. Default: none."
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="Chats: end the prompt with the header of the answer. Default: true, if the last message is "
        "not to go on.",
    )
    continue_final_message: bool | None = Field(
        default=None, description="Chats: let the answer go on from the last message. Default: false."
    )
    parent_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Text completions: go on from a request that runs or was kept, by the id of its answer; with "
        "several prompts followed by a hyphen and the prompt's number. A prompt follows the parent's tokens. "
        "Default: none.",
    )
    parent_index: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="Which of the parent's choices to go on from. Default: 0."
    )
    branch_at: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="How many of the parent's output tokens to take over; 0 goes on from its prompt. Default: all.",
    )
    priority: int | None = Field(
        default=None,
        ge=-(2**31),
        le=2**31 - 1,
        description="Order of scheduling: a lower value runs earlier, equal ones in order of arrival. Default: 0.",
    )
    timeout: float | None = Field(default=None, gt=0.0, description=_TIMEOUT)
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Share cached prefixes only with requests of the same salt. Default: no salt.",
    )


class EmbeddingExtras(_Body):
    """Fields of an embeddings request beyond OpenAI's own; pass it as `extra_body=EmbeddingExtras(pooling="mean")`."""

    model_config = ConfigDict(extra="forbid")

    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Share cached prefixes only with requests of the same salt. Default: no salt.",
    )
    timeout: float | None = Field(default=None, gt=0.0, description=_TIMEOUT)
    pooling: Pooling | None = Field(
        default=None,
        description="How one vector is made of a text's tokens. Default: last.",
    )


class TokenizeRequest(_Body):
    """The body of POST /tokenize: a prompt, or chat messages to be laid out by the model's template first.

    Raises:
        pydantic.ValidationError: not exactly one of `prompt` and `messages` is given.
    """

    model: str | None = Field(default=None, description="The model whose tokenizer is used. Default: the only one.")
    prompt: str | None = Field(default=None, description="The text to tokenise; may be empty.")
    messages: list[dict[str, JsonValue]] | None = Field(
        default=None,
        min_length=1,
        description="Chat messages in OpenAI's form; the model's chat template makes the text.",
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Add what the tokenizer adds around a text, such as a begin token. Default: true for a prompt, "
        "false for messages, whose template writes them.",
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="End the messages with the opening of the assistant's answer. Default: true. Messages only.",
    )
    continue_final_message: bool | None = Field(
        default=None, description="End inside the last message, which an answer goes on from. Messages only."
    )
    tools: list[dict[str, JsonValue]] | None = Field(
        default=None, description="The functions that the conversation tells of, in OpenAI's form. Messages only."
    )
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="Further variables of the model's chat template. Messages only."
    )
    return_token_strs: bool | None = Field(default=None, description="Return each token's text too. Default: false.")

    @model_validator(mode="after")
    def _check_one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise ValueError(f"exactly one of prompt and messages was expected, {given} came; leave one out")
        for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
            if getattr(self, name) is not None and self.messages is None:
                raise ValueError(f"{name} goes with messages, prompt came; leave it out")
        return self


class _Answer(BaseModel):
    """A server's answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class TokenizeResponse(_Answer):
    """The answer of POST /tokenize."""

    count: int = Field(ge=0, description="The number of tokens.")
    max_model_len: int = Field(ge=1, description="The longest sequence that the model takes, in tokens.")
    tokens: list[TokenId] = Field(description="The token ids.")
    token_strs: list[str] | None = Field(default=None, description="Each token's text, if return_token_strs was true.")


class DetokenizeRequest(_Body):
    """The body of POST /detokenize."""

    model: str | None = Field(default=None, description="The model whose tokenizer is used. Default: the only one.")
    tokens: list[TokenId] = Field(description="The token ids to turn into text; may be empty.")


class DetokenizeResponse(_Answer):
    """The answer of POST /detokenize."""

    prompt: str = Field(description="The text of the tokens.")


class ReleasedRequest(_Answer):
    """The answer of DELETE /v1/requests/{id}; for an answer that is not kept the status is 404."""

    id: str = Field(description="The id of the answer that was kept.")
    object: Literal["request.released"] = Field(default="request.released", description="What the answer is about.")
    released: Literal[True] = Field(default=True, description="That it is kept no more.")
