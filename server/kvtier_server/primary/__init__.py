"""The primary tier: which key is in which slot of the pool, and in what state. Pure: no I/O, no clock."""
