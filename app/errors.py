"""What can go wrong at the door, one tree; each error knows its HTTP status and tells the caller what to do.

AppError
├── InvalidRequest          400  the request is wrong; `param` names the member
│   └── UnsupportedParameter     known, but ignoring it would give a wrong picture
├── Unauthorized            401
├── Forbidden               403
├── NotFound                404  ModelNotFound for a model
├── MethodNotAllowed        405
├── NotAcceptable           406
├── Gone                    410
├── PayloadTooLarge         413
├── UnsupportedMediaType    415
├── RangeNotSatisfiable     416
├── ClientGone              499  nobody reads the answer; it is for the log
├── GenerationFailed        500  OutOfMemory, ModelUnusable
├── Overloaded              503  ModelLoading, ShuttingDown
├── TimedOut                504
└── StorageFull             507
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar

DO_NOT_REPEAT = {"x-should-retry": "false"}  # the OpenAI SDKs repeat every 5xx unless told this


class AppError(Exception):
    """The root: never raised itself, except for a status that no class below stands for."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.headers = dict(headers or {})

    @property
    def title(self) -> str:
        """The words of the status, as in "Bad Request"."""
        return HTTPStatus(self.status).phrase if self.status != 499 else "Client Closed Request"


class InvalidRequest(AppError):
    """Something in the request is wrong; `message` says what is allowed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A member that this server knows but cannot serve, so that ignoring it would give a wrong picture."""

    code = "unsupported_parameter"


class Unauthorized(AppError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": 'Bearer realm="images"'})


class Forbidden(AppError):
    """A valid request by someone who may not make it, as with a signature that does not fit."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(AppError):
    """No such path or thing."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(AppError):
    """No such model here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class MethodNotAllowed(AppError):
    """The path exists, with other methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class NotAcceptable(AppError):
    """No form of the answer that `Accept` allows can be given."""

    status = 406
    type = "invalid_request_error"
    code = "not_acceptable"


class Gone(AppError):
    """It was here and its time is over."""

    status = 410
    type = "not_found_error"
    code = "expired"


class PayloadTooLarge(AppError):
    """The body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class UnsupportedMediaType(AppError):
    """The body is not of a kind that this path reads."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RangeNotSatisfiable(AppError):
    """The range lies outside the file."""

    status = 416
    type = "invalid_request_error"
    code = "invalid_value"


class ClientGone(AppError):
    """The caller closed the connection before the answer."""

    status = 499
    type = "invalid_request_error"
    code = "canceled"


class GenerationFailed(AppError):
    """The model could not make this picture, and would not when asked again."""

    code = "generation_failed"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=DO_NOT_REPEAT)


class OutOfMemory(GenerationFailed):
    """The picture does not fit the device."""

    code = "out_of_memory"


class ModelUnusable(GenerationFailed):
    """The model could not be loaded; the operator has to act."""

    code = "internal_error"


class Overloaded(AppError):
    """The queue is full; `retry_after_seconds` is when there should be room."""

    status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_seconds)})


class ModelLoading(Overloaded):
    """The server is up, its model not yet."""

    code = "model_loading"


class ShuttingDown(Overloaded):
    """The server is about to stop and takes no more work."""


class TimedOut(AppError):
    """The picture took longer than a waiting caller is made to wait."""

    status = 504
    code = "timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=DO_NOT_REPEAT)


class StorageFull(AppError):
    """No room to keep the picture."""

    status = 507
    code = "insufficient_storage"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=DO_NOT_REPEAT)
