from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier_server.config import load_config
from kvtier_server.doctor import tiers
from kvtier_server.doctor.finding import Finding, Verdict
from kvtier_server.doctor.tiers import check_tiers, direct_problem


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "chunks"


def check(tmp_path: Path, table: str) -> list[Finding]:
    file = tmp_path / "kvtier.toml"
    file.write_text(f"[[tiers]]\n{table}\n")
    return list(check_tiers(load_config({}, file, {}).tiers, file))


def filesystem(root: Path, **more: str) -> str:
    keys = {"type": '"filesystem"', "root": f'"{root}"', "capacity": '"1MiB"', "reserve_free": "0.0", **more}
    return "\n".join(f"{key} = {value}" for key, value in keys.items())


def test_a_configuration_without_tiers_has_nothing_to_check() -> None:
    (found,) = check_tiers((), None)
    assert found.verdict is Verdict.SKIP


def test_a_root_that_can_be_had_passes_and_is_not_made(tmp_path: Path, root: Path) -> None:
    found = check(tmp_path, filesystem(root, direct='"off"', name='"disk"'))
    assert [(each.name, each.verdict) for each in found] == [("tier.disk", Verdict.PASS)] * 2
    assert found[0].text == f"{root} can be written, made at the first start"
    assert "the tier may keep 1MiB" in found[1].text
    assert not root.exists()


def test_a_root_that_is_a_file_fails(tmp_path: Path, root: Path) -> None:
    root.write_text("")
    (found,) = check(tmp_path, filesystem(root))
    assert (found.verdict, found.fix) == (Verdict.FAIL, f"${{EDITOR:-vi}} {tmp_path}/kvtier.toml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_root_that_may_not_be_written_fails(tmp_path: Path, root: Path) -> None:
    root.mkdir(mode=0o500)
    (found,) = check(tmp_path, filesystem(root))
    assert (found.verdict, found.fix.startswith("sudo install -d")) == (Verdict.FAIL, True)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("capacity", '"8000TiB"', "the capacity is more than there is"),
        ("reserve_free", "0.9999999", "writes nothing"),
    ],
)
def test_a_file_system_with_too_little_room_is_a_warning(
    tmp_path: Path, root: Path, key: str, value: str, text: str
) -> None:
    found = check(tmp_path, filesystem(root, direct='"off"', **{key: value}))
    assert [each.verdict for each in found] == [Verdict.PASS, Verdict.WARN]
    assert text in found[1].text


@pytest.mark.parametrize(("direct", "verdict"), [("auto", Verdict.WARN), ("on", Verdict.FAIL)])
def test_where_o_direct_does_not_work_it_depends_on_who_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path, direct: str, verdict: Verdict
) -> None:
    monkeypatch.setattr(tiers, "direct_problem", lambda _: "O_DIRECT does not work")
    found = check(tmp_path, filesystem(root, direct=f'"{direct}"'))
    assert [each.verdict for each in found] == [Verdict.PASS, Verdict.PASS, verdict]


def test_o_direct_is_tried_for_real_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as directory:
        problem = direct_problem(Path(directory))
        assert problem == "" or "O_DIRECT" in problem
        assert os.listdir(directory) == []
    with pytest.raises(FileNotFoundError):
        os.stat(directory)
    assert "No such file" in direct_problem(Path(directory))


def test_the_object_tiers_package_and_secrets_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    table = (
        'type = "object"\nurl = "s3://bucket/x"\ncapacity = "1GiB"\n'
        f'access_key_file = "{secret}"\nsecret_key_file = "{tmp_path}/none"'
    )
    monkeypatch.setattr(tiers, "installed_version", {"obstore": "0.12.1"}.get)
    package, there, missing = check(tmp_path, table)
    assert (package.verdict, package.text) == (Verdict.PASS, "obstore 0.12.1")
    assert (there.verdict, missing.verdict) == (Verdict.PASS, Verdict.FAIL)
    assert missing.fix == f"ls -l {tmp_path}/none"
    monkeypatch.setattr(tiers, "installed_version", {}.get)
    assert check(tmp_path, table)[0].fix == "in kvtier's directory: pip install '.[server,object]'"


@pytest.fixture
def master() -> Iterator[str]:
    """An address where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_mooncakes_master_is_called(tmp_path: Path, master: str) -> None:
    found = check(tmp_path, f'type = "mooncake"\nmaster = "{master}"\nsegment = "16MiB"')
    assert found[1].verdict is Verdict.PASS
    assert found[1].text.startswith(f"master at {master}, ")


def test_a_master_that_is_away_is_a_warning_with_its_command(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = taken.getsockname()[1]
        found = check(tmp_path, f'type = "mooncake"\nmaster = "127.0.0.1:{port}"\nsegment = "16MiB"')
    assert (found[1].verdict, "Connection refused" in found[1].text) == (Verdict.WARN, True)
    assert found[1].fix == f"mooncake_master --rpc_address=127.0.0.1 --rpc_port={port}"


def test_of_another_tier_nothing_is_known(tmp_path: Path) -> None:
    (found,) = check(tmp_path, 'type = "example"\ncapacity = "1MiB"')
    assert found.verdict is Verdict.SKIP
