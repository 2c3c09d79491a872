from __future__ import annotations

from dataclasses import replace

import pytest

from kvtier_ops.namespace import FactsError, GroupFacts, NamespaceFacts

GROUP = GroupFacts(tokens_per_block=16, part_bytes=4096)
FACTS = NamespaceFacts("model", "w0", "bfloat16", "sha256", 16, 1, "NHD", (GROUP,))


def with_layers(names: list[str]) -> NamespaceFacts:
    """Facts whose layer names are in two groups, half of them in each."""
    half = len(names) // 2
    groups = (replace(GROUP, layer_names=tuple(part)) for part in (names[:half], names[half:]))
    return replace(FACTS, groups=tuple(groups))


@pytest.mark.parametrize(
    "facts",
    [
        replace(FACTS, model="m" * 1024),
        with_layers(
            [f"language_model.model.layers.{layer:03}.self_attn.indexer.k_cache" for layer in range(900)]
        ),
        with_layers(["l" * 32] * 2048),
        replace(FACTS, extra={f"{number:04}": "x" * 252 for number in range(256)}),
    ],
    ids=["a path", "a deep model", "short names", "many further facts"],
)
def test_facts_as_long_as_they_may_be_are_valid(facts: NamespaceFacts) -> None:
    facts.validate()


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (replace(FACTS, model="m" * 1025), "namespace.model has 1025 bytes; at most 1024"),
        (replace(FACTS, weights_id="\N{SNOWMAN}" * 342), "namespace.weights_id has 1026 bytes"),
        (replace(FACTS, kv_dtype="d" * 2000), "namespace.kv_dtype has 2000 bytes"),
        (replace(FACTS, hash_algorithm="h" * 2000), "namespace.hash_algorithm has 2000 bytes"),
        (replace(FACTS, kv_cache_layout="k" * 2000), "namespace.kv_cache_layout has 2000 bytes"),
        (with_layers([""] * 2049), "namespace.groups.layer_names has 2049 texts; at most 2048"),
        (with_layers(["l" * 33] * 2000), "namespace.groups.layer_names has 66000 bytes; at most 65536"),
        (replace(FACTS, extra={str(number): "" for number in range(257)}), "namespace.extra has 514 texts"),
        (replace(FACTS, extra={"name": "x" * 65_533}), "namespace.extra has 65537 bytes; at most 65536"),
    ],
)  # fmt: skip
def test_a_fact_that_is_longer_than_it_may_be_is_named(facts: NamespaceFacts, problem: str) -> None:
    with pytest.raises(FactsError) as caught:
        facts.validate()
    assert str(caught.value).startswith(problem)
