"""What is shipped for Prometheus and Grafana, as far as it can be checked without them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from tests.daemon_process import REPOSITORY
from tests.observability import dashboard
from tests.server.metric_contract import METRICS, series_names

from kvtier_server.cli import main

ALERTS = REPOSITORY / "docker" / "prometheus" / "alerts.yml"
CASES = REPOSITORY / "docker" / "prometheus" / "alerts_test.yml"
SERIES = {name for metric in METRICS for name in series_names(metric)}

EXPECTED = (
    "Down", "Corruption", "HitRateCollapse", "LeaseStuck", "Backpressure", "DiskSpace", "DiskWear",
    "SlowLoad", "EngineNotAttached", "FdLeak",
)  # fmt: skip


def alerts() -> dict[str, str]:
    """The text of every alert by its name; a library for YAML would be here for this alone."""
    blocks = ALERTS.read_text().split("      - alert: ")[1:]
    return {block.split("\n", 1)[0]: block for block in blocks}


def commands(text: str) -> list[list[str]]:
    """The calls of kvtier in a text, each as words; what is left open for the reader is left out."""
    texts = re.findall(r"`(kvtier [^`]*)`", re.sub(r"\s+", " ", text))
    return [re.sub(r"\{\{.*?\}\}", "x", found).split()[1:] for found in texts if "attached" not in found]


def test_the_alerts_are_those_that_are_promised() -> None:
    assert tuple(alerts()) == tuple(f"Kvtier{name}" for name in EXPECTED)


@pytest.mark.parametrize("name", [f"Kvtier{name}" for name in EXPECTED])
def test_an_alert_says_how_bad_it_is_what_it_means_and_what_to_type(name: str) -> None:
    text = alerts()[name]
    assert re.search(r"severity: (page|ticket)\b", text)
    for annotation in ("summary:", "description: >-", "action: >-"):
        assert annotation in text
    action = text.partition("action: >-")[2]
    assert commands(action), "the action names no command of kvtier"


def test_what_alerts_and_dashboard_ask_for_exists() -> None:
    asked = dashboard.metrics_in(
        " ".join(re.findall(r"expr: (.*?)(?=\n +(?:for|- )|\Z)", ALERTS.read_text(), re.DOTALL))
    )
    for query in dashboard.queries():
        asked |= dashboard.metrics_in(query.expression)
    assert asked - SERIES == set()
    given = dashboard.metrics_in(CASES.read_text())
    assert given - SERIES == set(), "the alerts are tested with metrics that do not exist"


def test_every_command_that_an_alert_names_is_one() -> None:
    for name, text in alerts().items():
        for words in commands(text):
            names = [word for word in words if re.fullmatch(r"[a-z]+", word)]
            depth = 2 if names[0] in {"admin", "config", "pool"} else 1
            with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
                main([*names[:depth], "--help"])
            assert ended.value.code == 0, (name, words)
            for option in (word for word in words if word.startswith("--")):
                assert option in out.getvalue(), (name, words, option)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(name: str) -> None:
    cases = [block for block in CASES.read_text().split("  - name: ")[1:] if block.startswith(f"{name} - ")]
    fires = [f'alertname="Kvtier{name}"' in case for case in cases]
    assert any(fires)
    assert not all(fires)
    assert all("exp_samples: []" in case for case, fired in zip(cases, fires, strict=True) if not fired)


def panels() -> list[dict[str, Any]]:
    """Every panel of the dashboard."""
    found: list[dict[str, Any]] = dashboard.document()["panels"]
    return found


def test_every_panel_has_a_unit_a_description_and_a_query_of_the_chosen_data_source() -> None:
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
            assert '=~"$instance"' in target["expr"] or "ALERTS" in target["expr"], panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_the_dashboard_fits_one_screen_and_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) < 24, "Grafana's grid has 24 columns"
    assert max(y for _, y in taken) < 25, "a row takes 38 pixels, and a screen has about 1,000"


def test_the_dashboard_can_be_narrowed_to_a_data_source_and_instances() -> None:
    variables = {variable["name"]: variable for variable in dashboard.document()["templating"]["list"]}
    assert variables.keys() == {"datasource", "instance"}
    assert "kvtier_build_info" in variables["instance"]["definition"]


def test_the_dashboard_shows_what_operators_were_promised() -> None:
    shown = " ".join(panel["title"].lower() for panel in panels())
    for what in (
        "hit rate by tier",
        "ttft saved",
        "by state",
        "latency",
        "bytes",
        "evictions",
        "errors",
        "tenant",
    ):
        assert what in shown


def test_grafana_finds_prometheus_and_the_dashboards_where_the_files_say() -> None:
    provisioning = REPOSITORY / "docker" / "grafana" / "provisioning"
    assert "type: prometheus" in (provisioning / "datasources" / "prometheus.yml").read_text()
    assert (
        Path("/var/lib/grafana/dashboards").as_posix()
        in (provisioning / "dashboards" / "kvtier.yml").read_text()
    )
