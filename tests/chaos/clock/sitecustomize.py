"""Sets this process's clock back by an hour from the moment that the file CHAOS_FLAG exists."""

import os
import time

_FLAG, _BACK_S = os.environ["CHAOS_FLAG"], 3600
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() - _BACK_S * os.path.exists(_FLAG)
time.time_ns = lambda: _time_ns() - _BACK_S * 10**9 * os.path.exists(_FLAG)
