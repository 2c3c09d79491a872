from __future__ import annotations

import asyncio
from collections.abc import Iterator

from kvtier_server.admin.slices import SLICE_S, run_in_slices, run_in_turn


def work(steps: int, begun: list[int], number: int) -> Iterator[None]:
    for _ in range(steps):
        begun.append(number)
        loop = asyncio.get_running_loop()
        until = loop.time() + SLICE_S  # a step that takes all of a slice
        while loop.time() < until:
            pass
        yield


def test_however_many_operators_ask_another_call_waits_for_one_slice() -> None:
    begun: list[int] = []
    between: list[int] = []

    async def engine() -> None:
        while True:
            before = len(begun)
            await asyncio.sleep(0)
            between.append(len(begun) - before)

    async def main() -> None:
        other = asyncio.create_task(engine())
        await asyncio.gather(*(run_in_slices(work(4, begun, number)) for number in range(20)))
        other.cancel()

    asyncio.run(main())
    assert len(begun) == 80
    assert max(between) <= 1
    assert begun[:20] == list(range(20)), "each in its turn"


def test_what_is_done_in_turn_is_answered_and_leaves_the_turn_when_it_fails() -> None:
    def fail() -> None:
        raise LookupError("nothing there")

    async def main() -> list[object]:
        return list(
            await asyncio.gather(
                run_in_turn(lambda: 1), run_in_turn(fail), run_in_turn(lambda: 2), return_exceptions=True
            )
        )

    first, failed, second = asyncio.run(main())
    assert (first, second) == (1, 2)
    assert isinstance(failed, LookupError)
