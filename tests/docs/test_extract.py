"""The extractor by itself, on documents made for it."""

from __future__ import annotations

from .extract import commands, program_of

TEXT = """# Title

Type `kvtier status`, or `make
demo`; not `kvtier-0-default`, nor `kv_role`.

```
kvtier health          # a comment
KVTIER_ADDRESS=unix:///x kvtier \\
    status
```

```console
$ make test
12 passed
$ unheard-of --option
```

```
PASS  daemon     kvtier serve
```

```toml
kvtier = "status"
```

```sh
# a comment by itself

for x in 1 2; do echo $x; done
```
"""


def test_commands_are_found_with_their_lines_and_output_is_not() -> None:
    found = [(shown.line, shown.text) for shown in commands("x.md", TEXT)]
    assert found == [
        (3, "kvtier status"),
        (3, "make demo"),
        (7, "kvtier health"),
        (8, "KVTIER_ADDRESS=unix:///x kvtier status"),
        (13, "make test"),
        (15, "unheard-of --option"),
        (29, "for x in 1 2; do echo $x; done"),
    ]


def test_a_shown_command_says_where_it_stands() -> None:
    (first, *_) = commands("x.md", TEXT)
    assert str(first) == "x.md:3: kvtier status"


def test_the_program_stands_behind_its_variables() -> None:
    assert program_of("A=1 B_2=x kvtier status") == "kvtier"
    assert program_of("A=1") == ""
