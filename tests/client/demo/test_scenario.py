"""What the demo says of what it found."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.v1 import admin_pb2
from kvtier_client.demo import text as texts
from kvtier_client.demo.engine_process import Answer, EngineState
from kvtier_client.demo.report import check_lines, table, to_json
from kvtier_client.demo.scenario import Check, Run, Settings, first_difference, held, hit_rate
from kvtier_client.demo.text import load_text
from kvtier_client.progress import Progress

ANSWER = Answer(
    request_id="r",
    output=(5, 6, 7),
    prompt_tokens=100,
    device_tokens=16,
    loaded_tokens=64,
    missing_tokens=80,
    computed_tokens=20,
    preemptions=0,
    failed_loads=0,
    first_token_s=0.25,
)
STATE = EngineState(ready=True, loaded_bytes=3_000_000, load_s=0.001, counters={"lookups": 1})


def test_a_token_that_differs_is_named_with_its_request_and_place() -> None:
    baseline = {"r": ANSWER}
    assert first_difference(baseline, [ANSWER]) == ""
    other = replace(ANSWER, output=(5, 9, 7))
    assert first_difference(baseline, [ANSWER, other]) == "r, token 1: baseline 6, here 9"
    shorter = replace(ANSWER, output=(5, 6))
    assert first_difference(baseline, [shorter]) == "r: baseline 3 tokens, here 2"


def test_the_hit_rate_is_over_what_could_have_been_loaded() -> None:
    assert hit_rate(Run("x", [ANSWER, replace(ANSWER, loaded_tokens=16)])) == 0.5
    assert hit_rate(Run("x", [])) == 0.0


def test_all_that_an_engine_can_hold_in_the_daemon_counts_as_held() -> None:
    tier = admin_pb2.TierStatus(
        reserved_slots=1, quarantined_slots=2, pinned_chunks=3, chunks=9, free_slots=9
    )
    status = admin_pb2.GetStatusResponse(
        tiers=[tier],
        sessions=[admin_pb2.SessionStatus()],
        leases=[admin_pb2.LeaseStatus(kind="load", count=4), admin_pb2.LeaseStatus(kind="lookup", count=1)],
    )
    assert held(status) == [
        "1 sessions",
        "5 leases",
        "1 reserved slots",
        "2 quarantined slots",
        "3 pinned chunks",
    ]
    assert held(admin_pb2.GetStatusResponse(tiers=[admin_pb2.TierStatus(chunks=9)])) == []


def test_the_table_has_a_row_a_run_and_a_check_says_what_it_found() -> None:
    runs = [Run("baseline", [ANSWER], wall_s=2.0), Run("engine-1", [ANSWER], STATE, 1.0)]
    lines = table(runs).splitlines()
    assert lines[2].split()[:6] == ["baseline", "1", "100", "16", "-", "-"]
    assert lines[3].split()[:6] == ["engine-1", "1", "100", "16", "64", "80.0%"]
    assert "3.0" in lines[3].split()
    checks = [Check(True, "it works", "yes"), Check(False, "it is fast", "no")]
    assert check_lines(checks) == "PASS  it works: yes\nFAIL  it is fast: no"
    document = to_json(Settings(), runs, checks)
    assert document["ok"] is False


def test_the_text_is_a_given_file_or_the_readme_or_the_packages_docstrings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "README", tmp_path / "README.md")
    packaged, name = load_text(None)
    assert "docstrings" in name
    assert len(packaged) > 10 * texts.MIN_BYTES
    (tmp_path / "README.md").write_bytes(b"read me " * 1000)
    assert load_text(None) == (b"read me " * 1000, "the project's README.md")
    given = tmp_path / "given"
    given.write_bytes(b"given " * 1000)
    assert load_text(given) == (b"given " * 1000, str(given))
    given.write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes; the chats need at least"):
        load_text(given)


def test_progress_is_drawn_on_a_terminal_and_nowhere_else() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        progress = Progress("engine-1", 4, stream)
        progress.advance()
        progress.close()
        drawn = stream.getvalue()
        assert ("1/4" in drawn) == stream.isatty()
        assert drawn.endswith("\r\033[K") == stream.isatty()
