from __future__ import annotations

import pytest

from kvtier_client.vllm.versions import UnsupportedVLLM, check_version, installed_version


def test_the_installed_vllm_is_supported() -> None:
    assert check_version() == installed_version()


@pytest.mark.parametrize("version", ["0.27.0", "0.32.0+cpu", "0.33.1.dev7+gabc", "0.33"])
def test_every_release_of_the_range_is_taken(version: str) -> None:
    assert check_version(version) == version


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.26.9", "older"), ("0.34.0rc1", "newer"), ("1.0.0", "newer"), ("dev", "tells no release")],
)
def test_any_other_is_refused_with_the_range_and_what_to_install(version: str, said: str) -> None:
    with pytest.raises(UnsupportedVLLM, match=rf"{version}.*{said}.*0\.27 to 0\.33: pip install"):
        check_version(version)


def test_a_refusal_is_an_import_error() -> None:
    assert issubclass(UnsupportedVLLM, ImportError)
