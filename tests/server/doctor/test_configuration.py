from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvtier_server.doctor.configuration import read_configuration
from kvtier_server.doctor.finding import Verdict

from ..cli.conftest import environment

NOWHERE = "unix:///nonexistent/kvtier.sock"


def test_without_a_file_the_defaults_of_serve_are_meant() -> None:
    subject, (found,) = read_configuration({}, (), None, {}, NOWHERE)
    assert (subject.name, subject.pool_bytes, subject.sessions) == ("default", 4 << 30, 1024)
    assert found.verdict is Verdict.PASS
    assert found.text == "no file, so the defaults: pool default of 4GiB, no tiers below"


def test_file_environment_and_options_mean_what_they_mean_to_serve(tmp_path: Path) -> None:
    file = tmp_path / "kvtier.toml"
    file.write_text(
        '[server]\nname = "a"\naddress = "unix:///tmp/a.sock"\n[pool]\nbytes = "1GiB"\n'
        '[[tiers]]\ntype = "example"\ncapacity = "1MiB"\n'
    )
    options = ("--config", str(file), "--name", "b")
    subject, (found,) = read_configuration(
        {"server.name": "b"}, options, file, {"KVTIER_POOL__BYTES": "2GiB"}, NOWHERE
    )
    assert (subject.address, subject.name, subject.pool_bytes) == ("unix:///tmp/a.sock", "b", 2 << 30)
    assert subject.pool_directory.name.endswith("-b")
    assert found.text == f"{file}: pool b of 2GiB, tiers below: example"
    assert subject.serve("--fresh") == f"kvtier serve --config {file} --name b --fresh"


def test_every_mistake_is_a_failure_with_the_place_to_mend_it(tmp_path: Path) -> None:
    file = tmp_path / "kv tier.toml"
    file.write_text('[pool]\nbyts = "1GiB"\n')
    subject, found = read_configuration(
        {"pool.bytes": "4G"}, (), file, {"KVTIER_LIMITS__ENGINES": "0"}, NOWHERE
    )
    *mistakes, instead = found
    assert {each.verdict for each in mistakes} == {Verdict.FAIL}
    assert {each.fix for each in mistakes} == {
        f"${{EDITOR:-vi}} '{file}'",
        "unset KVTIER_LIMITS__ENGINES",
        "kvtier serve --help",
    }
    assert any("did you mean pool.bytes?" in each.text for each in mistakes)
    assert (instead.verdict, subject.pool_bytes) == (Verdict.SKIP, 4 << 30)


def test_a_file_that_is_not_there_is_a_mistake_too(tmp_path: Path) -> None:
    _, found = read_configuration({}, (), tmp_path / "none.toml", {}, NOWHERE)
    assert (found[0].verdict, "cannot be read: No such file" in found[0].text) == (Verdict.FAIL, True)


def test_an_engines_installation_is_examined_without_one(tmp_path: Path) -> None:
    """With pydantic out of reach, as where the extra server is not installed."""
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from kvtier_server.cli import main\nsys.exit(main(['doctor', '--quick', '--address', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, NOWHERE],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be read without pydantic, which comes with the extra server" in done.stdout
    assert "nobody says how large the pool is to be" in done.stdout
