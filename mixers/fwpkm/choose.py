"""Which implementation ``impl="auto"`` takes: measured, not derived."""

from __future__ import annotations

SMALLEST_SPARSE_TABLE = 1024


def sparse_is_faster(n_slots: int) -> bool:
    """Whether a memory of ``n_slots`` slots is faster without passes over its table, on a CPU.

    Time of ``reference`` over that of ``sparse``, forward / forward and backward (K = V, H = 1, float32, one thread of
    a Xeon that others used too, smallest CPU time of several interleaved repeats):

        B   T    n    V    C   k    scope sequence   scope shared
        64  64   10   40   8   4    0.99 /  0.97     0.85 / 0.89
        16  64   32   64   16  8    1.40 /  1.26     1.02 / 0.98
        16  256  32   64   64  8    1.28 /  1.03     1.18 / 1.08
        64  64   32   64   32  8    1.39 /  1.26     1.19 / 1.16
        16  128  64   64   32  8    2.01 /  2.15     0.99 / 1.02
        16  256  64   128  64  8    3.10 /  2.68     1.24 / 1.36
        16  128  128  64   16  8    8.65 / 10.76     not measured

    So the size of the table decides; from n = 32 on ``sparse`` is at most 2 % slower in these cases. Between n = 10
    and 32, with several heads, and on GPUs nothing was measured.
    """
    return n_slots >= SMALLEST_SPARSE_TABLE
