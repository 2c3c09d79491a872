"""`python -m kvtier_server` is `kvtier`: for environments where the script is not on the PATH."""

from __future__ import annotations

import sys

from kvtier_server.cli import main

sys.exit(main())
