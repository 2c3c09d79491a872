from __future__ import annotations

from kvtier_client.recent import RecentStores

A, B, C = b"aaaaa", b"bbbbb", b"ccccc"


def test_a_key_is_recent_from_the_moment_its_store_begins() -> None:
    recent = RecentStores()
    recent.begin([A])

    assert A in recent
    assert B not in recent


def test_the_oldest_keys_are_forgotten_first() -> None:
    recent = RecentStores(max_keys=2)
    recent.begin([A, B])
    recent.begin([A])
    recent.begin([C])

    assert (A in recent, B in recent, C in recent) == (True, False, True)


def test_a_miss_asked_after_the_store_ended_makes_the_key_worth_storing_again() -> None:
    recent = RecentStores()
    recent.begin([A])
    recent.end([A], now=1.0)
    recent.missed(A, asked_at=2.0)

    assert A not in recent


def test_a_miss_asked_before_the_store_ended_says_nothing() -> None:
    recent = RecentStores()
    recent.begin([A, B])
    recent.end([A], now=1.0)
    recent.missed(A, asked_at=0.5)
    recent.missed(B, asked_at=99.0)  # its store is still under way

    assert A in recent
    assert B in recent
