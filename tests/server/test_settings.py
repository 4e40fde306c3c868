import os
import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from server.settings import Settings, is_loopback

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
    monkeypatch.setenv("PGENGINE_API_KEY", "a secret of the operator")
    settings = Settings()
    assert settings.environments == ["My-v0", "Other-v1"]
    assert settings.database_url == "sqlite:////srv/pg/pgengine.db"
    assert "operator" not in repr(settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"renew_seconds": 5.0}, "PGENGINE_RENEW_SECONDS must be less than half"),
        ({"no_auth": True, "host": "0.0.0.0"}, "loopback"),
        ({"no_auth": True, "api_key": "0123456789abcdef"}, "contradict"),
        ({"api_key": "short"}, "16 characters"),
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


def test_children_get_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        port=0,
        api_key=SecretStr("a secret of the operator"),
        allowed_hosts=["a.example", "b.example"],
        data_dir=Path("/srv"),
        lease_seconds=8.5,
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


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
