"""Settings: read from `CASCADE_*`, checked whole, mistakes named."""

import json
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import Settings, engine_environment, load_settings, service_environment


def test_the_defaults_serve_this_machine_only() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "tiny")
    assert settings.is_loopback


def test_variables_are_read_and_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_PORT", "9000")
    monkeypatch.setenv("CASCADE_MODEL", "/models/x")
    monkeypatch.setenv("CASCADE_CORS_ORIGINS", "https://a.example, https://b.example")
    monkeypatch.setenv("CASCADE_API_KEYS", "one, two=2, padded==")
    monkeypatch.setenv("CASCADE_TRUSTED_PROXIES", "10.0.0.0/8")
    steps = {"low": [1, 1], "medium": [2, 2], "high": [3, 3], "max": [4, 4]}
    monkeypatch.setenv("CASCADE_QUALITY_STEPS", json.dumps(steps))
    settings = load_settings(port=9001)
    assert (settings.port, settings.model) == (9001, "/models/x")
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert [key.name for key in settings.api_keys] == ["key-1", "two", "key-3"]
    assert settings.quality_steps["high"] == (3, 3)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CASCADE_PROT", "1", ["CASCADE_PROT", "CASCADE_PORT"]),
        ("CASCADE_API_KEY", "k", ["CASCADE_API_KEY ", "CASCADE_API_KEYS"]),
        ("CASCADE_PORT", "http", ["CASCADE_PORT", "integer"]),
        ("CASCADE_PORT", "70000", ["CASCADE_PORT", "65535"]),
        ("CASCADE_DTYPE", "fp8", ["CASCADE_DTYPE", "float32", "bfloat16"]),
        ("CASCADE_MAX_QUEUE", "-1", ["CASCADE_MAX_QUEUE"]),
        ("CASCADE_MAX_BATCH", "8", ["CASCADE_MAX_BATCH", "no setting"]),
        ("CASCADE_MAX_ROWS", "0", ["CASCADE_MAX_ROWS"]),
        ("CASCADE_DEVICES", " , ", ["CASCADE_DEVICES"]),
        ("CASCADE_COMPILE", "maybe", ["CASCADE_COMPILE", "graphs"]),
        ("CASCADE_WEIGHTS", "a", ["CASCADE_WEIGHTS", "NAME=SHARE"]),
        ("CASCADE_WEIGHTS", "a=0", ["CASCADE_WEIGHTS"]),
        ("CASCADE_WEIGHTS", "a=much", ["CASCADE_WEIGHTS"]),
        ("CASCADE_PUBLIC_BASE_URL", "host", ["CASCADE_PUBLIC_BASE_URL", "https://"]),
        ("CASCADE_TRUSTED_PROXIES", "everyone", ["CASCADE_TRUSTED_PROXIES"]),
        ("CASCADE_QUALITY_STEPS", "{", ["CASCADE_QUALITY_STEPS: must be JSON", '{"low": [12, 6]']),
        (
            "CASCADE_QUALITY_STEPS",
            '{"low": [1, "x"]}',
            ["CASCADE_QUALITY_STEPS low 1: must be a valid integer"],
        ),
        ("CASCADE_DTYPE", "float16", ["CASCADE_DTYPE: float16 is refused", "Stage C", "use bfloat16"]),
        ("CASCADE_QUALITY_STEPS", "{}", ["CASCADE_QUALITY_STEPS", "low, medium, high and max"]),
        ("CASCADE_API_KEYS", "ok, x=sha256:abc", ["CASCADE_API_KEYS", "entry 2", "64"]),
        (
            "CASCADE_HOST",
            "0.0.0.0",
            ["0.0.0.0", "CASCADE_API_KEYS", "--allow-anonymous (CASCADE_ALLOW_ANONYMOUS=true)"],
        ),
        ("CASCADE_HOST", "server.example", ["CASCADE_API_KEYS"]),
        ("CASCADE_MAX_PIXELS", "4194305", ["CASCADE_MAX_PIXELS", "4194304"]),
        ("CASCADE_SERVICE_PROT", "80", ["CASCADE_SERVICE_PROT"]),
        ("CASCADE_HOST", "::", ["CASCADE_API_KEYS"]),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_each_mistake_has_a_line_and_the_name_by_which_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_MAX_QUEUE", "-1")
    with pytest.raises(SettingsError) as caught:
        load_settings(port=70000)
    assert str(caught.value).splitlines() == [
        "--port: must be less than or equal to 65535",
        "CASCADE_MAX_QUEUE: must be greater than or equal to 0",
    ]
    monkeypatch.setenv("CASCADE_MAX_QEUE", "1")
    monkeypatch.setenv("CASCADE_PROT", "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).splitlines() == [
        "CASCADE_MAX_QEUE is no setting; did you mean CASCADE_MAX_QUEUE?",
        "CASCADE_PROT is no setting; did you mean CASCADE_PORT?",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert load_settings(host=host).is_loopback


@pytest.mark.parametrize("permission", [{"api_keys": "k"}, {"allow_anonymous": True}])
def test_beyond_this_machine_with_a_key_or_by_name(permission: dict[str, object]) -> None:
    assert not load_settings(host="0.0.0.0", **permission).is_loopback


@pytest.mark.parametrize(("given", "missing"), [("CERTIFICATE", "KEY"), ("KEY", "CERTIFICATE")])
def test_half_of_what_signing_needs_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, given: str, missing: str
) -> None:
    monkeypatch.setenv(f"CASCADE_C2PA_{given}", "file.pem")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    message = str(caught.value)
    assert message == f"CASCADE_C2PA_{missing} is missing: signing needs a certificate and its key"
    monkeypatch.setenv(f"CASCADE_C2PA_{missing}", "other.pem")
    assert load_settings().c2pa_key is not None


