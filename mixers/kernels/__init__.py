"""Triton kernels of the product-key memories. A file is one kernel and the function that launches it, or a step
of the chains (``*_chain*.py``), which are one launch for all chunks of a call: its programs meet between the steps
(``barrier.py``). Interpreted, a chain is one program, which does all of each step.

Importing a module of this package needs the package ``triton``; nothing in ``mixers`` imports one before it is asked
for (``impl="triton"``). On the CPU the kernels run in triton's interpreter only (``TRITON_INTERPRET=1``), for tests.

Letters: M memories, R sequences per memory, T tokens of the call, C tokens of the chunk, S = R*C queries of a memory
in the chunk, H heads, K key width, k slots per head, J = H*k slots per token, n sub-keys per half, N = n*n, V values.

Sums are made in a fixed order by one program each: there is no floating-point atomic, so equal inputs give
equal bits.
"""
