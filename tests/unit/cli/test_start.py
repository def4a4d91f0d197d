"""What ``tuma serve`` looks at before it begins: secrets that could be guessed, and how many files it may open."""

import resource
import subprocess
import sys
from typing import Any

import pytest

from config.secrets import require_long_secrets
from config.settings import SettingsError, load_settings
from scripts.cli.doctor import _look_at_settings
from scripts.programs.files import bound_connections, find_file_limit
from scripts.programs.serve import run_server

SHORT = "fifteen letters"
RAISE = (
    "import resource; from scripts.programs.files import raise_file_limit;"
    " resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}));"
    " print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("TUMA_AUTH__KEY_PEPPER", {"auth": {"key_pepper": SHORT}}),
        ("TUMA_AUTH__JWT_SECRET", {"auth": {"jwt_secret": SHORT}}),
        ("TUMA_ADMIN__TOKEN", {"admin": {"token": SHORT}}),
        ("TUMA_METRICS__TOKEN", {"metrics": {"token": SHORT}}),
        ("TUMA_STRIPE__WEBHOOK_SECRET", {"stripe": {"webhook_secret": SHORT}}),
        ("TUMA_FLUTTERWAVE__WEBHOOK_SECRET", {"flutterwave": {"webhook_secret": SHORT}}),
    ],
)
def test_a_secret_that_could_be_guessed_stops_the_start(name: str, section: dict[str, Any]) -> None:
    settings = load_settings(**section)
    with pytest.raises(SettingsError, match=name) as caught:
        run_server(settings)
    assert SHORT not in str(caught.value)
    found = {item["name"]: item for item in _look_at_settings(settings)}["secrets"]
    assert not found["ok"]
    assert name in found["detail"]
    (part,) = section.values()
    (member,) = part
    longer = {next(iter(section)): {member: SHORT + "!"}}
    require_long_secrets(load_settings(**longer))


def test_an_old_pepper_that_could_be_guessed_stops_the_start() -> None:
    settings = load_settings(auth={"old_key_peppers": [SHORT + "!", SHORT]})
    with pytest.raises(SettingsError, match=r"TUMA_AUTH__OLD_KEY_PEPPERS\[1\]: shorter"):
        require_long_secrets(settings)


def test_as_many_files_as_it_may() -> None:
    hard = min(find_file_limit(), 4_000)
    done = subprocess.run(
        [sys.executable, "-c", RAISE.format(hard=hard)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == [str(hard)] * 3


def test_no_more_connections_than_there_are_files_for() -> None:
    settings = load_settings()
    assert bound_connections(settings, 1 << 30) is settings
    few = bound_connections(settings, 2_256)
    assert (few.limits.connections, few.upstream.connections_max) == (1_000, 1_000)
    assert bound_connections(settings, 10).limits.connections == 1
    own = load_settings(limits={"connections": 50})
    assert bound_connections(own, 2_256).limits.connections == 50


@pytest.mark.parametrize(
    ("files", "ok", "part"), [(100_000, True, "enough for"), (3_000, True, "1372"), (512, False, "too few")]
)
def test_the_doctor_looks_at_files(monkeypatch: pytest.MonkeyPatch, files: int, ok: bool, part: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, files))
    found = {item["name"]: item for item in _look_at_settings(load_settings())}["open files"]
    assert found["ok"] is ok
    assert part in found["detail"]
