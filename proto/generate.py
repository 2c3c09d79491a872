"""Write the Python code of kvtier/v1/*.proto: messages, gRPC stubs and their types.

Owns which generator in which version with which options; `make proto` and the test "regenerate = no
difference" both go through here. It changes nothing in the .proto files and judges none of their style
(`buf lint` does).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from importlib.resources import files
from pathlib import Path

PROTO_ROOT = Path(__file__).resolve().parent

# The generated code refuses a runtime older than its generator, and engines pin old runtimes: a newer
# generator is a change of what kvtier can be installed beside. mypy-protobuf writes only types, but another
# version writes them differently, and the checked-in files would change with the machine that made them.
GENERATORS = {"grpcio-tools": "1.76.0", "mypy-protobuf": "5.1.0"}


class GenerateError(Exception):
    """The code was not written; the message says why and what to do."""


def generate(out_dir: Path) -> list[Path]:
    """Generate into `out_dir`, laid out like this folder; return the .proto files read, sorted."""
    _check_generators()
    from grpc_tools import protoc

    sources = sorted(PROTO_ROOT.glob("kvtier/*/*.proto"))
    if not sources:
        raise GenerateError(f"no .proto file below {PROTO_ROOT / 'kvtier'}")
    out_dir.mkdir(parents=True, exist_ok=True)
    # protoc finds the mypy plugins by PATH, and this interpreter's environment may not be activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={out_dir}",
            f"--grpc_python_out={out_dir}",
            f"--mypy_out=quiet:{out_dir}",
            # Not --pyi_out: its stubs are untyped calls to strict mypy. Without sync_only or async_only the
            # types fit both grpc and grpc.aio.
            f"--mypy_grpc_out=quiet:{out_dir}",
            *(str(source.relative_to(PROTO_ROOT)) for source in sources),
        ]
    )
    if status != 0:
        raise GenerateError(f"protoc ended with status {status}; its messages above name the file and line")
    return sources


def _check_generators() -> None:
    for package, wanted in GENERATORS.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            raise GenerateError(f"{package} is {found}, must be {wanted}: run `make venv`, then `make proto`")


def main(argv: list[str] | None = None) -> int:
    """Generate in place, or below `--out`; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the Python code of kvtier/v1/*.proto.")
    parser.add_argument("--out", type=Path, default=PROTO_ROOT, help="folder to write to (default: in place)")
    out_dir = parser.parse_args(argv).out
    try:
        sources = generate(out_dir)
    except GenerateError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    print(f"proto: generated {len(sources)} files' code into {os.path.relpath(out_dir)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
