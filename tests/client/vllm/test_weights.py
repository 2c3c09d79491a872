from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier_client.vllm.weights import (
    WeightsError,
    WeightsSource,
    config_digest,
    config_file_digest,
    default_weights_id,
    display_name,
    model_folder,
    stable_digest,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "5.1"}))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"first")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"second")
    (folder / "README.md").write_text("about")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache in which main of org/name is COMMIT."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    cache = tmp_path / "hf" / "hub"
    make_repo(cache, COMMIT)
    return cache


def make_repo(cache: Path, commit: str) -> None:
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text('{"hidden_size": 8}')


def local(folder: Path) -> str:
    return default_weights_id(WeightsSource(str(folder)))


def test_a_folder_has_the_same_id_in_every_process(model: Path) -> None:
    program = (
        "import sys; from kvtier_client.vllm.weights import *;"
        "print(default_weights_id(WeightsSource(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", program, str(model)],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    assert printed.stdout.strip() == local(model)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
def test_a_file_that_was_written_again_makes_other_weights(model: Path, name: str) -> None:
    before = local(model)
    times = (model / name).stat()
    os.utime(model / name, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert local(model) != before


def test_a_file_more_makes_other_weights_and_what_is_no_weights_does_not(model: Path) -> None:
    before = local(model)
    (model / "README.md").write_text("more about")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"vLLM does not look here")
    assert local(model) == before
    (model / "model-00003-of-00003.safetensors").write_bytes(b"third")
    assert local(model) != before


def test_a_copy_that_kept_its_times_has_the_same_weights(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert local(tmp_path / "copy") == local(model)


def test_a_single_file_is_a_model_with_all_its_shards(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    first.write_bytes(b"1")
    (tmp_path / "other.gguf").write_bytes(b"o")
    alone = local(first)
    assert local(tmp_path / "other.gguf") != alone
    second.write_bytes(b"2")
    assert local(first) != alone


def test_a_hub_model_is_its_commit(hub: Path) -> None:
    assert default_weights_id(WeightsSource("org/name")) == f"hub:{COMMIT}"
    assert default_weights_id(WeightsSource("org/name", revision=OTHER)) == f"hub:{OTHER}"
    assert default_weights_id(WeightsSource("org/name", commit=OTHER)) == f"hub:{OTHER}"


def test_files_of_one_repository_are_different_weights(hub: Path) -> None:
    names = ["org/name", "org/name:Q4_K_M", "org/name:Q8_0", "org/name/q8.gguf"]
    assert len({default_weights_id(WeightsSource(name)) for name in names}) == len(names)


def test_a_snapshot_in_the_cache_is_the_hub_model(hub: Path) -> None:
    snapshot = hub / "models--org--name" / "snapshots" / COMMIT
    assert default_weights_id(WeightsSource(str(snapshot))) == f"hub:{COMMIT}"
    assert display_name(str(snapshot)) == "org/name"
    assert display_name("org/name") == "org/name"


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_the_cache_is_where_the_environment_says(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    make_repo(tmp_path / "elsewhere", OTHER)
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    assert default_weights_id(WeightsSource("org/name")) == f"hub:{OTHER}"


def test_the_download_folder_wins_over_the_environment(hub: Path, tmp_path: Path) -> None:
    make_repo(tmp_path / "downloads", OTHER)
    source = WeightsSource("org/name", download_dir=str(tmp_path / "downloads"))
    assert default_weights_id(source) == f"hub:{OTHER}"


def test_dummy_weights_are_their_seed(model: Path) -> None:
    ids = {default_weights_id(WeightsSource(str(model), load_format="dummy", seed=seed)) for seed in (0, 1)}
    assert ids == {"dummy:0", "dummy:1"}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (WeightsSource("org/unknown"), "in no snapshot"),
        (WeightsSource("org/name", revision="no-such-branch"), "in no snapshot"),
        (WeightsSource("org/name", load_format="tensorizer"), "'tensorizer' may take weights from anywhere"),
        (WeightsSource("org/name", remote="s3://bucket/model"), "come from s3://bucket/model"),
    ],
)
def test_what_nothing_names_has_to_be_named(hub: Path, source: WeightsSource, why: str) -> None:
    with pytest.raises(WeightsError, match=f'{why}.*"weights_id"'):
        default_weights_id(source)


def test_a_folder_without_weights_has_to_be_named(model: Path) -> None:
    for file in model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(WeightsError, match=r'no weight files.*"weights_id"'):
        local(model)


def test_a_configuration_is_what_it_says_and_not_who_wrote_it(model: Path, hub: Path) -> None:
    written = config_file_digest(model_folder(WeightsSource(str(model))))
    assert written == config_file_digest(model_folder(WeightsSource("org/name")))
    assert written == config_digest({"_name_or_path": "x", "hidden_size": 8, "_commit_hash": COMMIT})
    assert written != config_digest({"hidden_size": 8, "rope_scaling": {"factor": 2.0}})


def test_without_a_configuration_file_there_is_no_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert config_file_digest(tmp_path) is None
    assert config_file_digest(None) is None


def test_objects_are_digested_by_what_they_hold() -> None:
    assert stable_digest({"b": (1, 2), "a": {3, 4}}) == stable_digest({"a": {4, 3}, "b": [1, 2]})
    assert stable_digest(WeightsSource("a")) == stable_digest(WeightsSource("a"))
    assert stable_digest(WeightsSource("a")) != stable_digest(WeightsSource("b"))
    assert stable_digest(stable_digest) != stable_digest(config_digest)
    assert stable_digest(1) != stable_digest("1")
