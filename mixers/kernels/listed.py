"""Which queries of a chunk list a sub-key: one bit for each, and the step of the sub-keys from those queries alone."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from mixers.kernels.chunk import token_of
from mixers.kernels.key_step import step_coefficients

# Bits of a word, and words that :func:`pulled_by_list` looks through together.
WORD_BITS = tl.constexpr(32)
WORDS = tl.constexpr(16)
# The interpreter has none of the device's own functions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def note_queries(table, query, index, listed, noted, n_words, SUBKEYS: tl.constexpr):
    """Set the bits of ``query`` (rows,) in ``noted`` (M,H,2,n,n_words) for the sub-keys ``index`` (rows, columns) of
    its ``table`` (rows,)."""
    word = (table.to(tl.int64) * SUBKEYS)[:, None] + index
    bit = (tl.full(query.shape, 1, tl.int32) << (query % WORD_BITS))[:, None]
    tl.atomic_or(
        noted + word * n_words + (query // WORD_BITS)[:, None], tl.broadcast_to(bit, index.shape), listed, sem="relaxed"
    )


@triton.jit
def n_set_bits(x):
    """How many bits of int32 x are 1."""
    if not INTERPRETED:
        return libdevice.popc(x)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def place_of_bit(word, rank):
    """Where the set bit number ``rank``, counted from 0 and the lowest bit, of int32 ``word`` stands."""
    place = tl.zeros(word.shape, dtype=tl.int32)
    word, rank, place = narrow(word, rank, place, 16)
    word, rank, place = narrow(word, rank, place, 8)
    word, rank, place = narrow(word, rank, place, 4)
    word, rank, place = narrow(word, rank, place, 2)
    word, rank, place = narrow(word, rank, place, 1)
    return place


@triton.jit
def narrow(word, rank, place, WIDTH: tl.constexpr):
    """Of 2 * WIDTH bits the WIDTH that hold the one sought, its rank among them, and ``place`` moved to their start."""
    low = word & ((1 << WIDTH) - 1)
    n_low = n_set_bits(low)
    is_above = rank >= n_low
    high = (word >> WIDTH) & ((1 << WIDTH) - 1)
    return (
        tl.where(is_above, high, low),
        tl.where(is_above, rank - n_low, rank),
        tl.where(is_above, place + WIDTH, place),
    )


@triton.jit
def find_query(words, n_words, entry):
    """The query number ``entry`` of each list, in order of the queries, and how many there are.

    ``words`` points to the first word of each list, of which ``n_words``, at most WORDS, are looked at.
    """
    n_seen = tl.zeros(entry.shape, dtype=tl.int32)
    word = tl.zeros(entry.shape, dtype=tl.int32)
    rank = tl.zeros(entry.shape, dtype=tl.int32)
    first = tl.zeros(entry.shape, dtype=tl.int32)
    for w in tl.static_range(WORDS):
        here = tl.load(words + w, (n_seen >= 0) & (w < n_words), 0)
        n_here = n_set_bits(here)
        is_mine = (entry >= n_seen) & (entry < n_seen + n_here)
        word = tl.where(is_mine, here, word)
        rank = tl.where(is_mine, entry - n_seen, rank)
        first = tl.where(is_mine, w * WORD_BITS, first)
        n_seen += n_here
    return first + place_of_bit(word, rank), n_seen


@triton.jit
def sum_listed(
    row, entry, n_key_rows, first_word, room, index_room, q, noted, indices, measures, probabilities, uses, use_scale,
    lr, address_weight, n_shares, n_words, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr,
    IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x_ti q_t (ROWS, BLOCK_D) and x_ti (ROWS,) of entries f, each of sub-key ``row`` the query number ``entry`` that
    words ``first_word`` and on list for it, summed over equal f % ROWS; and how many each list holds.

    The coefficients x are found together; ``room`` and ``index_room`` keep them and their queries' rows, of which
    BLOCK_E * ROWS are under way together.
    """
    flat = tl.arange(0, entry.shape[0])
    table = row // SUBKEYS
    memory = table // (2 * HEADS)
    half_head = table % (2 * HEADS)
    words = noted + row.to(tl.int64) * n_words + first_word
    query, n_listed = find_query(words, tl.where(row < n_key_rows, n_words - first_word, 0), entry)
    exists = entry < n_listed
    query = tl.where(exists, first_word * WORD_BITS + query, 0)
    q_row = token_of(query, memory, n_rows, n_chunk, n_tokens, start) * (2 * HEADS) + half_head
    listed = exists[:, None] & (tl.arange(0, BLOCK_K) < TOP_K)[None, :]
    index, coefficient = step_coefficients(
        q_row, listed, (memory * 2 + half_head % 2)[:, None], indices, measures, probabilities, uses, use_scale, lr,
        address_weight, n_shares, SUBKEYS, TOP_K, IDW, IDW_EPS, ENTROPY_EPS, BLOCK_K,
    )  # fmt: skip
    x = tl.sum(tl.where(listed & (index == (row % SUBKEYS)[:, None]), coefficient, 0.0), axis=1)
    first_q = start * (2 * HEADS)
    tl.store(room + flat, x)
    tl.store(index_room + flat, tl.where(exists, (q_row - first_q).to(tl.int32), -1))
    tl.debug_barrier()
    pulled = tl.zeros((ROWS, BLOCK_D), dtype=q.dtype.element_ty)
    total = tl.zeros((ROWS,), dtype=q.dtype.element_ty)
    few = tl.arange(0, BLOCK_E * ROWS)
    d = tl.arange(0, BLOCK_D)
    n_flat = tl.max(tl.where(exists, flat + 1, 0), axis=0)
    for done in tl.range(0, n_flat, BLOCK_E * ROWS, loop_unroll_factor=2):
        x_few = tl.load(room + done + few)
        row_few = tl.load(index_room + done + few)
        place = q + (row_few.to(tl.int64) + first_q)[:, None] * HALF + d[None, :]
        rows = tl.load(place, (row_few >= 0)[:, None] & (d < HALF)[None, :], 0.0)
        # By entry, then f % ROWS: a thread holds what it adds up.
        pulled += tl.sum(tl.reshape(x_few[:, None] * rows, (BLOCK_E, ROWS, BLOCK_D)), axis=0)
        if IDW:
            total += tl.sum(tl.reshape(x_few, (BLOCK_E, ROWS)), axis=0)
    tl.debug_barrier()
    return pulled, total, n_listed


