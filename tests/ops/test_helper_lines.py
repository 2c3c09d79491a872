from __future__ import annotations

import os
import resource
import subprocess
import sys
from queue import SimpleQueue

from kvtier_ops.helper_lines import MAX_SAID_BYTES, relay_lines


def said_by(program: str) -> str:
    said: SimpleQueue[str] = SimpleQueue()
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        relay_lines(process.stderr, said.put)
        return said.get(timeout=30)


def test_a_trace_of_many_lines_is_one_line_of_the_log() -> None:
    trace = said_by("def f(n):\n  return f(n - 1) if n else 1 / 0\nf(3)")
    assert trace.startswith("Traceback")
    assert trace.endswith("ZeroDivisionError: division by zero")


def test_words_come_through_where_more_than_1024_files_are_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert said_by("import sys; sys.stderr.write('it is ' + 'here')") == "it is here"
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_of_what_never_ends_the_end_is_kept() -> None:
    said = said_by(f"import sys; sys.stderr.write('x' * {3 * MAX_SAID_BYTES} + 'the end')")
    assert said.endswith("the end")
    assert len(said) <= MAX_SAID_BYTES


def test_a_process_that_says_nothing_causes_no_line() -> None:
    said: SimpleQueue[str] = SimpleQueue()
    with subprocess.Popen([sys.executable, "-c", "pass"], stderr=subprocess.PIPE) as process:
        relay_lines(process.stderr, said.put)
    process.wait(30)
    assert said.empty()
