"""Every setting of the server, and the only place that reads the environment (`CASCADE_*`)."""

import difflib
import ipaddress
import json
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.api_keys import ApiKey, parse_key
from app.errors import SettingsError

PREFIX = "CASCADE_"
MEBIBYTE = 1024 * 1024
DEFAULT_PORT = 8000
_LIBRARIES = Path("/usr/lib")
ONE_DEVICE = f"{PREFIX}DEVICE"  # accepted in place of CASCADE_DEVICES

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_HOST_NAME = re.compile(r"(?!.*:)(?![0-9./]+$)[A-Za-z0-9._-]{1,253}")


def _split(value: object) -> object:
    """Split comma-separated text into a tuple; return everything else unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _parse_networks(value: object) -> object:
    entries = _split(value)
    if not isinstance(entries, tuple | list):
        return entries
    return tuple(ipaddress.ip_network(entry) for entry in entries)


def _parse_receivers(value: object) -> object:
    entries = _split(value)
    if not isinstance(entries, tuple | list):
        return entries
    return tuple(_parse_receiver(entry) if isinstance(entry, str) else entry for entry in entries)


def _parse_receiver(entry: str) -> "Network | str":
    """Parse a network, an address, or the name of a host."""
    try:
        return ipaddress.ip_network(entry)
    except ValueError:
        if not _HOST_NAME.fullmatch(entry):
            raise ValueError(f"{entry!r} must be the name of a host, or a network as 10.0.0.0/8") from None
        return entry.lower().rstrip(".")


def _parse_keys(value: object) -> object:
    entries = _split(value)
    if not isinstance(entries, tuple | list):
        return entries
    return tuple(
        parse_key(entry, number) if isinstance(entry, str) else entry
        for number, entry in enumerate(entries, start=1)
    )


def _base_url(value: str | None) -> str | None:
    if value and not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value.rstrip("/") if value else None


_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w-][\w.-]*)*")


def _bucket_url(value: str | None) -> str | None:
    if not value:
        return None
    if not _BUCKET.fullmatch(value.rstrip("/")):
        raise ValueError("must be s3://BUCKET or s3://BUCKET/PREFIX")
    return value.rstrip("/")


# What Kubernetes sets in every pod for a service named `cascade` or `cascade-...`.
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_HOST|\w+_SERVICE_PORT(_\w+)?|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def _is_service_link(name: str, value: str) -> bool:
    is_address = name.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value)
    return bool(is_address or _SERVICE_LINK.fullmatch(name))


def _port(value: object) -> object:
    is_link = isinstance(value, str) and _SERVICE_ADDRESS.fullmatch(value)
    return DEFAULT_PORT if is_link else value


def _parse_weights(value: object) -> object:
    """Parse `NAME=SHARE,...` into a dictionary."""
    entries = _split(value)
    if not isinstance(entries, tuple):
        return entries
    pairs = [entry.rpartition("=") for entry in entries]
    if any(not separator for _, separator, _ in pairs):
        raise ValueError("must be NAME=SHARE, separated by commas")
    return {name.strip(): share for name, _, share in pairs}


def _dtype(value: object) -> object:
    if value in ("float16", "fp16", "half"):
        raise ValueError(
            "float16 is refused: the activations of Stage C exceed its range and pictures turn black; "
            "use bfloat16, which takes as little memory"
        )
    return value


Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(_dtype)]
Networks = Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_parse_networks)]
Receivers = Annotated[tuple[Network | str, ...], NoDecode, BeforeValidator(_parse_receivers)]
Keys = Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_parse_keys)]
Devices = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Weights = Annotated[dict[str, PositiveFloat], NoDecode, BeforeValidator(_parse_weights)]
Port = Annotated[int, BeforeValidator(_port)]
BaseUrl = Annotated[str | None, AfterValidator(_base_url)]
BucketUrl = Annotated[str | None, AfterValidator(_bucket_url)]


class Settings(BaseSettings):
    """The operator's settings. Each field `name` is read from `CASCADE_NAME`, or passed in."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=()
    )

    model: str = Field("tiny", min_length=1, description="`tiny`, a checkpoint folder or a repository id")
    devices: Devices = Field(
        ("auto",),
        min_length=1,
        description="`auto`, `cpu`, `cuda:0,cuda:1`: an engine process for each; or `CASCADE_DEVICE`",
    )
    dtype: Dtype = Field("auto", description="Arithmetic of the networks: `auto`, `float32` or `bfloat16`")
    compile: Literal["off", "graphs", "full"] = Field(
        "off", description="On CUDA: `graphs` records CUDA graphs, `full` compiles the blocks, too"
    )
    strict: bool = Field(
        False, description="Network calls of one row: pictures equal to the last bit in any company"
    )
    max_rows: int | None = Field(
        None, ge=1, description="Rows of a batch at most (a guided picture is two); unset: as measured"
    )
    data_dir: Path = Field(
        Path("data"),
        description="Folder of jobs, pictures and the signing secret, relative to where it starts",
    )
    bucket_url: BucketUrl = Field(
        None,
        description="`s3://BUCKET/PREFIX` for pictures, with `AWS_*`; needs the extra `s3`; unset: the data "
        "folder",
    )
    signing_secret: SecretStr | None = Field(
        None,
        min_length=32,
        description="Signs URLs and webhooks, the same for all servers; unset: made once in the data folder",
    )
    cache_dir: Path | None = Field(
        None, description="Folder of what was measured of devices; unset: in the data folder"
    )
    database_url: str | None = Field(
        None, description="`postgresql+asyncpg://USER@HOST/NAME`; unset: SQLite in the data folder"
    )

    lora_dir: Path | None = Field(None, description="Folder of LoRAs, beside those that the model brings")
    controlnet_dir: Path | None = Field(
        None, description="Folder of ControlNets, beside those that the model brings"
    )

    host: str = Field("127.0.0.1", description="Address to listen on")
    port: Port = Field(DEFAULT_PORT, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    api_keys: Keys = Field((), description="Comma-separated `KEY`, `NAME=KEY` or `NAME=sha256:HEX`")
    api_keys_file: Path | None = Field(
        None, description="JSON file of further keys, read again when it changes: see `cascade keys`"
    )
    allow_anonymous: bool = Field(False, description="Listen beyond this machine although there is no key")
    public_base_url: BaseUrl = Field(None, description="Base of the URLs given out, as `https://host`")
    trusted_proxies: Networks = Field((), description="Networks whose X-Forwarded-Proto and -Host count")
    cors_origins: Texts = Field((), description="Origins of browser pages that may call; `*` for all")

    model_aliases: Texts = Field(
        ("dall-e-", "gpt-image-", "chatgpt-image-"),
        description="Prefixes of model names that mean the model served here",
    )
    list_aliases: bool = Field(False, description="List the common aliases in /v1/models")
    quality_steps: dict[str, tuple[int, int]] = Field(
        {
            "low": (12, 6),
            "medium": (20, 10),
            "high": (30, 15),
            "max": (40, 20),
        },
        description="Steps of prior and decoder for each quality, as JSON",
    )

    max_queue: int = Field(64, ge=0, description="Jobs that may wait; more are refused with 503")
    weights: Weights = Field({}, description="Shares of the device, as `KEY-NAME=2,...`; unnamed keys have 1")
    rate_limit: int | None = Field(
        None, ge=1, description="Requests for pictures in a minute and key; unset: any number"
    )
    max_images: int = Field(10, ge=1, le=10, description="Pictures of one request at most")
    max_pixels: int = Field(4_194_304, ge=64 * 64, le=4_194_304, description="Width times height at most")
    max_body_bytes: int = Field(32 * MEBIBYTE, ge=1024, description="Size of a JSON body at most")
    max_upload_bytes: int = Field(64 * MEBIBYTE, ge=1024, description="Size of a multipart body at most")
    max_connections: int = Field(
        2048,
        ge=8,
        description="Connections at once, at most three quarters of the descriptors; an eighth more get 503, "
        "the rest are closed",
    )
    header_timeout: float = Field(10.0, gt=0, description="Seconds in which a request's head must come")
    body_timeout: float = Field(30.0, gt=0, description="Seconds in which a request's body must come")
    loading_wait: float = Field(
        30.0, ge=0, description="Seconds that a request waits for a model that is still loading"
    )
    sync_timeout: float = Field(540.0, gt=0, description="Seconds that a waiting request may take")
    grace_seconds: float = Field(
        30.0, gt=0, description="Seconds that running jobs and open requests have when the server is to stop"
    )
    lease_seconds: float = Field(
        30.0, ge=1, description="Seconds after which other servers take the jobs of a silent one"
    )
    job_ttl: float = Field(86_400.0, gt=0, description="Seconds that an ended job and its pictures are kept")
    idempotency_ttl: float = Field(
        86_400.0,
        gt=0,
        description="Seconds that an Idempotency-Key is known, if its job and pictures are kept so long",
    )
    file_ttl: float = Field(86_400.0, gt=0, description="Seconds that a picture is kept")
    url_ttl: float = Field(3_600.0, ge=1, description="Seconds that a signed URL works")
    outbound_allow: Receivers = Field(
        (), description="Hosts and networks that webhooks may call although they are not public"
    )
    c2pa_certificate: Path | None = Field(
        None,
        description="PEM file of the certificate that signs pictures, then its chain; needs the extra `c2pa`",
    )
    c2pa_key: Path | None = Field(None, description="PEM file of that certificate's private key (PKCS#8)")

    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: console on a terminal, else JSON"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged")
    log_prompts: bool = Field(False, description="Write prompts into the log")
    trace_endpoint: str | None = Field(
        None, description="OTLP over HTTP, as `http://host:4318/v1/traces`; needs the extra `tracing`"
    )
    faults: Texts = Field((), description="For tests of crashes: `POINT:kill@3`, `POINT:raise@1`")

    @property
    def model_name(self) -> str:
        """Name of the model for callers: of a folder only the last part of its path."""
        return Path(self.model).name if self.model.startswith(("/", ".", "~")) else self.model

    @property
    def jobs_url(self) -> str:
        """URL of the job database, for SQLAlchemy."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'jobs.db'}"

    @property
    def key_ttl(self) -> float:
        """Seconds that an idempotency key is valid: no longer than its job and its pictures are kept."""
        return min(self.idempotency_ttl, self.job_ttl, self.file_ttl)

    @property
    def profiles_dir(self) -> Path:
        """Folder of the measurements of devices."""
        return self.cache_dir or self.data_dir / "cache"

    @property
    def has_keys(self) -> bool:
        """Whether callers need a key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="before")
    @classmethod
    def _look_at_other_variables(cls, values: Any) -> Any:
        unknown = unknown_variables(os.environ, cls.model_fields)
        if unknown:
            raise ValueError("\n".join(unknown))
        if ONE_DEVICE in os.environ:
            return {"devices": os.environ[ONE_DEVICE], **values}
        return values

    @field_validator("quality_steps")
    @classmethod
    def _check_quality_steps(cls, steps: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        if set(steps) != {"low", "medium", "high", "max"}:
            raise ValueError("must have exactly the members low, medium, high and max")
        if any(not (1 <= prior <= 100 and 1 <= decoder <= 60) for prior, decoder in steps.values()):
            raise ValueError("prior steps must be 1 to 100, decoder steps 1 to 60")
        return steps

    @model_validator(mode="after")
    def _refuse_an_open_door(self) -> Self:
        if not (self.is_loopback or self.has_keys or self.allow_anonymous):
            raise ValueError(
                f"listening on {self.host} lets others call this server without a key: set {PREFIX}API_KEYS, "
                f"or give --allow-anonymous ({PREFIX}ALLOW_ANONYMOUS=true) if that is meant"
            )
        return self

    @model_validator(mode="after")
    def _require_one_secret(self) -> Self:
        if self.bucket_url and self.database_url and self.signing_secret is None:
            raise ValueError(
                f"{PREFIX}SIGNING_SECRET is missing: servers that share a database and a bucket need the same"
            )
        return self

    @model_validator(mode="after")
    def _require_both_to_sign(self) -> Self:
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            missing = "KEY" if self.c2pa_key is None else "CERTIFICATE"
            raise ValueError(f"{PREFIX}C2PA_{missing} is missing: signing needs a certificate and its key")
        return self


def engine_environment() -> dict[str, str]:
    """Return the environment of an engine process: ours, and a faster memory allocator where there is one.

    Small networks are some 5 to 10 % faster on a CPU with huge pages for glibc's allocator, and as much again
    with tcmalloc in its place: glibc cuts a block to size twice for each tensor. Both can be chosen only when
    a process starts.
    """
    chosen = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    if (allocator := _tcmalloc()) is not None:
        chosen["LD_PRELOAD"] = str(allocator)
    return {**chosen, **os.environ, **_where_we_are()}


def _where_we_are() -> dict[str, str]:
    """Return the PYTHONPATH by which an engine finds this program if it runs from a folder uninstalled."""
    root = str(Path(__file__).parents[1])
    if root in sys.path[1:]:
        return {}
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _tcmalloc() -> Path | None:
    """Return the path of the library where distributions put it, if it is installed."""
    folders = (
        _LIBRARIES / str(sysconfig.get_config_var("MULTIARCH")),
        _LIBRARIES.with_name("lib64"),
        _LIBRARIES,
    )
    names = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def service_environment() -> dict[str, str]:
    """Return the variables that a service manager set for this process."""
    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {name: os.environ[name] for name in names if name in os.environ}


def load_settings(**overrides: Any) -> Settings:
    """Load settings from the environment; `overrides` (from the command line) take precedence.

    Raises `SettingsError` with one line for each mistake.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [_one_line(problem["loc"], problem["msg"], overrides) for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from None
    except ValueError as error:  # pydantic-settings: a structured setting that is not JSON
        name = re.sub(r'.*?"(\w+)".*', r"\1", str(error), flags=re.DOTALL)
        default = json.dumps(Settings.model_fields[name].default)
        raise SettingsError(f"{PREFIX}{name.upper()}: must be JSON, such as {default}") from None


def unknown_variables(environment: Mapping[str, str], known: Mapping[str, object]) -> list[str]:
    """Return one sentence for each unknown `CASCADE_*` variable, with the nearest known one."""
    names = [f"{PREFIX}{name.upper()}" for name in known]
    unknown = sorted(
        name
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in (*names, ONE_DEVICE) and not _is_service_link(name, value)
    )
    return [f"{name} is no setting; did you mean {_nearest(name, names)}?" for name in unknown]


def _nearest(name: str, names: list[str]) -> str:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def _one_line(location: tuple[int | str, ...], message: str, overrides: Mapping[str, Any]) -> str:
    """Return the message for a mistake, with the option or else the variable of the setting."""
    message = re.sub(r"^(Input|String) should", "must", message.removeprefix("Value error, "))
    message = message.partition(", unable")[0]
    if not location:
        return message
    name, *inside = map(str, location)
    shown = f"--{name.replace('_', '-')}" if name in overrides else f"{PREFIX}{name.upper()}"
    return f"{' '.join([shown, *inside])}: {message[:1].lower()}{message[1:]}"