@triton.jit
def pulled_by_list(
    first_row, n_key_rows, room, index_room, q, noted, indices, measures, probabilities, uses, use_scale, lr,
    address_weight, n_shares, n_words, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr,
    IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_t x_ti q_t (ROWS, BLOCK_D) and sum_t x_ti (ROWS,) of sub-keys ``first_row`` and on, x from
    :func:`mixers.kernels.key_step.step_coefficients`, over the queries that ``noted`` lists, in their order.

    Their bits are cleared for the next chunk. First the first BLOCK_L queries of all sub-keys, then what longer lists
    have left, one list after the other. ``room`` and ``index_room`` (BLOCK_L * ROWS,) are this program's own. Bytes per
    chunk: H k K/2 elements of q for each half query, gathered (from the L2 cache), and n_words words a sub-key.
    """
    pulled = tl.zeros((ROWS, BLOCK_D), dtype=q.dtype.element_ty)
    total = tl.zeros((ROWS,), dtype=q.dtype.element_ty)
    r = tl.arange(0, ROWS)
    flat = tl.arange(0, BLOCK_L * ROWS)
    for first_word in range(0, n_words, WORDS):
        # The list that has all entries for itself: -1 before there is one.
        one = -1
        first_entry = 0
        counts = tl.zeros((BLOCK_L * ROWS,), dtype=tl.int32)
        while one < ROWS:
            row = first_row + tl.where(one < 0, flat % ROWS, one)
            entry = first_entry + tl.where(one < 0, flat // ROWS, flat)
            some, some_total, n_listed = sum_listed(
                row, entry, n_key_rows, first_word, room, index_room, q, noted, indices, measures, probabilities, uses,
                use_scale, lr, address_weight, n_shares, n_words, n_rows, n_chunk, n_tokens, start,
                HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, ENTROPY_EPS, ROWS, BLOCK_E, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            if one < 0:
                pulled += some
                total += some_total
                counts = n_listed
                first_entry = BLOCK_L
                one = tl.where(tl.max(counts, axis=0) > BLOCK_L, 0, ROWS)
            else:
                pulled += tl.where((r == one)[:, None], tl.sum(some, axis=0)[None, :], 0.0)
                total += tl.where(r == one, tl.sum(some_total, axis=0), 0.0)
                first_entry += BLOCK_L * ROWS
            while (one < ROWS) & (tl.max(tl.where(flat % ROWS == one, counts, 0), axis=0) <= first_entry):
                one += 1
                first_entry = BLOCK_L
    # Other threads of the program may still read them.
    tl.debug_barrier()
    row = first_row + r
    for first_word in range(0, n_words, WORDS):
        w = first_word + tl.arange(0, WORDS)
        there = (row < n_key_rows)[:, None] & (w < n_words)[None, :]
        tl.store(noted + row.to(tl.int64)[:, None] * n_words + w[None, :], tl.zeros((ROWS, WORDS), tl.int32), there)
    return pulled, total
