"""`python -m kvtier_client.demo.load`: a small real engine that works for ever on a daemon that runs already.

Owns rounds: each is a new engine process, which has the chats of one of a few seeds, turn by turn, and ends.
What earlier rounds stored is found again, so the daemon sees stores, hits and engines that come and go, and
evictions where its pool is small. Starts and stops no daemon, and works without one too.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kvtier_client.demo.engine_process import Answer, ChatSpec, EngineEnded, EngineProcess, EngineSpec
from kvtier_client.demo.text import load_text

SEEDS = 4
"""Different chats: after so many rounds everything has been said before."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much is done. Four seeds of the defaults leave about 200 MB of chunks."""

    address: str
    rounds: int = 0
    """0 = for ever."""
    conversations: int = 16
    turns: int = 5
    num_blocks: int = 256
    """Device blocks of the engine: too few for all conversations."""


def run(load: Load, text: bytes) -> None:
    """Work round by round; a line on stdout after each. Raises EngineEnded."""
    with tempfile.TemporaryDirectory(prefix="kvtier-load-") as name:
        directory = Path(name)
        text_file = directory / "text"
        text_file.write_bytes(text)
        number = 0
        while not load.rounds or number < load.rounds:
            chat = ChatSpec(str(text_file), load.conversations, seed=number % SEEDS)
            spec = EngineSpec(
                f"load-{socket.gethostname()}-{os.getpid()}", chat, load.address, num_blocks=load.num_blocks
            )
            with EngineProcess(spec, directory) as engine:
                engine.wait_started()
                answers = [answer for _ in range(load.turns) for answer in engine.turn()]
            number += 1
            print(f"round {number}: {summary(answers)}", flush=True)


def summary(answers: Sequence[Answer]) -> str:
    """Say what a round computed and loaded."""
    missing = sum(answer.missing_tokens for answer in answers)
    loaded = sum(answer.loaded_tokens for answer in answers)
    first_token_s = sum(answer.first_token_s for answer in answers) / len(answers)
    return (
        f"{len(answers)} requests, {sum(answer.prompt_tokens for answer in answers)} prompt tokens, "
        f"{loaded / missing if missing else 0.0:.1%} of what the device lacked was loaded, "
        f"ttft {first_token_s * 1000:.0f} ms"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Work until SIGTERM or Ctrl-C: exit code 0. 1 = the engine ended by itself, 2 = nothing to work with."""
    parser = argparse.ArgumentParser(prog="python -m kvtier_client.demo.load", description=__doc__)
    parser.add_argument("--address", default=os.environ.get("KVTIER_ADDRESS"), help="(else KVTIER_ADDRESS)")
    parser.add_argument("--rounds", type=int, default=0, help="0 = for ever, the default")
    parser.add_argument("--conversations", type=int, default=16, help="chats in a round (default: 16)")
    parser.add_argument("--turns", type=int, default=5, help="of each chat (default: 5)")
    parser.add_argument("--num-blocks", type=int, default=256, help="of the engine's cache (default: 256)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the chats are cut from")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        if options.address is None:
            raise ValueError("no address of a daemon; give --address, or KVTIER_ADDRESS")
        text, _ = load_text(options.text)
        load = Load(options.address, options.rounds, options.conversations, options.turns, options.num_blocks)
        run(load, text)
    except (OSError, ValueError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except EngineEnded as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
