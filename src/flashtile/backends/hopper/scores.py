"""From a tile of raw products in registers to scores, and from weights to those that dropout keeps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.tiles import accumulator
from flashtile.gpu.philox import random_words
from flashtile.gpu.scores import LOG2E, score, tanh

MINUS_INFINITY = gl.constexpr(float("-inf"))


@gluon.jit
def load_bias(rows, change, key, BLOCK_N: gl.constexpr):
    """The bias of a tile of scores, early enough for its latency to pass under a product; 0 where there is none to load
    by pointers.
    """
    if change.BIAS == "none" or change.BIAS_TILES:
        return 0.0
    else:
        col = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, accumulator(BLOCK_N)))
        at = (rows.row - rows.first)[:, None] * (change.stride_bm * change.BIAS_ALIGN) + col[None, :] * change.BIAS_STEP
        inside = (rows.row < rows.q_len)[:, None] & (col < rows.k_len // change.BIAS_ALIGN * change.BIAS_ALIGN)[None, :]
        return gl.load(rows.bias + at, mask=inside, other=0.0)


@gluon.jit
def _hide(s, rows, key, LEFT: gl.constexpr):
    """Scores with those of keys that their rows do not see at -inf."""
    BLOCK_N: gl.constexpr = s.shape[1]
    lane = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, accumulator(BLOCK_N)))
    # The bits of a column that differ between threads go to the other side: constants remain to compare with.
    fixed = (lane & ~6)[None, :]
    start = key + (lane & 6)[None, :]
    if LEFT:
        # One comparison for both ends: what lies before the first key is a large number without a sign.
        width = gl.maximum(rows.end - rows.begin, 0).to(gl.uint32)
        seen = (fixed + (start - rows.begin[:, None])).to(gl.uint32) < width[:, None]
    else:
        seen = fixed < rows.end[:, None] - start
    return gl.where(seen, s, MINUS_INFINITY)


@gluon.jit
def scores(s, rows, change, key, bias, masked, MASKED: gl.constexpr):
    """(S, unit) of raw products: scores in base 2 are S times unit, a positive factor that is left to the exponent.

    masked: whether some keys of this tile are hidden; MASKED: whether they are of any.
    """
    BLOCK_N: gl.constexpr = s.shape[1]
    col = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, accumulator(BLOCK_N)))
    unit = gl.to_tensor(1.0)
    if change.FOLD:
        unit = change.scale * LOG2E
    elif change.SOFTCAP != "none" and not change.ALIBI and change.BIAS == "none":
        s = tanh(s * (change.scale / change.softcap), change.SOFTCAP)
        unit = change.softcap * LOG2E
    elif change.SOFTCAP == "none" and not change.ALIBI and change.BIAS == "additive":
        s = s * change.scale + bias.to(gl.float32)
        unit = gl.to_tensor(LOG2E)
    else:
        s, _ = score(
            s, rows.row[:, None], col[None, :], rows.k_len - rows.q_len, change.scale, change.softcap, rows.slope,
            bias, change.SOFTCAP, change.ALIBI, change.BIAS,
        )  # fmt: skip
    if MASKED:
        if masked:
            s = _hide(s, rows, key, change.LEFT)
    return s, unit


# Two values at once, kept where their half w of the random word is at least the threshold b. The halves are compared
# without a carry between them: the top bit of (w & ~b) | (~(w ^ b) & ((w | 0x8000) - (b & 0x7fff))), which prmt then
# spreads over a word.
_DROP = gl.constexpr("""{
.reg .b32 t, b, p0, p1, m0, m1;
or.b32 t, $4, 0x80008000;
and.b32 b, $6, 0x7fff7fff;
sub.u32 t, t, b;
lop3.b32 t, $4, $6, t, 0xb2;
prmt.b32 m0, t, 0, 0x9999;
prmt.b32 m1, t, 0, 0xbbbb;
mov.b32 p0, $2;
mov.b32 p1, $3;
and.b32 p0, p0, m0;
and.b32 p1, p1, m1;
mov.b32 $0, p0;
mov.b32 $1, p1;
}
""")
_DROP_OPERANDS = gl.constexpr("=f,=f,f,f,r,r,r,r")


@gluon.jit
def drop(p, rows, change, key):
    """P with what dropout does not keep set to 0; the rest is scaled with the sum, at the end."""
    BLOCK_N: gl.constexpr = p.shape[1]
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(BLOCK_N)))
    lane = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, accumulator(BLOCK_N)))
    state = (rows.seed_low, rows.seed_high, rows.offset)
    word = random_words(rows.first, line[:, None], key, lane[None, :], rows.bh, state)
    both = (change.threshold | (change.threshold << 16)).to(gl.uint32)
    return gl.inline_asm_elementwise(_DROP, _DROP_OPERANDS, [p, word, both], gl.float32, is_pure=True, pack=2)