def test_servers_that_share_database_and_bucket_need_one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_BUCKET_URL", "s3://pictures/here/")
    assert load_settings().bucket_url == "s3://pictures/here"
    monkeypatch.setenv("CASCADE_DATABASE_URL", "postgresql+asyncpg://db/jobs")
    with pytest.raises(SettingsError, match=r"^CASCADE_SIGNING_SECRET is missing"):
        load_settings()
    monkeypatch.setenv("CASCADE_SIGNING_SECRET", "too short, and secret")
    with pytest.raises(SettingsError, match=r"CASCADE_SIGNING_SECRET: .* at least 32") as caught:
        load_settings()
    assert "too short" not in str(caught.value)
    monkeypatch.setenv("CASCADE_SIGNING_SECRET", "a long secret " * 3)
    assert "a long secret" not in repr(load_settings())


@pytest.mark.parametrize(
    "url", ["pictures", "http://pictures", "s3://", "s3://a", "s3://pictures/../x", "s3://Pictures"]
)
def test_a_wrong_bucket_is_named(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("CASCADE_BUCKET_URL", url)
    with pytest.raises(SettingsError, match="CASCADE_BUCKET_URL: must be s3://BUCKET"):
        load_settings()


def test_a_wrong_key_entry_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_API_KEYS", "top-secret=sha256:top-secret")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "top-secret" not in str(caught.value)


def test_devices_shares_and_the_places_of_things(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    assert settings.devices == ("auto",)
    assert settings.jobs_url == f"sqlite:///{Path('data').absolute()}/jobs.db"
    assert settings.profiles_dir == Path("data/cache")
    monkeypatch.setenv("CASCADE_DEVICES", "cuda:0, cuda:1")
    monkeypatch.setenv("CASCADE_WEIGHTS", "web=2, batch = 0.5,a=b=3")
    monkeypatch.setenv("CASCADE_DATABASE_URL", "postgresql+asyncpg://u:secret@db/jobs")
    monkeypatch.setenv("CASCADE_CACHE_DIR", "/var/cache/x")
    settings = load_settings()
    assert settings.devices == ("cuda:0", "cuda:1")
    assert settings.weights == {"web": 2, "batch": 0.5, "a=b": 3}
    assert settings.jobs_url == "postgresql+asyncpg://u:secret@db/jobs"
    assert settings.profiles_dir == Path("/var/cache/x")


def test_one_device_may_be_named_in_the_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_DEVICE", "cuda:1")
    assert load_settings().devices == ("cuda:1",)
    monkeypatch.setenv("CASCADE_DEVICES", "cpu,cpu")
    assert load_settings().devices == ("cpu", "cpu"), "the name of the setting wins"
    assert load_settings(devices="cuda:0").devices == ("cuda:0",), "and an option wins over both"


def test_variables_of_others_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(name.upper(), "0,1")
    assert load_settings() == Settings.model_construct()


@pytest.mark.parametrize("name", ["CASCADE_DEVICE", "CASCADE_DEVICES"])
def test_no_device_at_all_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, ",")
    with pytest.raises(SettingsError, match="CASCADE_DEVICES: "):
        load_settings()
    with pytest.raises(SettingsError, match="--devices: "):
        load_settings(devices=",")


def test_what_a_service_manager_sets_is_handed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert service_environment()["NOTIFY_SOCKET"] == "/run/x"
    assert "WATCHDOG_PID" not in service_environment()


def test_engines_get_huge_pages_unless_the_operator_tunes_the_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_PATH", "/usr/lib")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert engine_environment()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert engine_environment()["SOME_PATH"] == "/usr/lib"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert engine_environment()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize("folder", ["lib/x-linux", "lib64", "lib"])
@pytest.mark.parametrize("name", ["libtcmalloc_minimal.so.4", "libtcmalloc.so.4"])
def test_engines_get_tcmalloc_where_it_is_installed(
    folder: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr("app.settings._LIBRARIES", tmp_path / "lib")
    monkeypatch.setattr("sysconfig.get_config_var", {"MULTIARCH": "x-linux"}.get)
    assert "LD_PRELOAD" not in engine_environment()
    (tmp_path / "lib").mkdir()
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / name).touch()
    assert engine_environment()["LD_PRELOAD"] == str(tmp_path / folder / name)
    (tmp_path / "lib" / "libtcmalloc.so.4").touch()  # larger, and in the last folder: the least of all
    assert engine_environment()["LD_PRELOAD"] == str(tmp_path / folder / name)
    monkeypatch.setenv("LD_PRELOAD", "")  # the operator wants none
    assert engine_environment()["LD_PRELOAD"] == ""


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links = {
        "CASCADE_PORT": "tcp://10.0.0.1:80",
        "CASCADE_SERVICE_HOST": "10.0.0.1",
        "CASCADE_SERVICE_PORT": "80",
        "CASCADE_SERVICE_PORT_HTTP": "80",
        "CASCADE_PORT_80_TCP": "tcp://10.0.0.1:80",
        "CASCADE_PORT_80_TCP_PROTO": "tcp",
        "CASCADE_PORT_80_TCP_PORT": "80",
        "CASCADE_PORT_80_TCP_ADDR": "10.0.0.1",
        "CASCADE_SERVER_PORT": "tcp://10.0.0.2:80",
        "CASCADE_SERVER_SERVICE_HOST": "10.0.0.2",
        "CASCADE_SERVER_PORT_80_TCP_ADDR": "10.0.0.2",
    }
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    assert load_settings().port == 8000
