"""What telling callers apart and making spans costs a lookup: as ratios to a plain unix socket, in one run.

Daemons of each kind serve side by side, calls go round among them, and medians are compared: the machines
that run this are noisy. The second row is the same kind as the first, and says how noisy.

    python -m tests.benchmarks.bench_guarded [--json FILE] [--rounds 2000] [--keys 64]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from kvtier.v1 import offload_pb2 as pb

from ..certificate_authority import CertificateAuthority, tls_section
from ..daemon_process import DaemonProcess
from ..integration.collector import Collector
from ..raw_engine import RawEngine, to_key

HEADER = (("traceparent", f"00-{'1' * 32}-{'2' * 16}-01"),)


def run(rounds: int, num_keys: int) -> list[dict[str, object]]:
    """Return a row a kind: its median in microseconds and the ratio to the first."""
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = CertificateAuthority(files / "ca")
        port = stack.enter_context(Collector()).port
        otel = f'[otel]\nendpoint = "http://127.0.0.1:{port}"\nshare = 0.0\n'
        tls = tls_section(authority.issue_for_daemon(), tenants={"engine": "t"})
        admin = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-run-"))
        kinds = {
            "unix socket": ("", ()),
            "the same": ("", ()),
            "with server.admin_address": (f'[server]\nadmin_address = "unix://{admin}/a/a.sock"\n', ()),
            "TCP with mTLS": (tls, ()),
            "[otel], call not traced": (otel, ()),
            "[otel], call traced": (otel, HEADER),
        }
        calls = []
        for kind, (config, metadata) in kinds.items():
            daemon = stack.enter_context(DaemonProcess(files, config=config)).start()
            channel = authority.issue("engine").channel(daemon.tcp_port) if daemon.tcp_port else None
            engine = stack.enter_context(RawEngine(daemon.address, channel=channel)).attach()
            keys = [to_key(number) for number in range(num_keys)]
            engine.store(keys)
            request = pb.LookupRequest(
                session_id=engine.session_id, context=pb.RequestContext(request_id="r"), keys=keys
            )
            calls.append((kind, engine.stub.Lookup, request, metadata))
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds + 100):
            for kind, lookup, request, metadata in calls:
                start = time.perf_counter()
                lookup(request, metadata=metadata)
                if number >= 100:  # the first ones warm everything up
                    times[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(taken) * 1e6 for kind, taken in times.items()}
    plain = medians["unix socket"]
    return [
        {"what": kind, "median_us": round(median, 1), "ratio": round(median / plain, 3)}
        for kind, median in medians.items()
    ]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=2000, help="calls of each kind (default: 2000)")
    parser.add_argument("--keys", type=int, default=64, help="keys of a lookup (default: 64)")
    args = parser.parse_args()
    rows = run(args.rounds, args.keys)
    print(f"{f'lookup of {args.keys} keys':32}{'median':>12}{'ratio':>8}   ({os.cpu_count()} CPUs)")
    for row in rows:
        print(f"{row['what']:32}{row['median_us']:>9} us{row['ratio']:>8}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
