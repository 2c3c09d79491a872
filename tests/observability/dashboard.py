"""The Grafana dashboard as data: its panels and their queries, with the variables filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.daemon_process import REPOSITORY

FILE = REPOSITORY / "docker" / "grafana" / "dashboards" / "kvtier.json"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel. `expression` still has Grafana's variables."""

    panel: str
    kind: str
    unit: str
    stacked: bool
    legend: str
    expression: str

    def filled(self, rate_window: str, shown_range: str) -> str:
        """Fill in what Grafana would, for all instances."""
        values = {"$instance": ".*", "$__rate_interval": rate_window, "$__range": shown_range}
        text = self.expression
        for name, value in values.items():
            text = text.replace(name, value)
        assert "$" not in text, f"{self.panel}: a variable that nobody knows in {text}"
        return text

    def name(self, labels: Mapping[str, str]) -> str:
        """Name a series as the panel's legend does."""
        return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), self.legend)


def document() -> dict[str, Any]:
    """The whole file."""
    loaded: dict[str, Any] = json.loads(FILE.read_text())
    return loaded


def queries() -> list[Query]:
    """Every query of every panel, in the dashboard's order."""
    return list(_queries(document()))


def _queries(dashboard: Mapping[str, Any]) -> Iterator[Query]:
    for panel in dashboard["panels"]:
        defaults = panel["fieldConfig"]["defaults"]
        stacking = defaults.get("custom", {}).get("stacking", {}).get("mode", "none")
        for target in panel["targets"]:
            yield Query(
                panel["title"],
                panel["type"],
                defaults["unit"],
                stacking == "normal",
                target["legendFormat"],
                target["expr"],
            )


def metrics_in(expression: str) -> set[str]:
    """Names of kvtier's own metrics in an expression, those of recording rules left out."""
    return set(re.findall(r"(?<![\w:])kvtier_[a-z0-9_]+", expression))
