"""From raw products to scores in base 2: softcap, ALiBi and bias."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, KIND: tl.constexpr):
    """ "exact": within four units of the last place; "fast": one instruction, relative error 2**-11."""
    if KIND == "fast":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    # Near 0 the exponential loses the digits that a softcap multiplies again; Lambert's fraction keeps them there.
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    return tl.where(tl.abs(x) < 0.6, near, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def score(
    s, row, col, diagonal, scale, softcap, slope, bias_tile,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(scores in base 2, tanh of the softcap) from raw products; row and col broadcast to the shape of s."""
    capped = s
    if SOFTCAP != "none":
        capped = tanh(s * (scale / softcap), SOFTCAP)
        s = capped * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if ALIBI:
        # Positions as floats: exact below 2**24, and |x| is free in a multiply-add.
        s -= tl.abs((row + diagonal).to(tl.float32) - col.to(tl.float32)) * (slope * LOG2E)
    if BIAS == "additive":
        s += bias_tile.to(tl.float32) * LOG2E
    elif BIAS == "boolean":
        s = tl.where(bias_tile != 0, s, -float("inf"))
    return s, capped
