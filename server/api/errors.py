"""The one place where errors become HTTP statuses, in OpenAI's shape.

Must not know: what raised them beyond their type. No message or log line carries a path or a secret of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from motet.adapters import errors as adapter_errors
from motet.server.api.body_limits import BodyRefusedError
from motet.server.api.inputs import InputError
from motet.server.api.scoring import ScoringError
from motet.server.api.turns import TurnError
from motet.server.heads.errors import HeadError


class ApiError(Exception):
    """An error a client can act on.

    Args:
        status: HTTP status.
        message: names the thing, the value, the limit and the remedy.
        code: stable, for programs.
        param: the request field at fault.
        retry_after_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request asks for something that cannot be honoured."""
    return ApiError(400, message, code=code, param=param)


INTERNAL = "internal error; the server's log has the traceback"

PUBLISH_RETRY_S = 5
"""Within it most adapters are loaded."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    423: "conflict_error",
    429: "rate_limit_error",
}

_ADAPTER_STATUS: tuple[tuple[type[adapter_errors.AdapterError], int, str], ...] = (
    (adapter_errors.VersionNotServedError, 404, "version_not_served"),
    (adapter_errors.AdapterNotFoundError, 404, "model_not_found"),
    (adapter_errors.SourceNotFoundError, 404, "adapter_source_not_found"),
    (adapter_errors.UnsafePathError, 403, "adapter_path_forbidden"),
    (adapter_errors.ForbiddenSourceError, 403, "adapter_source_forbidden"),
    (adapter_errors.InvalidSourceError, 400, "adapter_source_invalid"),
    (adapter_errors.SourceUnavailableError, 503, "adapter_source_unavailable"),
    (adapter_errors.StoreFullError, 507, "adapter_downloads_full"),
    (adapter_errors.SourceChangedError, 409, "adapter_source_changed"),
    (adapter_errors.VersionConflictError, 409, "version_conflict"),
    (adapter_errors.NameBusyError, 423, "publish_in_progress"),
    (adapter_errors.PublishesFullError, 429, "publishes_full"),
    (adapter_errors.AdapterFailedError, 503, "adapter_failed"),
    (adapter_errors.CatalogueError, 503, "catalogue_unavailable"),
    (adapter_errors.GoldenError, 400, "adapter_golden_mismatch"),
    (adapter_errors.GateError, 400, "gate_refused"),
    (adapter_errors.AdapterExistsError, 400, "adapter_exists"),
    (adapter_errors.ArenaFullError, 507, "adapter_memory_full"),
    (adapter_errors.HostFullError, 507, "host_memory_full"),
    (adapter_errors.AdapterError, 400, "adapter_refused"),
)


def from_adapter_error(error: adapter_errors.AdapterError, param: str | None = None) -> ApiError:
    """The HTTP form of an adapter error; the first row of the table that fits decides."""
    status, code = next((status, code) for kind, status, code in _ADAPTER_STATUS if isinstance(error, kind))
    if isinstance(error, adapter_errors.GateError):
        param = error.field
    passing = isinstance(error, adapter_errors.PublishesFullError | adapter_errors.SourceUnavailableError)
    retry_after_s = PUBLISH_RETRY_S if passing else None
    return ApiError(status, str(error), code=code, param=param, retry_after_s=retry_after_s)


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _field(error: Mapping[str, Any], body: Any) -> str | None:
    """The place of a validation error in the body, without pydantic's names for the types of a union."""
    named: list[str] = []
    for part in error["loc"][1:]:
        inside = (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int))
        if inside:
            body = body[part]
        if inside or (error["type"] == "missing" and part == error["loc"][-1]):
            named.append(str(part))
    return ".".join(named) or None


def install(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = error_body(error.status, error.message, error.code, error.param)
        return JSONResponse(body, error.status, headers)

    @app.exception_handler(adapter_errors.AdapterError)
    async def _adapter(request: Request, error: adapter_errors.AdapterError) -> JSONResponse:
        return await _api(request, from_adapter_error(error))

    @app.exception_handler(InputError)
    async def _input(request: Request, error: InputError) -> JSONResponse:
        return await _api(request, bad_request(str(error), error.field, "input_refused"))

    @app.exception_handler(TurnError)
    async def _turn(request: Request, error: TurnError) -> JSONResponse:
        return await _api(request, ApiError(429, str(error), code="merge_busy", retry_after_s=error.retry_after_s))

    @app.exception_handler(ScoringError)
    async def _scoring(request: Request, error: ScoringError) -> JSONResponse:
        return await _api(request, ApiError(500, str(error), code="generation_failed"))

    @app.exception_handler(HeadError)
    async def _head(request: Request, error: HeadError) -> JSONResponse:
        return await _api(request, ApiError(500, str(error), code="generation_failed"))

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of a value that may be of several types, the error found deepest is that of the type that was meant.
        first = max(error.errors(), key=lambda found: len(found["loc"]))
        param = _field(first, error.body)
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        if first["type"] == "extra_forbidden":
            message = f"unknown field {param!r}; it would change nothing here, so it is refused: remove it"
        return JSONResponse(error_body(400, message, "invalid_request", param), 400)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        code = error.code if isinstance(error, BodyRefusedError) else None
        return JSONResponse(error_body(error.status_code, str(error.detail), code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def _bug(_: Request, error: Exception) -> JSONResponse:  # noqa: ARG001 - the traceback goes to the log
        return JSONResponse(error_body(500, INTERNAL), 500)
