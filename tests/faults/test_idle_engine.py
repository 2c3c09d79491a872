"""An engine that has nothing to do for a week is not forgotten."""

from __future__ import annotations

from tests.server.core.engine import HIT, to_keys
from tests.server.core.rig import Rig
from tests.server.core.slots_in_memory import SECOND_NS

WEEK_S = 7 * 24 * 3600
TICK_S = 5


def test_r5_an_engine_idle_for_a_week_is_still_attached_and_its_first_load_works() -> None:
    """R5: a week of the core's clock, in ticks of 5 s; a session lives as long as its stream."""
    rig = Rig()
    engine = rig.engine()
    engine.store(range(8))
    credits_held = engine.credits(4)
    sessions = set(rig.core.books.instances.sessions)
    begin_ns = rig.clock.now_ns

    for _ in range(WEEK_S // TICK_S):
        rig.tick(TICK_S)

    assert rig.clock.now_ns - begin_ns == WEEK_S * SECOND_NS
    assert engine.is_attached
    assert set(rig.core.books.instances.sessions) == sessions
    assert not rig.notices("ended")
    lease = engine.new_lease_id()
    answer = engine.lookup(to_keys(range(8)), lease=lease)
    assert list(answer.statuses) == [HIT] * 8
    assert None not in engine.load(range(8))
    engine.release(lease)
    assert len(engine.return_credits(credits_held)) == 4
    rig.tick()
    rig.assert_nothing_is_held()
