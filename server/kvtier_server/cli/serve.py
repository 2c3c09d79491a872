"""Run the daemon in the foreground until SIGTERM or Ctrl-C; SIGHUP makes it read its settings again.

  kvtier serve --pool-bytes 64GiB
  kvtier serve --config /etc/kvtier.toml      tiers below the pool, limits: kvtier config default
  kvtier serve --fresh                        forget what the last daemon left in the pool

Settings come from the options, else the environment (KVTIER_POOL__BYTES), else the file, else the defaults.
Exit code: 0 stopped, 1 another daemon has the pool, 2 a mistake in the settings or too little memory.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from pathlib import Path

SUMMARY = "run the daemon in the foreground"

# Named by their setting (kvtier_server.config.OPTIONS), which is not imported here: pydantic costs 0.1 s.
_OPTIONS = {
    "--address": ("server.address", "ADDRESS", "unix:///path or host:port to listen on"),
    "--name": ("server.name", "NAME", "name of the pool; one daemon per name (default: default)"),
    "--pool-bytes": ("pool.bytes", "SIZE", "size of the pool (default: 4GiB)"),
    "--metrics-address": ("server.metrics_address", "HOST:PORT", "for /metrics (default: 127.0.0.1:9471)"),
    "--policy": ("pool.policy", "NAME", "which chunk is evicted first (default: lru)"),
    "--log-level": ("server.log_level", "LEVEL", "debug, info, warning or error (default: info)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    for option, (setting, metavar, text) in _OPTIONS.items():
        parser.add_argument(option, dest=setting, metavar=metavar, help=text)
    parser.add_argument(
        "--fresh",
        dest="pool.fresh",
        action="store_const",
        const="true",
        help="drop what an earlier daemon left in the pool",
    )


def given_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the options that were typed, by the dotted path of their setting."""
    return {name: value for name, value in vars(args).items() if "." in name and value is not None}


def run(args: argparse.Namespace) -> int:
    """Read the settings, then serve."""
    # Until the loop runs, which stops in order: nothing is served yet, and what is half made may be left so.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from kvtier_server.config import ConfigErrors, load_config, read_config

    sources = given_flags(args), args.config, os.environ
    try:
        config, given = read_config(*sources)
    except ConfigErrors as errors:
        for error in errors.errors:
            print(f"kvtier serve: {error}", file=sys.stderr)
        return 2
    # gRPC's own lines are no JSON, nobody limits them, and strangers cause them, by handshakes that fail.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from kvtier_server.daemon import run as serve_daemon

    return serve_daemon(config, functools.partial(load_config, *sources), given)
