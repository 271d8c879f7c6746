"""A plugin that a worker can't import as long as the file CHAOS_FLAG exists; a driver can."""

import os
import sys

from mixers.registry import register
from mixers.softmax import SoftmaxAttention

if "sweeps.worker" in sys.orig_argv and os.path.exists(os.environ["CHAOS_FLAG"]):
    raise RuntimeError("this plugin is broken")


@register("chaos_broken")
class Broken(SoftmaxAttention):
    """Softmax attention that no arm uses."""
