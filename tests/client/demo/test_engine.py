"""The engine: the same tokens whatever the cache size, the window, the offload and its troubles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier_client.demo.cache import BlockTable, DeviceCache
from kvtier_client.demo.chat import ChatConfig, Conversation, run_chat
from kvtier_client.demo.engine import Engine, EngineConfig, RequestResult
from kvtier_client.demo.model import Model, ModelConfig
from kvtier_client.demo.offload import RequestId

from .dict_offload import DictOffload, Troubles

SIZE = 8
WINDOW = 21  # not a multiple of the block size on purpose
TEXT = Path(__file__).read_bytes()
PROMPT = list(TEXT[:77])
MODELS = {
    window: Model(
        ModelConfig(num_layers=4, hidden_size=64, mlp_size=96, max_tokens=512, sliding_window=window)
    )
    for window in (None, WINDOW)
}

windows = pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])


class RecordingModel(Model):
    """Keeps the logits of every forward by the position of its first token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.logits: dict[int, torch.Tensor] = {}

    def forward(
        self, tokens: Sequence[int], position: int, cache: DeviceCache, tables: Sequence[BlockTable]
    ) -> torch.Tensor:
        self.logits[position] = super().forward(tokens, position, cache, tables)
        return self.logits[position]


def make_engine(window: int | None, num_blocks: int = 64) -> Engine:
    return Engine(MODELS[window], MODELS[window].make_cache(num_blocks, SIZE))


def make_offloaded(
    window: int | None, source: DictOffload | None = None, num_blocks: int = 64, **troubles: Unpack[Troubles]
) -> tuple[Engine, DictOffload]:
    cache = MODELS[window].make_cache(num_blocks, SIZE)
    chunks = None if source is None else source.chunks
    offload = DictOffload(cache, chunks, **troubles)
    return Engine(MODELS[window], cache, offload=offload), offload


def answer(engine: Engine, prompt: Sequence[int] = PROMPT, count: int = 12, name: str = "r") -> RequestResult:
    engine.add_request(name, prompt, count)
    (result,) = engine.run()
    engine.check_integrity()
    return result


