"""The daemon's one state machine: instances, leases, stores and what they do to the tiers.

Pure: no I/O, no clock, no threads, no gRPC. One thread at a time; time comes in as nanoseconds of a clock
that never goes back and counts suspend (CLOCK_BOOTTIME).
"""
