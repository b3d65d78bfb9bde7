"""deploy/prometheus and deploy/grafana ask for nothing that /metrics does not give."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.test_deploy import COMPOSE, K8S, README, tool
from tests.test_readme import ROOT

PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
CONFIG = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
GROUPS = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
DASHBOARD = json.loads((GRAFANA / "dashboards" / "ddpm.json").read_text())
SCALED = yaml.safe_load((K8S / "components" / "keda" / "scaledobject.yaml").read_text())
HPA = yaml.safe_load((K8S / "base" / "hpa.yaml").read_text())
OF_TARGETS = {"job", "instance"}  # labels that Prometheus adds
Series = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def client() -> TestClient:
    """A service that does not load: /metrics has every name from the start."""
    return TestClient(create_app(Settings()))


@pytest.fixture(scope="module")
def series(client: TestClient) -> Series:
    """The names that /metrics gives, and of each its labels with their values."""
    text = client.get("/metrics").text
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def adapter_query() -> str:
    """That of the prometheus-adapter's rule in README.md, as the adapter fills it in."""
    rule = yaml.safe_load(re.search(r"^```yaml\n(rules:.*?)^```", README, re.M | re.S)[1])["rules"]["custom"][0]
    query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
    return query.replace("<<.LabelMatchers>>", "").replace("<<.GroupBy>>", "instance")


def expressions() -> Iterator[tuple[str, str]]:
    """What is asked for, with where."""
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for variable in DASHBOARD["templating"]["list"][1:]:
        yield f"variable {variable['name']}", re.sub(r"^label_values\((.*), \w+\)$", r"\1", variable["query"]["query"])
    for trigger in SCALED["spec"]["triggers"]:
        yield "KEDA", trigger["metadata"]["query"]
    yield "prometheus-adapter", adapter_query()


EXPRESSIONS = list(expressions())


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_names_and_labels_are_those_of_the_service(where: str, expression: str, series: Series) -> None:
    names = set(re.findall(r"\b(?:ddpm|process)_\w+", expression))
    recorded = set(re.findall(r"\bddpm:\w+:\w+", expression))
    assert names | recorded | set(re.findall(r"\b(?:up|ALERTS)\b", expression))
    assert names <= series.keys()
    assert recorded <= {rule["record"] for rule in RULES if "record" in rule}
    known = {name: labels for name, labels in series.items() if name in names}
    every = OF_TARGETS.union(*known.values(), *([("model",)] if recorded else []))
    for by in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in by.split(",")} <= every, by
    for name, matchers in re.findall(r"\b((?:ddpm|process)_\w+)\{([^}]*)\}", expression):
        for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', matchers):
            assert label in known[name] or label in OF_TARGETS, f"{name} has no {label}"
            if label not in OF_TARGETS and "$" not in value:
                wanted = set(value.split("|")) if operator == "=~" else {value}
                assert wanted <= known[name][label], f"{name}: no {label} is {wanted - known[name][label]}"


def test_an_unknown_name_would_be_seen(series: Series) -> None:
    with pytest.raises(AssertionError):
        test_names_and_labels_are_those_of_the_service("", 'rate(ddpm_refused_total{reason="queue_fool"}[1m])', series)
    with pytest.raises(AssertionError):
        test_names_and_labels_are_those_of_the_service("", "sum by (labels) (ddpm_slots_waiting)", series)


def test_the_autoscaler_s_metric_is_one(series: Series) -> None:
    (metric,) = HPA["spec"]["metrics"]
    assert "model" in series[metric["pods"]["metric"]["name"]]
    assert metric["pods"]["metric"]["name"] in adapter_query()


def test_targets_are_services_of_compose_and_paths_of_the_service(client: TestClient) -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for job in CONFIG["scrape_configs"]:
        ((target,),) = (config["targets"] for config in job["static_configs"])
        host, port = target.split(":")
        assert services[host]["ports"][0].endswith(f":{port}")
        assert client.get(job.get("metrics_path", "/metrics")).status_code != 404
    monitor = yaml.safe_load((K8S / "components" / "monitoring" / "podmonitor.yaml").read_text())["spec"]
    assert {end["path"] for end in monitor["podMetricsEndpoints"]} == {"/metrics", "/readyz"}
    jobs = {job["job_name"] for job in CONFIG["scrape_configs"]}
    asked = {job for _, expression in EXPRESSIONS for job in re.findall(r'job="([\w-]+)"', expression)}
    assert asked <= jobs
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert services[host]["ports"][0].endswith(f":{port}")


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in RULES:
        if "alert" in rule:
            assert len(rule["annotations"]["summary"].split(". ")) > 1
            assert {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == rule["alert"]} == {
                True,
                False,
            }


def test_promtool_agrees() -> None:
    promtool = tool("promtool")
    for arguments in (("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")):
        done = subprocess.run([promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_become_a_resource_of_the_operator(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, check=True, timeout=60)
    made = yaml.safe_load((tmp_path / "ddpm-rules.yaml").read_text())
    assert made["kind"] == "PrometheusRule"
    assert made["spec"] == {"groups": GROUPS}


def test_panels_have_their_own_place_and_a_source_that_is_asked_for() -> None:
    taken: set[tuple[int, int]] = set()
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert x + w <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
        assert panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == variables
