"""The exceptions of the client: the openai SDK's own, under the same names, and three of ours.

    OpenAIError
      OctavoError                     what this package raises
        ConfigurationError            a constructor argument or an OCTAVO_* variable makes no sense; a ValueError too
        InvalidAnswerError            tokens or server got an answer that is not Octavo's
      APIError
        APIConnectionError            no answer came
          APITimeoutError
        APIResponseValidationError    an answer of an unexpected form
        APIStatusError                an answer of status 4xx or 5xx, with `status_code`, `code`, `param`, `request_id`
          BadRequestError             400
          AuthenticationError         401
          PermissionDeniedError       403
          NotFoundError               404
          ConflictError               409
          UnprocessableEntityError    422
          RateLimitError              429
          InternalServerError         500 and above

The SDK's classes are passed on as they are: `except openai.NotFoundError` catches what this client raises.
"""

from openai import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
    UnprocessableEntityError,
)

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "ConfigurationError",
    "ConflictError",
    "InternalServerError",
    "InvalidAnswerError",
    "NotFoundError",
    "OctavoError",
    "OpenAIError",
    "PermissionDeniedError",
    "RateLimitError",
    "UnprocessableEntityError",
]


class OctavoError(OpenAIError):
    """The base of the errors that this package itself raises."""


class ConfigurationError(OctavoError, ValueError):
    """A client cannot be made from the arguments or the environment; the message names the one at fault."""


class InvalidAnswerError(OctavoError):
    """A server answered with success, but not in Octavo's form: most likely `base_url` names another server."""
