"""Where a program's work lies: its tile and head, its sequence, that sequence's rows in the backward's scratch."""

import triton
import triton.language as tl


@triton.jit
def place(program, tiles, heads_total, section):
    """(tile, batch_head) of a program: the heads of one section walk through their tiles together.

    A section is as many heads as have their keys and values in the L2 cache at once; within it the first programs get
    the first tile of every head.
    """
    size = tiles * section
    first = (program // size) * section
    here = tl.minimum(section, heads_total - first)
    within = program % size
    return within // here, first + within % here


@triton.jit
def sequence(cu_seqlens, b, longest, total, code, mailbox, VARLEN: tl.constexpr, CHECK: tl.constexpr):
    """(start, length) of sequence b. Bad contents are cut to what is in bounds and reported to the mailbox."""
    if VARLEN:
        start = tl.load(cu_seqlens + b)
        end = tl.load(cu_seqlens + b + 1)
        if CHECK:
            if (end < start) | ((b == 0) & (start != 0)):
                tl.store(mailbox + code, 1)
            if (end > total) | (end - start > longest):
                tl.store(mailbox + code + 1, 1)
        start = tl.minimum(tl.maximum(start, 0), total)
        length = tl.minimum(tl.minimum(tl.maximum(end - start, 0), longest), total - start)
    else:
        start = 0
        length = longest
    return start, length


@triton.jit
def past_end(cu_seqlens, batch, total):
    """The first line that belongs to no sequence."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), total)


@triton.jit
def scratch_row(b, h, heads, q_start, padded, VARLEN: tl.constexpr):
    """Where a sequence's rows start in the backward's scratch; every sequence has room up to a multiple of 128 rows."""
    if VARLEN:
        at = h * padded + (q_start + 128 * b) // 128 * 128
    else:
        at = (b * heads + h) * padded
    return tl.multiple_of(at, 128)
