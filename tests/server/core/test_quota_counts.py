from __future__ import annotations

from kvtier_server.core.books import MAX_COUNTED_TENANTS, OTHER_TENANTS

from .rig import Rig


def test_refusals_by_quota_of_countless_tenants_take_bounded_memory_and_none_is_lost() -> None:
    books = Rig(16).core.books
    for number in range(2 * MAX_COUNTED_TENANTS):
        books.count_quota_refused(f"tenant-{number}", 2)
    books.count_quota_refused("tenant-0", 1)
    assert books.quota_refused["tenant-0"] == 3
    assert books.quota_refused[OTHER_TENANTS] == 2 * MAX_COUNTED_TENANTS
    assert len(books.quota_refused) == MAX_COUNTED_TENANTS + 1
