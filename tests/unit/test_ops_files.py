"""The dashboard and the alert rules name metrics and labels that there are, and every alert is explained."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from billing.calls.calls import Calls
from billing.holds.holds import Holds
from billing.meters import Meters, Metric
from billing.monitoring.gauges import OBSERVED
from billing.postgres.database import Database
from billing.provider.quota import Quota
from billing.redis.pipeline import RedisPipe
from config.settings import load_settings
from proxy.telemetry.metrics import OF_MASTER
from proxy.upstream.upstreams import make_upstream
from tests.support.paths import ROOT

_METRIC = re.compile(r"\btuma_[a-z_]+\b(?:{([^}]*)})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")
_GROUP = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")


def metrics() -> list[Metric]:
    """Return all that a worker has."""
    settings, meters = load_settings(), Meters()
    database = Database(settings.postgres)

    async def read_mirror(*_: Any) -> dict[str, str]:
        return {}

    from uuid import UUID

    worker_id = UUID(int=0)
    quota = Quota(database, make_upstream(settings), worker_id=worker_id, settings=settings.quota)
    holds = Holds(RedisPipe(settings.redis), settings.holds, read_mirror)
    Calls(database, holds, quota, worker_id=worker_id, settings=settings, meters=meters)
    return [*meters.metrics, *OBSERVED, *OF_MASTER]


def series() -> dict[str, set[str]]:
    """Return the names that a page has, and the labels of each."""
    found: dict[str, set[str]] = {}
    for metric in metrics():
        labels = set(metric.labels)
        match metric.kind:
            case "counter":
                found[f"{metric.name}_total"] = labels
            case "gauge":
                found[metric.name] = labels
            case "histogram":
                found[f"{metric.name}_bucket"] = labels | {"le"}
                found[f"{metric.name}_sum"] = found[f"{metric.name}_count"] = labels
    return found


def dashboard() -> Any:
    return json.loads((ROOT / "docs/ops/dashboard.json").read_text())


def rules() -> list[Any]:
    groups = yaml.safe_load((ROOT / "docs/ops/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[str]:
    yield from (target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    yield from (rule["expr"] for rule in rules())


def test_every_metric_and_label_named_exists() -> None:
    known = series()
    named: set[str] = set()
    for text in expressions():
        used: set[str] = set()
        for match in _METRIC.finditer(text):
            name = match[0].partition("{")[0]
            assert name in known, f"{name} in {text}"
            assert set(_LABEL.findall(match[1] or "")) <= known[name], text
            used.add(name)
        grouped = {label.strip() for group in _GROUP.findall(text) for label in group.split(",")}
        assert grouped <= set().union(*(known[name] for name in used)) if used else not grouped, text
        named |= used
    # Whatever is counted can be seen.
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in named}
    unseen = {metric.name for metric in metrics()} - families
    assert unseen == {"tuma_settlements", "tuma_call_seconds", "tuma_build_info"}


def test_what_every_machine_says_alike_is_not_added_up() -> None:
    """What Postgres knows is on every machine's page: two of them would show twice the holds, and twice the money."""
    alike = "|".join(metric.name for metric in OBSERVED)
    summed = re.compile(rf"\bsum\s*(?:by\s*\([^)]*\)\s*)?\((?:\w+\()?(?:{alike})(?:_total)?\b")
    assert [text for text in expressions() if summed.search(text)] == []


def test_legends_name_labels_that_the_query_keeps() -> None:
    for panel in dashboard()["panels"]:
        assert panel["title"]
        for target in panel["targets"]:
            kept = {label.strip() for group in _GROUP.findall(target["expr"]) for label in group.split(",")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    sections = dict(re.findall(r"^## Alert: (\w+)\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL))
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    assert sections.keys() == set(names)
    for rule in rules():
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#alert-{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert "**Do.**" in sections[rule["alert"]]


def test_names_are_prometheus_own() -> None:
    for metric in metrics():
        assert re.fullmatch(r"tuma_[a-z0-9_]+", metric.name)
        assert metric.help.endswith(".")
        assert not metric.labels or metric.kind != "gauge" or "le" not in metric.labels
        assert not {"user", "wallet", "key", "user_id", "wallet_id", "key_id"} & set(metric.labels)
