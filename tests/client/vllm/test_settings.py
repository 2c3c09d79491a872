from __future__ import annotations

import pytest

from kvtier_client import ClientOptions, TlsFiles
from kvtier_client.vllm.settings import ADDRESS_VARIABLE, Settings, SettingsError

ADDRESS = "unix:///run/kvtier/kvtier.sock"


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)


def problems_of(**extra_config: object) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        Settings.from_extra_config({"address": ADDRESS, **extra_config})
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def test_an_address_is_all_that_is_needed() -> None:
    assert Settings.from_extra_config({"address": ADDRESS}) == Settings(address=ADDRESS)


def test_every_key_is_read() -> None:
    settings = Settings.from_extra_config(
        {
            "address": "127.0.0.1:9470",
            "lookup_wait_ms": 1,
            "lookup_deadline_ms": 20.5,
            "promotion_wait_ms": 100.0,
            "transfer": "shm",
            "weights_id": "llama@v3",
            "tenant": "search",
            "verify_loads": "sampled",
        }
    )
    assert settings == Settings("127.0.0.1:9470", 1, 20.5, 100, "shm", "llama@v3", "search", "sampled")
    assert isinstance(settings.promotion_wait_ms, int)


TLS = {"tls_ca": "/ca.pem", "tls_cert": "/cert.pem", "tls_key": "/key.pem"}


def test_certificates_let_the_address_be_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_extra_config({"address": "node7:9470", **TLS, "tls_server_name": "kvtier"})
    assert settings.client_options().tls == TlsFiles("/ca.pem", "/cert.pem", "/key.pem", "kvtier")
    assert "not on this machine" in problems_of(address="node7:9470")[0]
    for variable, path in (("KVTIER_TLS_CA", "/a"), ("KVTIER_TLS_CERT", "/c"), ("KVTIER_TLS_KEY", "/k")):
        monkeypatch.setenv(variable, path)
    of_environment = Settings.from_extra_config({"address": "node7:9470", "tls_cert": "/mine"})
    assert of_environment.client_options().tls == TlsFiles("/a", "/mine", "/k")


@pytest.mark.parametrize("left_out", sorted(TLS))
def test_half_of_the_certificates_is_a_mistake(left_out: str) -> None:
    (problem,) = problems_of(**{key: path for key, path in TLS.items() if key != left_out})
    assert left_out.removeprefix("tls_") + " is missing" in problem
    assert Settings.from_extra_config({"address": ADDRESS}).client_options().tls is None


def test_keys_of_vllm_pass() -> None:
    Settings.from_extra_config(
        {
            "address": ADDRESS,
            "spec_name": "KVTierOffloadingSpec",
            "spec_module_path": "kvtier_client.vllm",
            "blocks_per_chunk": 4,
            "canonical_layout": False,
            "offload_prompt_only": True,
            "self_describing_kv_events": False,
            "sync_load_budget_bytes": 0,
        }
    )


def test_the_client_gets_the_bounds() -> None:
    settings = Settings(ADDRESS, lookup_wait_ms=0, lookup_deadline_ms=10, promotion_wait_ms=0)
    expected = ClientOptions(lookup_wait_ms=0, lookup_deadline_ms=10, promotion_wait_ms=0)
    assert settings.client_options() == expected
    assert Settings(ADDRESS, lookup_deadline_ms=400).client_options().prepare_deadline_ms == 800


def test_without_an_address_the_error_says_what_to_type() -> None:
    with pytest.raises(SettingsError, match=r'address is missing: write "address": "unix:///path'):
        Settings.from_extra_config({})


def test_the_environment_names_the_daemon_where_the_configuration_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLE, "127.0.0.1:1")
    assert Settings.from_extra_config({}).address == "127.0.0.1:1"
    assert Settings.from_extra_config({"address": ADDRESS}).address == ADDRESS


def test_a_wrong_address_of_the_environment_is_blamed_on_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLE, "/run/kvtier.sock")
    with pytest.raises(SettingsError, match=r"KVTIER_ADDRESS.*write unix:///run/kvtier\.sock"):
        Settings.from_extra_config({})


def test_all_problems_are_in_one_error() -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_extra_config(
            {"address": "10.0.0.1:1", "tenant": 5, "transfer": "rdma", "lookup_wait_ms": -1, "adress": ""}
        )
    listed = str(refused.value).splitlines()[1:]
    assert [line.split()[0].strip(":") for line in listed] == [
        "address",
        "lookup_wait_ms",
        "transfer",
        "tenant",
        "adress",
    ]


@pytest.mark.parametrize("value", [True, "50", None, -0.5, float("nan"), float("inf"), 10**400, 3_600_001])
def test_a_time_is_a_number_of_milliseconds(value: object) -> None:
    for key in ("lookup_wait_ms", "lookup_deadline_ms", "promotion_wait_ms"):
        (problem,) = problems_of(**{key: value})
        assert problem.startswith(f"{key}: must be a number of milliseconds")


def test_a_deadline_of_zero_is_refused() -> None:
    (problem,) = problems_of(lookup_deadline_ms=0)
    assert "more than 0" in problem


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("verify_loads", "never", '"always", "sampled", "off"'),
        ("verify_loads", False, '"always", "sampled", "off"'),
        ("transfer", "cuda", '"auto", "shm", "cuda_ipc"'),
        ("transfer", ["shm"], '"auto", "shm", "cuda_ipc"'),
        ("tenant", "t" * 65, "at most 64 bytes"),
        ("weights_id", "", "weights_id is empty"),
        ("weights_id", 7, "a string"),
        ("address", 9470, "must be a string as unix:///"),
        ("canonical_layout", True, "tensor_parallel_size; remove the key"),
        ("canonical_layout", "false", "set it to false"),
        ("blocks_per_chunk", True, "an integer, 1 or more, not True"),
        ("blocks_per_chunk", "4", "an integer, 1 or more, not '4'"),
        ("blocks_per_chunk", -1, "an integer, 1 or more, not -1"),
        ("block_size", 0, "an integer, 1 or more, not 0"),
        ("offload_prompt_only", "false", "true or false"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(key: str, value: object, said: str) -> None:
    (problem,) = problems_of(**{key: value})
    assert problem.startswith(key)
    assert said in problem


def test_two_sizes_of_a_chunk_are_one_too_many() -> None:
    (problem,) = problems_of(block_size=64, blocks_per_chunk=4)
    assert "keep one" in problem


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("weight_id", "weights_id"), ("lookup_timeout_ms", "lookup"), ("block_per_chunk", "blocks_per_chunk")],
)
def test_an_unknown_key_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    (problem,) = problems_of(**{typed: 1})
    assert f"did you mean {meant}" in problem


def test_a_key_like_no_other_is_answered_with_all() -> None:
    (problem,) = problems_of(zzz=1)
    assert "known keys are address, block_size" in problem
