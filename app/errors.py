"""Errors of requests, as one tree; each has its HTTP status and a message that tells the caller what to do.

AppError
├── InvalidRequest          400  the request is wrong; `param` names the member
│   └── UnsupportedParameter     known, but ignoring it would give a wrong picture
├── Unauthorized            401
├── Forbidden               403
├── NotFound                404  ModelNotFound for a model
├── MethodNotAllowed        405
├── NotAcceptable           406
├── RequestTimeout          408  the body came too slowly
├── Conflict                409  Canceled for a job that somebody stopped
├── Gone                    410
├── PayloadTooLarge         413
├── UnsupportedMediaType    415
├── RangeNotSatisfiable     416
├── KeyReused               422  also TooManyPictures, as AUTOMATIC1111's clients expect; nothing else
├── RateLimited             429  too many requests of this key
├── ClientGone              499  for the log only: nobody reads the answer
├── GenerationFailed        500  OutOfMemory, ModelUnusable
├── DamagedFile             500  a file on disk is not what was written
├── SigningFailed           500  a picture is not given out without its credentials
├── Overloaded              503  ModelLoading, ShuttingDown
├── TimedOut                504
├── StorageFull             507  temporary, so it says when to try again; StorageAway (503) for a bucket
└── JobFailed               the stored error that ended a job

Not for callers: QueueFull, which says how many jobs wait, and which the dispatcher turns into Overloaded;
DeviceGone, after which an engine process is useless; and SettingsError, which is for the operator.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus

RESTART_SECONDS = 5
ROOM_SECONDS = 30  # until somebody may have made room on a disk
DO_NOT_REPEAT = {"x-should-retry": "false"}  # the OpenAI SDKs repeat every 5xx unless told this


class AppError(Exception):
    """The root: raised itself only for a status that no class below has."""

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        places: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.headers = dict(headers or {})
        self.places = tuple(places)  # (JSON pointer, what is wrong there), when there may be several

    @property
    def title(self) -> str:
        """Reason phrase of the status, such as "Bad Request"."""
        return HTTPStatus(self.status).phrase if self.status != 499 else "Client Closed Request"


class InvalidRequest(AppError):
    """Something in the request is wrong; `message` says what is allowed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A known member that this server cannot honour; ignoring it would give a wrong picture."""

    code = "unsupported_parameter"


class Unauthorized(AppError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": 'Bearer realm="images"'})


class Forbidden(AppError):
    """A valid request that the caller may not make, such as one with a wrong signature."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(AppError):
    """No such path or resource."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(AppError):
    """No such model here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class MethodNotAllowed(AppError):
    """The path exists, but not with this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class NotAcceptable(AppError):
    """No form of the answer that `Accept` allows can be given."""

    status = 406
    type = "invalid_request_error"
    code = "not_acceptable"


class RequestTimeout(AppError):
    """The body did not come in time."""

    status = 408
    type = "invalid_request_error"
    code = "timeout"


class Conflict(AppError):
    """The resource is not in a state that allows this."""

    status = 409
    type = "conflict_error"
    code = "conflict"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=DO_NOT_REPEAT)


class Canceled(Conflict):
    """Somebody stopped the job that this caller waited for."""

    code = "canceled"


class Gone(AppError):
    """The resource has expired."""

    status = 410
    type = "not_found_error"
    code = "expired"


class PayloadTooLarge(AppError):
    """The body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class UnsupportedMediaType(AppError):
    """The body is of a type that this path does not read."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RangeNotSatisfiable(AppError):
    """The range lies outside the file."""

    status = 416
    type = "invalid_request_error"
    code = "invalid_value"


class KeyReused(AppError):
    """The idempotency key was used before, with another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class TooManyPictures(InvalidRequest):
    """More pictures than the operator allows, with the status that A1111's clients expect."""

    status = 422
    code = "integer_out_of_range"


class RateLimited(AppError):
    """The key has sent too many requests."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


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
    """The picture does not fit into the memory of the device."""

    code = "out_of_memory"


class ModelUnusable(GenerationFailed):
    """The model could not be loaded; the operator has to act."""

    code = "internal_error"


class DamagedFile(AppError):
    """A stored picture is not what was written; it is not served."""

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=DO_NOT_REPEAT)


class SigningFailed(AppError):
    """A picture could not be signed; it is not given out without its credentials."""

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=DO_NOT_REPEAT)


class Overloaded(AppError):
    """The server cannot take a request now; it should be able to after `retry_after_seconds`."""

    status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_seconds)})


class QueueFull(Exception):
    """The store refused a job, because `num_queued` are waiting already."""

    def __init__(self, num_queued: int) -> None:
        jobs = "job is" if num_queued == 1 else "jobs are"
        super().__init__(f"{num_queued} {jobs} waiting already")
        self.num_queued = num_queued


class DeviceGone(Exception):
    """The device returns nothing but errors; a new process may be able to use it."""


class ModelLoading(Overloaded):
    """The server is up, but its model is not loaded yet."""

    code = "model_loading"


class ShuttingDown(Overloaded):
    """The server is stopping and takes no more work; another one should be up in a few seconds."""

    def __init__(
        self, message: str = "the server is stopping", *, retry_after_seconds: int = RESTART_SECONDS
    ) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)


class TimedOut(AppError):
    """The picture was not ready within the time limit of the server or the job."""

    status = 504
    code = "timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=DO_NOT_REPEAT)


class StorageFull(AppError):
    """No disk space for inputs or pictures. Nothing was accepted, or what was accepted is not lost."""

    status = 507
    code = "insufficient_storage"

    retry_after_seconds = ROOM_SECONDS

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message, headers={"Retry-After": str(self.retry_after_seconds)})
        self.reason = reason or message  # for the operator's log


class StorageAway(StorageFull):
    """The bucket of pictures is away or refuses us. Until it is back, it is as if there were no room."""

    status = 503
    code = "overloaded"
    retry_after_seconds = RESTART_SECONDS


class JobFailed(AppError):
    """The error that a job ended with; the same request would fail in the same way again."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message, code=code, headers=DO_NOT_REPEAT)
        self.status = status
        self.type = "server_error" if status >= 500 else "invalid_request_error"


class SettingsError(ValueError):
    """A setting is wrong; the message has one line per mistake and no secret."""
