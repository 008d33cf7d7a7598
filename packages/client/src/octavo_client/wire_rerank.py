"""The pydantic models of /v1/rerank and /v1/score: how well texts fit a query, or each other."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from octavo_client.wire import Pooling, _Answer, _Body

__all__ = [
    "DocumentText",
    "RerankRequest",
    "RerankResponse",
    "RerankResult",
    "RerankUsage",
    "ScoreData",
    "ScoreRequest",
    "ScoreResponse",
    "ScoreUsage",
]

_MAX_TEXTS = 2048


class DocumentText(BaseModel):
    """A document as an object, as Jina and Cohere have it."""

    model_config = ConfigDict(frozen=True)

    text: str = Field(min_length=1, description="The document.")


class _Scored(_Body):
    """What both requests have in common."""

    model: str | None = Field(
        default=None, description="The model whose embeddings are compared. Default: the only one."
    )
    pooling: Pooling | None = Field(
        default=None, description="How one vector is made of a text's tokens. Default: last."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        le=2**31 - 1,
        description="Keep this many tokens of each text's end at most; -1 keeps what the context has room for. "
        "Default: all, or an error.",
    )
    priority: int | None = Field(
        default=None, ge=-(2**31), le=2**31 - 1, description="A lower value runs earlier. Default: 0."
    )
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Share cached prefixes only with requests of the same salt. Default: no salt.",
    )


class RerankRequest(_Scored):
    """The body of POST /v1/rerank: documents in the order of how well they fit a query; Jina's and Cohere's fields."""

    query: str = Field(min_length=1, description="What is looked for.")
    documents: list[str | DocumentText] = Field(
        min_length=1, max_length=_MAX_TEXTS - 1, description="The documents, as texts or objects with a text."
    )
    top_n: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="Return this many of the best. Default, and 0: all."
    )
    return_documents: bool | None = Field(
        default=None, description="Return each document with its score. Default: true."
    )

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class ScoreRequest(_Scored):
    """The body of POST /v1/score: one text with each of several, or texts in pairs; vLLM's fields, old and new.

    Raises:
        pydantic.ValidationError: not exactly one of `text_1` and `queries`, or of `text_2` and `documents`, is given;
            or the lists cannot be paired.
    """

    text_1: str | list[str] | None = Field(default=None, description="One text, or several.")
    text_2: str | list[str] | None = Field(
        default=None,
        description="What they are compared with: as many, or any number if the other side is one text.",
    )
    queries: str | list[str] | None = Field(default=None, description="Another name of text_1.")
    documents: str | list[str] | None = Field(default=None, description="Another name of text_2.")

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        for one, other in (("text_1", "queries"), ("text_2", "documents")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"exactly one of {one} and {other} was expected; give one")
        left, right = self.sides
        if not 0 < len(left) + len(right) <= _MAX_TEXTS or not all([*left, *right]) or not left or not right:
            raise ValueError(f"both sides must hold texts that are not empty, and at most {_MAX_TEXTS} together")
        if len(left) != len(right) and len(left) != 1:
            raise ValueError(
                f"one text is compared with several, or as many with as many; {len(left)} and {len(right)} came"
            )
        return self

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The texts on either side."""
        left, right = self.text_1 or self.queries or [], self.text_2 or self.documents or []
        return [left] if isinstance(left, str) else left, [right] if isinstance(right, str) else right


class RerankUsage(_Answer):
    """The tokens of a rerank request."""

    prompt_tokens: int = Field(ge=0, description="Tokens of the query and the documents, each text once.")
    total_tokens: int = Field(ge=0, description="The same.")


class RerankResult(_Answer):
    """A document and how well it fits."""

    index: int = Field(ge=0, description="Its place in the request.")
    relevance_score: float = Field(description="See score_type of the answer.")
    document: DocumentText | None = Field(default=None, description="It, unless return_documents was false.")


class RerankResponse(_Answer):
    """The answer of POST /v1/rerank."""

    id: str = Field(description="Of the answer.")
    model: str = Field(description="The model whose embeddings were compared.")
    score_type: Literal["cosine_similarity"] = Field(
        default="cosine_similarity", description="What a score is: the cosine of two embeddings, from -1 to 1."
    )
    usage: RerankUsage
    results: list[RerankResult] = Field(description="Best first; equal scores in the order of the request.")


class ScoreUsage(_Answer):
    """The tokens of a score request."""

    prompt_tokens: int = Field(ge=0, description="Tokens of all texts, each once.")
    completion_tokens: int = Field(default=0, ge=0, description="None are generated.")
    total_tokens: int = Field(ge=0, description="The same as prompt_tokens.")


class ScoreData(_Answer):
    """How alike the texts of a pair are."""

    index: int = Field(ge=0, description="Of the pair.")
    object: Literal["score"] = "score"
    score: float = Field(description="See score_type of the answer.")


class ScoreResponse(_Answer):
    """The answer of POST /v1/score."""

    id: str = Field(description="Of the answer.")
    object: Literal["list"] = "list"
    created: int = Field(description="When, as Unix time in seconds.")
    model: str = Field(description="The model whose embeddings were compared.")
    score_type: Literal["cosine_similarity"] = Field(
        default="cosine_similarity", description="What a score is: the cosine of two embeddings, from -1 to 1."
    )
    data: list[ScoreData] = Field(description="One for each pair, in order.")
    usage: ScoreUsage
