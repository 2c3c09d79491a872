from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier_client.context import MAX_REQUEST_ID_BYTES, ReqContext, serialize_params, wire_request_id


@pytest.mark.parametrize(
    ("value", "text"), [(5, "5"), (5.0, "5.0"), (True, "true"), ("5", '"5"'), (None, "null"), (-0.0, "-0.0")]
)
def test_a_value_arrives_as_the_type_it_was(value: object, text: str) -> None:
    assert serialize_params({"max_offload_tokens": value}).data == f'{{"max_offload_tokens":{text}}}'.encode()


def cycle() -> list[object]:
    items: list[object] = []
    items.append(items)
    return items


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        [1, {"deep": float("-inf")}],
        b"bytes",
        "\ud800",
        {"\udfff": 1},
        {5: "a key that is no string"},
        {"inner": {True: 1}},
        {1, 2},
        object(),
        10**5000,
        cycle(),
        nested(100_000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_cannot_say_is_left_out_alone(value: object) -> None:
    params = serialize_params({"before": 1, "bad": value, "after": 2})
    assert params.data == b'{"before":1,"after":2}'
    assert params.dropped == ("'bad'",)


def test_parameters_of_which_nothing_can_be_sent_are_not_sent() -> None:
    assert serialize_params({"bad": b""}).data is None
    assert serialize_params({5: 1}).data is None
    assert serialize_params([1, 2]).dropped == ("<list>",)


def test_no_parameters_and_empty_ones_stay_two_things() -> None:
    assert serialize_params(None).data is None
    assert serialize_params({}).data == b"{}"


def test_parameters_are_serialized_once() -> None:
    values: dict[str, Any] = {"a": [1]}
    ctx = ReqContext("r1", values)
    first = ctx.params_json()
    values["a"].append(2)
    assert ctx.params_json() is first


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


def typed(value: object) -> object:
    """Make 5, 5.0 and True compare unequal."""
    if isinstance(value, dict):
        return {name: typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value), repr(value)


@given(st.dictionaries(st.text(), json_values))
def test_what_json_can_say_arrives_unchanged(values: dict[str, object]) -> None:
    params = serialize_params(values)
    assert params.data is not None
    assert not params.dropped
    assert typed(json.loads(params.data)) == typed(values)


@given(st.text(st.characters(exclude_categories=()), max_size=400))
def test_any_request_id_becomes_one_that_the_protocol_takes(req_id: str) -> None:
    wire_id = wire_request_id(req_id)
    assert 1 <= len(wire_id.encode()) <= MAX_REQUEST_ID_BYTES
    assert wire_request_id(req_id) == wire_id == ReqContext(req_id).wire_id


def test_ids_that_are_too_long_stay_different() -> None:
    assert wire_request_id("a" * 257) != wire_request_id("b" * 257)
    assert wire_request_id("r" * 256) == "r" * 256
