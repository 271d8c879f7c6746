"""A plugin that a worker can't import as long as the file CHAOS_FLAG exists; a driver can."""

import os
import sys

if "sweeps.worker" in sys.orig_argv and os.path.exists(os.environ["CHAOS_FLAG"]):
    raise RuntimeError("this plugin is broken")