def dense_answer(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """Decode with plain attention over the whole sequence: no cache, no blocks, no tiles."""
    tokens = list(prompt)
    for _ in range(count):
        x = model.embedding[tokens].double()
        positions = torch.arange(len(tokens))
        distance = positions[:, None] - positions[None, :]
        for number, weights in enumerate(model.layers):
            config = model.config
            visible = distance >= 0
            if config.sliding_window is not None and number % 2:
                visible &= distance < config.sliding_window
            x = x + dense_attention(config, rms(x) @ weights.qkv.double(), visible) @ weights.out.double()
            gate, up = (rms(x) @ weights.gate_up.double()).chunk(2, dim=-1)
            x = x + (gate * gate.sigmoid() * up) @ weights.down.double()
        tokens.append(int((rms(x[-1]) @ model.head.double()).argmax()))
    return tokens[len(prompt) :]


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def dense_attention(config: ModelConfig, qkv: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    dim, per_kv_head = config.head_dim, config.num_heads // config.num_kv_heads
    heads = qkv.chunk(config.num_heads + 2 * config.num_kv_heads, dim=-1)
    queries, rest = heads[: config.num_heads], heads[config.num_heads :]
    keys, values = rest[: config.num_kv_heads], rest[config.num_kv_heads :]
    outputs = []
    for number, query in enumerate(queries):
        key, value = keys[number // per_kv_head], values[number // per_kv_head]
        scores = rotary(query) @ rotary(key).T / math.sqrt(dim)
        outputs.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ value)
    return torch.cat(outputs, dim=-1)


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + dim/2) as a complex number."""
    half = x.shape[1] // 2
    angles = torch.outer(torch.arange(len(x)).double(), 10000.0 ** (-torch.arange(half).double() / half))
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=1)


@windows
def test_paged_tiles_decode_the_same_tokens_as_dense_attention(window: int | None) -> None:
    expected = dense_answer(MODELS[window], PROMPT, 12)
    assert list(answer(make_engine(window)).output) == expected
    assert len(set(expected)) > 4, "the model must not repeat itself, or wrong KV would go unseen"


def test_the_window_is_not_a_decoration() -> None:
    assert answer(make_engine(None)).output != answer(make_engine(WINDOW)).output


@windows
@pytest.mark.parametrize("prompt_tokens", [1, 7, 8, 9, 63, 64, 65])
def test_a_repeated_prompt_reuses_all_but_the_last_token(window: int | None, prompt_tokens: int) -> None:
    engine = make_engine(window)
    first = answer(engine, PROMPT[:prompt_tokens], name="a")
    second = answer(engine, PROMPT[:prompt_tokens], name="b")
    reused = (prompt_tokens - 1) // SIZE * SIZE
    assert (first.device_tokens, second.device_tokens) == (0, reused)
    assert second.computed_tokens == prompt_tokens - reused
    assert first.output == second.output


@windows
@pytest.mark.parametrize("blocks_per_chunk", [1, 3])
def test_logits_after_a_loaded_prefix_are_bitwise_those_after_a_computed_one(
    window: int | None, blocks_per_chunk: int
) -> None:
    plain = RecordingModel(MODELS[window].config)
    expected = answer(Engine(plain, plain.make_cache(64, SIZE)))
    writer, source = make_offloaded(window, blocks_per_chunk=blocks_per_chunk)
    answer(writer)
    model = RecordingModel(MODELS[window].config)
    cache = model.make_cache(64, SIZE)
    offload = DictOffload(cache, source.chunks, blocks_per_chunk=blocks_per_chunk, delay=2)
    result = answer(Engine(model, cache, offload=offload))
    chunk = blocks_per_chunk * SIZE
    assert result.loaded_tokens == len(PROMPT) // chunk * chunk == result.missing_tokens(chunk)
    assert result.computed_tokens == len(PROMPT) - result.loaded_tokens
    assert result.output == expected.output
    assert min(model.logits) == result.loaded_tokens, "nothing before the loaded prefix's end was computed"
    for position, logits in model.logits.items():
        assert torch.equal(logits, plain.logits[position]), f"logits differ at position {position}"


@windows
def test_wrong_bytes_change_the_tokens(window: int | None) -> None:
    expected = answer(make_engine(window)).output
    writer, source = make_offloaded(window)
    answer(writer)
    keys = list(source.chunks)
    source.chunks[keys[-1]] = source.chunks[keys[-2]]
    reader, _ = make_offloaded(window, source)
    assert answer(reader).output != expected


@windows
def test_a_load_of_a_window_group_brings_the_window_only(window: int | None) -> None:
    writer, source = make_offloaded(window)
    answer(writer)
    reader, offload = make_offloaded(window, source, delay=3)
    reader.add_request("r", PROMPT, 4)
    reader.step()
    held = [len(pool.references()) for pool in reader.cache.pools]
    # 72 loaded tokens; the next one sees from 72 - 20 = 52 on: blocks 6, 7, 8, and 9 is computed.
    assert held == ([10] if window is None else [10, 4])
    assert reader.run()[0].loaded_tokens == 72
    assert offload.loads_begun == 1


@windows
def test_a_failed_load_is_computed_and_never_tried_again(window: int | None) -> None:
    writer, source = make_offloaded(window)
    expected = answer(writer).output
    reader, offload = make_offloaded(window, source, delay=1, failing_loads=range(9))
    result = answer(reader)
    assert result.output == expected
    assert (result.failed_loads, result.loaded_tokens, result.computed_tokens) == (1, 0, len(PROMPT))
    assert offload.loads_begun == 1
    assert len(offload.lookups) == 1


@windows
def test_a_failed_load_falls_back_to_the_device_hits(window: int | None) -> None:
    writer, source = make_offloaded(window)
    expected = answer(writer).output
    reader, _ = make_offloaded(window, source, failing_loads={1})
    assert answer(reader, PROMPT[:40], name="head").loaded_tokens == 32
    result = answer(reader)
    assert (result.device_tokens, result.loaded_tokens, result.failed_loads) == (40, 0, 1)
    assert result.computed_tokens == len(PROMPT) - 40
    assert result.output == expected


def test_a_request_without_an_answer_waits_and_the_others_run() -> None:
    engine, offload = make_offloaded(None, unknown=3)
    engine.add_request("patient", PROMPT, 2)
    for _ in range(3):
        engine.step()
    assert len(offload.lookups) == 3
    offload.unknown_left[RequestId("patient")] = 10**6
    offload.unknown = 0
    engine.add_request("quick", PROMPT, 2)
    finished: list[str] = []
    while not finished:
        finished = [result.request_id for result in engine.step()]
    assert finished == ["quick"]
    offload.unknown_left[RequestId("patient")] = 0
    assert [result.request_id for result in engine.run()] == ["patient"]


def test_a_parked_request_lets_others_run_and_its_blocks_alone() -> None:
    writer, source = make_offloaded(None)
    expected = answer(writer).output
    reader, _ = make_offloaded(None, source, delay=200)
    reader.add_request("parked", PROMPT, 12)
    reader.step()
    reader.add_request("other", list(reversed(PROMPT)), 12)
    results = {result.request_id: result for result in reader.run()}
    assert list(results) == ["other", "parked"]
    assert tuple(results.values())[1].output == expected


def test_blocks_under_a_store_outlive_their_request() -> None:
    engine, offload = make_offloaded(None, num_blocks=13, delay=10**6)
    engine.add_request("a", PROMPT, 2)
    while engine.has_unfinished():
        engine.step()
    engine.check_integrity()
    assert engine.cache.pools[0].num_free == 3, "nine stored blocks are held, the tenth is free"
    # Two blocks are enough to start but not to go on: the engine waits for stores, then reuses their blocks.
    answer(engine, PROMPT[:15], 30, name="b")
    assert offload.stores_waited_for > 0
    assert len(offload.chunks) >= 9


@windows
def test_a_preempted_request_starts_over_and_says_the_same(window: int | None) -> None:
    prompts = {"old": PROMPT[:30], "young": PROMPT[40:70]}
    expected = {name: answer(make_engine(window), prompt, 40).output for name, prompt in prompts.items()}
    engine, _ = make_offloaded(window, num_blocks=14, delay=3)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, 40)
    results: dict[str, RequestResult] = {result.request_id: result for result in engine.run()}
    engine.check_integrity()
    assert list(results) == ["old", "young"], "the youngest goes first, so the oldest always gets on"
    assert results["old"].preemptions == 0
    assert results["young"].preemptions > 0
    assert {name: result.output for name, result in results.items()} == expected


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    engine = make_engine(None, num_blocks=4)
    with pytest.raises(ValueError, match="do not fit 24"):
        engine.add_request("r", PROMPT[:20], 6)
    with pytest.raises(ValueError, match="at least one"):
        engine.add_request("r", [], 6)
    engine.add_request("r", PROMPT[:20], 5)
    with pytest.raises(ValueError, match="in use"):
        engine.add_request("r", PROMPT[:20], 5)
    assert len(engine.run()) == 1


def test_the_adapter_hears_of_every_step_and_of_the_end_of_every_request() -> None:
    engine, offload = make_offloaded(None)
    engine.step()
    assert offload.steps == 1
    answer(engine, name="a")
    answer(engine, name="b")
    assert offload.finished == ["a", "b"]


requests = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 40), st.integers(1, 14)),
    min_size=1,
    max_size=6,
)
expected_outputs: dict[tuple[int | None, tuple[int, ...], int], tuple[int, ...]] = {}


@settings(max_examples=25, deadline=None)
@given(
    window=st.sampled_from([None, WINDOW]),
    requests=requests,
    num_blocks=st.integers(16, 40),
    config=st.builds(EngineConfig, max_running=st.integers(1, 4), tiles_per_step=st.integers(1, 5)),
    blocks_per_chunk=st.integers(1, 3),
    delay=st.integers(0, 5),
    unknown=st.integers(0, 2),
    failing_loads=st.sets(st.integers(0, 5)),
)
def test_no_cache_size_no_schedule_and_no_trouble_of_the_offload_changes_a_token(
    *,
    window: int | None,
    requests: list[tuple[int, int, int, int]],
    num_blocks: int,
    config: EngineConfig,
    blocks_per_chunk: int,
    delay: int,
    unknown: int,
    failing_loads: set[int],
) -> None:
    cache = MODELS[window].make_cache(num_blocks, SIZE)
    offload = DictOffload(
        cache, blocks_per_chunk=blocks_per_chunk, delay=delay, unknown=unknown, failing_loads=failing_loads
    )
    engine = Engine(MODELS[window], cache, config, offload)
    outputs: dict[tuple[int | None, tuple[int, ...], int], tuple[int, ...]] = {}
    for attempt in range(2):  # the second time around prefixes come from the device, the offload or both
        asked = {}
        for number, (family, shared, own, count) in enumerate(requests):
            prompt = (*TEXT[family * 200 : family * 200 + shared], *TEXT[number * 50 : number * 50 + own])
            asked[f"{attempt}-{number}"] = (window, prompt, count)
            engine.add_request(f"{attempt}-{number}", prompt, count)
        while engine.has_unfinished():
            for result in engine.step():
                outputs[asked[result.request_id]] = result.output
                parts = result.device_tokens + result.loaded_tokens + result.computed_tokens
                assert parts == result.prompt_tokens or result.preemptions
                assert result.loaded_tokens <= result.missing_tokens(blocks_per_chunk * SIZE)
            engine.check_integrity()
    for case, output in outputs.items():
        if case not in expected_outputs:
            expected_outputs[case] = answer(make_engine(window), case[1], case[2]).output
        assert output == expected_outputs[case]


CHAT = ChatConfig(conversations=4, turns=3, system_tokens=60, message_tokens=(10, 30), answer_tokens=(2, 6))


@windows
def test_a_chat_says_the_same_with_a_small_cache_a_large_one_and_an_offload(window: int | None) -> None:
    large = run_chat(make_engine(window, 200), TEXT, CHAT)
    small = run_chat(make_engine(window, 24), TEXT, CHAT)
    engine, offload = make_offloaded(window, num_blocks=24, delay=2, blocks_per_chunk=2)
    offloaded = run_chat(engine, TEXT, CHAT)
    outputs = [[result.output for result in results] for results in (large, small, offloaded)]
    assert outputs[0] == outputs[1] == outputs[2]
    cost = [sum(result.computed_tokens for result in results) for results in (large, small, offloaded)]
    assert cost[0] < cost[1]
    assert cost[2] < cost[1]
    assert offload.loads_begun > 0
    second, _ = make_offloaded(window, offload, num_blocks=24, blocks_per_chunk=2)
    hits = run_chat(second, TEXT, CHAT)
    assert [result.output for result in hits] == outputs[0]
    loaded, missing = (sum(r.loaded_tokens for r in hits), sum(r.missing_tokens(2 * SIZE) for r in hits))
    assert loaded > 0.9 * missing


def test_conversations_depend_on_text_seed_and_number_only_and_share_their_beginning() -> None:
    def ask(seed: int, number: int) -> list[int]:
        conversation = Conversation(TEXT, ChatConfig(seed=seed), number)
        first, _ = conversation.ask()
        conversation.hear((1, 2, 3))
        second, count = conversation.ask()
        assert second[: len(first) + 4] == [*first, 1, 2, 3, 259]
        assert 8 <= count <= 24
        return second

    assert ask(0, 0) == ask(0, 0)
    assert ask(0, 0)[:321] == ask(0, 1)[:321] == [256, *TEXT[:320]]
    assert len({tuple(ask(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="use a longer file"):
        Conversation(b"short", ChatConfig(), 0)
