from __future__ import annotations
import time
from ..daemon_process import DaemonProcess

def test_x(tmp_path, start_daemon) -> None:
    t=time.time()
    d = start_daemon()
    print(time.time()-t, d.metrics_port)
    print(d.status())
    print(d.num_fds(), d.num_threads())
    assert d.stop() == 0
    print(d.out_text(), d.log_text(), time.time()-t)
    t=time.time()
    d.restart()
    print(time.time()-t)
    d.restart()
    print(time.time()-t)
