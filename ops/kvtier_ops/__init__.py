"""How bytes move between an engine's device blocks and the pool, shared by engines and the daemon.

Owns the pool mapping, where a chunk's bytes lie in a slot, the plan of a job, the copies and the
checksums. Knows nothing of keys' meaning, leases, RPCs or policies, and imports nothing of ours.
"""
