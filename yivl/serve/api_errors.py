"""Exceptions to OpenAI's form of an error; a message reveals nothing about the inside of the server."""

from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from yivl.command_line import is_out_of_memory
from yivl.errors import ContextLengthError, ImageError, NonFiniteError, YiVLError
from yivl.serve.scheduler import Overloaded, ShuttingDown
from yivl.serve.schema import ErrorBody, ErrorResponse

_INVALID: Final = "invalid_request_error"
_TYPES: Final = dict.fromkeys((400, 404, 405, 408, 413, 415), _INVALID) | {
    401: "authentication_error",
    429: "rate_limit_error",
}
_MAX_PLACE: Final = 100  # characters; the client chooses the names of unknown parameters
_MAX_MESSAGE: Final = 200  # characters; some messages quote the client
_HEADERS: Final = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "5"}}


class APIError(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message=message, type=_TYPES.get(status, "server_error"), param=param, code=code)

    def response(self) -> Response:
        """Return the HTTP response."""
        return JSONResponse(ErrorResponse(error=self.body).model_dump(), self.status, headers=_HEADERS.get(self.status))


def as_api_error(error: Exception) -> APIError:
    """Return the response to an exception of any kind."""
    match error:
        case APIError():
            return error
        case HTTPException():
            return http_error(error.status_code)
        case RequestValidationError():
            return _validation_error(error)
        case ContextLengthError():
            return APIError(400, str(error), code="context_length_exceeded", param="messages")
        case ImageError():
            return APIError(400, str(error), code="invalid_image", param="messages")
        case NonFiniteError():
            return APIError(500, "the model computed values that are not finite", code="model_error")
        case YiVLError():
            return APIError(400, str(error))
        case ShuttingDown():
            return APIError(503, "the server is shutting down; try again in a while", code="shutting_down")
        case Overloaded():
            return APIError(429, "too many requests are waiting; try again in a while", code="overloaded")
        case TimeoutError():
            return APIError(504, "the answer took too long; ask for fewer tokens", code="timeout")
    if is_out_of_memory(error):
        return APIError(503, "not enough memory for this request; try again, or ask with less", code="out_of_memory")
    return APIError(500, "the server failed to answer")


def http_error(status: int) -> APIError:
    """Return the error of a status that no handler of ours explains."""
    texts = {
        404: "there is nothing here",
        405: "not with this method",
        408: "the request was sent too slowly",
        413: "the request is too large",
        429: "too many large requests; try again in a while",
    }
    return APIError(status, texts.get(status, "the request cannot be read"))


def _validation_error(error: RequestValidationError) -> APIError:
    errors = error.errors()
    # A content may be a text or a list, of which one is always wrong. The deepest error is of the one that was sent.
    told = [each for each in errors if each["type"] not in ("string_type", "list_type")] or errors
    first = max(told, key=lambda each: len(each["loc"]))
    place = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, str) or part.isidentifier())
    unknown = first["type"] == "extra_forbidden"
    message = "this parameter is not supported" if unknown else str(first["msg"])[:_MAX_MESSAGE]
    place = place[:_MAX_PLACE]
    return APIError(400, f"{place}: {message}" if place else message, param=place or None)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's form."""

    async def respond(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (APIError, YiVLError, Overloaded, TimeoutError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
