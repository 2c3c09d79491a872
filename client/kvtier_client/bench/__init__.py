"""What `kvtier bench` measures on the machine of whoever types it, and what the benchmarks share with it.

Each kind is a file: `lookups.py` asks, `copies.py` moves bytes, `replayer.py` plays the requests of
`traces.py`; every figure stands beside a floor that was measured in turns with it, in the same run.
`block_client.py` is the engine that they all use. `__main__.py` is the process behind `kvtier bench`, which
parses its options and knows nothing of this package: the client's side and the server's side never meet in
one program.
"""
