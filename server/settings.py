"""Every setting of the server, read from the environment (`PGENGINE_…`) and declared once.

docs/settings.md lists them; a test keeps the list complete. The command line overrides a few of them and hands the
result to the programs it starts through `Settings.environment()`.
"""

import ipaddress
import os
import re
import resource
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.logs import Level
from server.memory import LEAST_BYTES, machine_bytes

__all__ = ["API_KEY", "PREFIX", "Settings", "is_loopback", "program_environment", "sqlite_url"]

PREFIX = re.compile(r"(/[A-Za-z0-9._~\-]+)+")
"""What a path before all others may look like: nothing that a browser would read as another host."""

Names = Annotated[list[str], NoDecode]  # comma-separated in the environment, not JSON


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


API_KEY = "PGENGINE_API_KEY"
"""Variable with the operator's own admin key, and the name of that key. Only the API has business with it."""
SHORTEST_KEY = 24
"""Characters of a key that an operator chose. Keys are kept as plain hashes, so a short one could be guessed back."""
DATABASE_SECRETS = ("PGENGINE_DATABASE_URL", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE")
"""Variables that open the database, the last three through PostgreSQL's own library."""
OWN_DESCRIPTORS = 128
"""What the database's connections, child programs and the log need at most, with room to spare."""

MOST_CONNECTIONS = 100_000
MOST_STREAMS = 2000


def program_environment(threads: int) -> dict[str, str]:
    """Environment variables of a program that computes, with so many threads: none that opens the database or the API.

    Such a program runs environments that others wrote.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in (API_KEY, *DATABASE_SECRETS)}
    # the numeric libraries read these when they are loaded
    counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return inherited | counts


def sqlite_url(file: Path) -> str:
    """The URL of a SQLite file, whatever characters its path has."""
    return f"sqlite:///{quote(str(file))}"


def _default_database_url(data: dict[str, Any]) -> str:
    return sqlite_url(data["data_dir"] / "pgengine.db")


def _default_threads(data: dict[str, Any]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers: int = data["workers"]
    return max(1, min(4, cores // max(1, workers)))


def _default_connections() -> int:
    """Descriptors that this process may have, without those of the database and of child programs."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, max(allowed // 4, allowed - OWN_DESCRIPTORS)))


def _default_streams(data: dict[str, Any]) -> int:
    """So many that those who follow jobs leave connections to all others."""
    connections: int = data["max_connections"]
    return max(1, min(MOST_STREAMS, connections * 3 // 4))


def _default_trainer_memory(data: dict[str, Any]) -> int:
    workers: int = data["workers"]
    return max(LEAST_BYTES, int(0.8 * machine_bytes()) // max(1, workers))


class Settings(BaseSettings):
    """The settings of one server."""

    model_config = SettingsConfigDict(
        env_prefix="PGENGINE_",
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    # --- where things are
    data_dir: Path = Path("data")
    """Directory of the SQLite file and its backups; made if it is missing."""
    database_url: Annotated[str, Field(repr=False)] = Field(default_factory=_default_database_url)
    """`sqlite:///path` or `postgresql://user:password@host/name`. Default: `pgengine.db` in `DATA_DIR`."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """Port to listen on; 0 takes a free one."""

    # --- who may use it
    api_key: SecretStr | None = None
    """An admin key to use instead of a generated one; at least 24 visible ASCII characters. Another one replaces it."""
    key_outage_seconds: Annotated[float, Field(ge=5, le=86_400)] = 300.0
    """How long a key that was valid, even one revoked meanwhile, works on while the database does not answer."""
    no_auth: bool = False
    """Ask nobody for a key. Only on a loopback address."""
    allowed_hosts: Names = Field(default_factory=list)
    """Host names that requests may carry, comma-separated, `*` for any. Loopback names and `HOST` always may."""
    allowed_origins: Names = Field(default_factory=list)
    """Origins of web pages that may use the API, comma-separated, such as `https://lab.example`. Its own always may."""

    root_path: str = ""
    """Path below which a proxy serves the API, such as `/pgengine`; the proxy may cut it off or leave it."""
    trusted_proxies: Names = Field(default_factory=lambda: ["127.0.0.1", "::1"])
    """Addresses and networks of proxies whose X-Forwarded-For and X-Forwarded-Prefix count, comma-separated, or `*`."""

    # --- how jobs run
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    """Worker programs that `serve` starts beside the API."""
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(default_factory=_default_threads)
    """Threads of each trainer. Default: cores / `WORKERS`, at least 1, at most 4. Other counts give other last bits."""
    trainer_memory_bytes: Annotated[int, Field(ge=LEAST_BYTES, le=2**50)] = Field(
        default_factory=_default_trainer_memory
    )
    """Memory of each trainer; a job that takes more fails. Default: 80% of the machine's or container's / `WORKERS`."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.2
    """How often an idle worker looks for a job, and the API for new events of streams that somebody follows."""
    lease_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """A worker that is not heard of for so long has lost its job to the next one."""
    renew_seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """How often a worker renews its lease; less than half of `LEASE_SECONDS`."""
    checkpoint_seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """At most so much training is repeated after a crash."""
    stall_seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """A trainer without an update for so long fails with `timeout`."""
    grace_seconds: Annotated[float, Field(gt=0, le=300)] = 5.0
    """What a stop or a cancellation waits for before it becomes a SIGTERM, and again before a SIGKILL."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Crashes of worker or trainer after which a job is failed with `worker_lost`."""

    # --- which environments there are
    environments: Names = Field(default_factory=list)
    """Gymnasium ids that may be used beside the built-in allow-list, comma-separated; `my/*` is a pattern of ids."""
    environment_modules: Names = Field(default_factory=list)
    """Modules that are imported at the start, comma-separated; every environment that they register is allowed."""

    # --- what is told
    log_level: Level = "info"
    """What is logged: `debug`, `info` (a line for each request, too), `warning` or `error`."""

    # --- bounds
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default_factory=_default_connections)
    """Most connections at once in one API process. Default: `ulimit -n`, less what the server needs itself."""
    head_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """How long a request line and its headers may take to come."""
    body_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How long a body may take to come; 1,024 bytes give it another second."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 16 * 2**20
    """Largest body of a request."""
    max_body_depth: Annotated[int, Field(ge=4, le=500)] = 64
    """Deepest nesting of a body."""
    max_act_batch: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """Most observations in one request for actions."""
    max_streams: Annotated[int, Field(ge=1, le=100_000)] = Field(default_factory=_default_streams)
    """Most event streams open at once in one API process. Default: 3/4 of `MAX_CONNECTIONS`, at most 2,000."""
    explain_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """How long the engine may take to explain an update, or to look at a gradient check before it is queued."""
    max_explanations: Annotated[int, Field(ge=1, le=256)] = 2
    """Most explanations, and most looks at checks, that run at once; the last place is for a key that has none."""
    max_open_jobs: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Most jobs of one API key that have not ended; a further one is answered 429 until one of them has."""
    max_policy_parameters: Annotated[int, Field(ge=1, le=10**9)] = 5_000_000
    """Most numbers in one policy."""

    @field_validator(
        "allowed_hosts", "allowed_origins", "trusted_proxies", "environments", "environment_modules", mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("api_key")
    @classmethod
    def _can_be_sent(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        # a file or a shell leaves a line feed behind the key, and no client sends it
        key = value.get_secret_value().strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError("a key has visible ASCII characters only, without blanks: no client could send it")
        if len(key) < SHORTEST_KEY:
            raise ValueError(f"a key needs at least {SHORTEST_KEY} characters; `openssl rand -hex 32` makes one")
        return SecretStr(key)

    @field_validator("root_path")
    @classmethod
    def _clean_prefix(cls, value: str) -> str:
        value = value.strip().rstrip("/")
        if value and not PREFIX.fullmatch(value):
            raise ValueError("a path is a slash and letters, digits, `.`, `_`, `~` or `-`, such as /pgengine")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        for name in value:
            if name != "*":
                ipaddress.ip_network(name)  # its own message names what is wrong
        return value

    @field_validator("environments")
    @classmethod
    def _no_module(cls, value: list[str]) -> list[str]:
        for name in value:
            if ":" in name:
                raise ValueError("an id with a colon imports a module; name it in PGENGINE_ENVIRONMENT_MODULES instead")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _whole_origin(cls, value: list[str]) -> list[str]:
        for origin in value:
            parts = urlsplit(origin)
            if not parts.scheme or not parts.netloc or parts.path or parts.query:
                raise ValueError("an origin is a scheme and a host, such as https://lab.example:8443")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.renew_seconds * 2 >= self.lease_seconds:
            raise ValueError(
                "PGENGINE_RENEW_SECONDS must be less than half of PGENGINE_LEASE_SECONDS: "
                "one late renewal would lose the job"
            )
        if self.no_auth and not is_loopback(self.host):
            raise ValueError("PGENGINE_NO_AUTH works on a loopback PGENGINE_HOST only, such as 127.0.0.1")
        if self.no_auth and self.api_key is not None:
            raise ValueError("PGENGINE_NO_AUTH and PGENGINE_API_KEY contradict each other")
        return self

    def environment(self) -> dict[str, str]:
        """Environment variables of a worker that this program starts: its own, with these settings, without the key."""
        prefix = self.model_config["env_prefix"]
        values = {f"{prefix}{name.upper()}": getattr(self, name) for name in type(self).model_fields}
        settings = {name: _written(value) for name, value in values.items() if value is not None}
        return {name: value for name, value in (os.environ | settings).items() if name != API_KEY}


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return str(value)
