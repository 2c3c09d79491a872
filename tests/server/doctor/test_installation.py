from __future__ import annotations

import pytest

from kvtier_server.doctor import installation
from kvtier_server.doctor.finding import Finding, Verdict
from kvtier_server.doctor.installation import (
    Requirement,
    check_installation,
    fits,
    parse_requirement,
    requirements,
)

NEEDED = [
    Requirement("grpcio", ">=1.76", ""),
    Requirement("protobuf", "<8,>=6.33.5", ""),
    Requirement("pydantic", ">=2", "server"),
    Requirement("obstore", "<0.13,>=0.12", "object"),
    Requirement("mooncake-transfer-engine-non-cuda", "==0.3.13.post1", "mooncake"),
]
THERE = {"grpcio": "1.76.0", "protobuf": "6.33.6", "pydantic": "2.14", "obstore": "0.12.1"}


def look(monkeypatch: pytest.MonkeyPatch, there: dict[str, str]) -> dict[str, Finding]:
    monkeypatch.setattr(installation, "requirements", lambda: NEEDED)
    monkeypatch.setattr(installation, "installed_version", there.get)
    return {each.name: each for each in check_installation()}


def test_every_library_is_told_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, THERE)
    assert found["installation"].text == "grpcio 1.76.0, protobuf 6.33.6"
    assert {each.verdict for name, each in found.items() if name != "installation.mooncake"} == {Verdict.PASS}
    assert found["installation.mooncake"].verdict is Verdict.SKIP


def test_an_engines_installation_is_a_warning_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, {**THERE, "pydantic": None})["installation.server"]  # type: ignore[dict-item]
    assert (found.verdict, found.fix) == (Verdict.WARN, "in kvtier's directory: pip install '.[server]'")


def test_what_every_part_needs_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, {"grpcio": "1.76.0"})["installation"]
    assert (found.verdict, found.text) == (Verdict.FAIL, "not installed: protobuf")


def test_a_version_out_of_bounds_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, {**THERE, "protobuf": "6.30.2"})["installation"]
    assert (found.verdict, found.fix) == (Verdict.FAIL, "in kvtier's directory: pip install '.'")
    assert found.text == "of a wrong version: protobuf 6.30.2, needed is <8,>=6.33.5"


@pytest.mark.parametrize(
    ("line", "requirement"),
    [
        ("numpy", Requirement("numpy", "", "")),
        ("protobuf<8,>=6.33.5", Requirement("protobuf", "<8,>=6.33.5", "")),
        ('grpcio-status>=1.76; extra == "server"', Requirement("grpcio-status", ">=1.76", "server")),
        ("obstore (<0.13,>=0.12) ; extra == 'object'", Requirement("obstore", "<0.13,>=0.12", "object")),
        ('x[y]>=1; python_version < "3.12" and extra == "z"', Requirement("x", ">=1", "z")),
        ('kvtier[server]; extra == "demo"', None),
    ],
)
def test_requirements_are_read_as_pip_writes_them(line: str, requirement: Requirement | None) -> None:
    assert parse_requirement(line) == requirement


@pytest.mark.parametrize(
    ("version", "versions", "is_within"),
    [
        ("1.76.0", ">=1.76", True),
        ("1.75.9", ">=1.76", False),
        ("1.100", ">=1.76", True),
        ("8.0.1", "<8,>=6.33.5", False),
        ("8", "<8.0", False),
        ("7.99", "<8,>=6.33.5", True),
        ("0.3.13.post1", "==0.3.13.post1", True),
        ("0.3.14", "==0.3.13.post1", False),
        ("2.13.0+cpu", ">=2", True),
        ("unknown", ">=2", True),
        ("1.0", "~=2.0", True),
    ],
)
def test_bounds_compare_numbers_and_what_is_strange_passes(
    version: str, versions: str, is_within: bool
) -> None:
    assert fits(version, versions) is is_within


def test_this_installation_declares_what_it_needs_and_has_it() -> None:
    extras = {requirement.extra for requirement in requirements()}
    assert {"", "server", "object", "mooncake", "cuda12", "cuda13"} <= extras
    found = {each.name: each.verdict for each in check_installation()}
    assert (found["installation"], found["installation.server"]) == (Verdict.PASS, Verdict.PASS)
