import os
import re
import resource
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from migrations import migrate
from server.database import Database
from server.settings import Settings, is_loopback, program_environment

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PGENGINE_")]:
        monkeypatch.delenv(name)


def _default(field: FieldInfo) -> str:
    if field.default_factory is list:
        return "empty"
    if field.default_factory is not None:
        return "computed"
    if field.default is None:
        return "none"
    if field.default == "":
        return "empty"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _rows() -> list[str]:
    return [
        f"| `PGENGINE_{name.upper()}` | {_default(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    documented = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert documented == _rows()


def test_no_setting_is_without_a_meaning() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_settings_named_in_the_text_exist() -> None:
    named = set(re.findall(r"PGENGINE_([A-Z_]+)", PAGE.read_text()))
    assert named == {name.upper() for name in Settings.model_fields}


def test_defaults_fit_together() -> None:
    settings = Settings()
    assert settings.database_url == "sqlite:///data/pgengine.db"
    assert 1 <= settings.threads <= 4


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGENGINE_ENVIRONMENTS", "My-v0, Other-v1,")
    monkeypatch.setenv("PGENGINE_DATA_DIR", "/srv/pg")
    monkeypatch.setenv("PGENGINE_API_KEY", "a-secret-of-the-operator")
    settings = Settings()
    assert settings.environments == ["My-v0", "Other-v1"]
    assert settings.database_url == "sqlite:////srv/pg/pgengine.db"
    assert "operator" not in repr(settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"renew_seconds": 5.0}, "PGENGINE_RENEW_SECONDS must be less than half"),
        ({"no_auth": True, "host": "0.0.0.0"}, "loopback"),
        ({"no_auth": True, "api_key": "0123456789abcdef01234567"}, "contradict"),
        ({"api_key": ""}, "24 characters"),
        ({"api_key": "0123456789abcdef0123456"}, "24 characters.*openssl rand"),
        ({"api_key": " 0123456789abcdef0123456 "}, "24 characters"),
        ({"api_key": "a secret of the operator"}, "visible ASCII"),
        ({"api_key": "0123456789abcdef\n01234567"}, "visible ASCII"),
        ({"api_key": "0123456789abcdef\x0101234567"}, "visible ASCII"),
        ({"api_key": "0123456789abcdef-schlüssel"}, "visible ASCII"),
        ({"api_key": "0123456789abcdef-\udcff-01234567"}, "visible ASCII"),
        ({"environments": "os:system"}, "colon"),
        ({"allowed_origins": "lab.example"}, "scheme"),
        ({"port": 70_000}, "65535"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**values)  # type: ignore[arg-type]


def test_a_refusal_does_not_repeat_a_secret() -> None:
    with pytest.raises(ValidationError) as error:
        Settings(api_key=SecretStr("tooshort"))
    assert "tooshort" not in str(error.value)


@pytest.mark.parametrize("written", ["{}\n", "{} ", "\t{}\r\n"])
def test_what_a_file_or_a_shell_leaves_around_a_key_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("PGENGINE_API_KEY", written.format("a-secret-of-the-operator"))
    key = Settings().api_key
    assert key is not None
    assert key.get_secret_value() == "a-secret-of-the-operator"


def test_workers_get_the_same_settings_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGENGINE_API_KEY", "a-secret-of-the-operator")
    monkeypatch.setenv("PGENGINE_HOST", "localhost")
    monkeypatch.setenv("OTHER", "kept")
    settings = Settings(
        port=0, allowed_hosts=["a.example", "b.example"], data_dir=Path("/srv"), lease_seconds=8.5, host="127.0.0.1"
    )
    environment = settings.environment()
    assert environment["OTHER"] == "kept"
    assert "a-secret-of-the-operator" not in environment.values()
    monkeypatch.delenv("PGENGINE_API_KEY")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings.model_copy(update={"api_key": None})


def test_what_computes_has_nothing_that_opens_the_database_or_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGENGINE_API_KEY", "PGENGINE_DATABASE_URL", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OTHER", "kept")
    environment = program_environment(2)
    assert environment["OTHER"] == "kept"
    assert "secret" not in environment.values()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("name", ["feature%2Fx", "a b", "a?b=c", "a#b", "ü", "100%", "a@b:c", "%41"])
def test_the_data_directory_is_the_one_that_was_named(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    settings = Settings(data_dir=directory)
    for url in (settings.database_url, settings.environment()["PGENGINE_DATABASE_URL"]):
        directory.mkdir(exist_ok=True)
        database = Database(url)
        migrate(database)
        # as the worker's lease opens it once more
        again = Database(database.url.render_as_string(hide_password=False))
        again.ping()
        again.dispose()
        database.dispose()
        assert (directory / "pgengine.db").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("path", ["//evil.example", "/a//b", "a", "/a b", "/a?b", "http://x"])
def test_a_root_path_that_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="such as /pgengine"):
        Settings(root_path=path)


@pytest.mark.parametrize("address", ["lab.example", "10.0.0.1/8", "10.0.0", ""])
def test_a_trusted_proxy_is_an_address_or_a_network(address: str) -> None:
    with pytest.raises(ValidationError):
        Settings(trusted_proxies=[address])


def test_connections_leave_descriptors_to_the_server_itself() -> None:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 1 <= Settings().max_connections < allowed or allowed == resource.RLIM_INFINITY


@pytest.mark.parametrize(("connections", "streams"), [(1, 1), (32, 24), (896, 672), (50_000, 2000)])
def test_event_streams_leave_connections_to_all_others(connections: int, streams: int) -> None:
    assert Settings(max_connections=connections).max_streams == streams
    assert Settings(max_connections=connections, max_streams=7).max_streams == 7
