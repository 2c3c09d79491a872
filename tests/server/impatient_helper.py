"""A copy process that looks at itself all the time and allows a copy two seconds: for tests of that look."""

from __future__ import annotations

import sys

from kvtier_server.transfer import helper

if __name__ == "__main__":
    vars(helper).update(ALIVE_S=0.1, HANG_S=2.0)
    helper.main(sys.argv[1:])
