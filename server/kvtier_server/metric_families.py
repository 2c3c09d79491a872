"""Metric families made of plain mappings. Owns the prefix of every name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX = "kvtier_"

Samples = Mapping[tuple[str, ...], float]
"""Value by label values, in the order of the family's labels."""


def by_name(counts: Mapping[str, float], known: Iterable[str] = ()) -> Samples:
    """Samples of a family with one label; what is `known` and was not counted is 0."""
    return {(name,): value for name, value in {**dict.fromkeys(known, 0), **counts}.items()}


def gauge(name: str, help_text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    """A gauge; `name` without the prefix."""
    family = GaugeMetricFamily(PREFIX + name, help_text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def counter(name: str, help_text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    """A counter; `name` without the prefix and without `_total`, which is appended."""
    family = CounterMetricFamily(PREFIX + name, help_text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family
