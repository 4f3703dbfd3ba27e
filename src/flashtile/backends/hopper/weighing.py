"""PTX of the online softmax for one thread: COUNT scores of two rows, of each four elements two of either.

A line is an instruction; `tests/test_online_softmax.py` runs them for one warp without a GPU.
"""

from triton.experimental import gluon

# No thread that keeps scores keeps weights of a row whose sum is larger: each is far from overflow in float16.
_LIMIT = "0f44800000"  # 1024
# In place, of all weights so far. Thousands of keys add up to less, and what the next tile may rise by remains.
_LIMIT_OF_ALL = "0f45000000"  # 2048
_LARGEST = "0f477FE000"  # of float16, 65504: a larger sum may have had a weight that is infinite there
_INFINITY = "0f7F800000"
_MINUS_INFINITY = "0fFF800000"
_LOWEST = "0fFF7FFFFF"


class _Code:
    """The code for a tile of which a thread has `count` scores, $S to weights, $P.

    with_o: and of which it has as many elements of $O, or fewer and zeros, that become $SHRUNK. Without it there are no
    $SHRUNK, $O and $SEARCH.
    """

    def __init__(self, count, with_o=False):
        self.count = count
        self.p, self.more, self.shrunk = 0, count, 2 * count
        self.s, self.m, self.l, self.unit, self.o, self.search = (count * (2 + with_o + i) for i in range(6))
        self.lines = [
            ".reg .pred some, none;",
            ".reg .f32 sum<4>, base<2>, m<2>, l<2>, shrunk<2>, x, t;",
            ".reg .u32 e;",
        ]
        for r in (0, 1):
            self.add(
                f"mov.f32 m{r}, ${self.m + 2 * r};",
                f"mov.f32 l{r}, ${self.l + 2 * r};",
                f"mov.f32 shrunk{r}, 0f3F800000;",
            )

    def add(self, *lines):
        self.lines.extend(lines)

    def weigh(self, elements):
        """$P of so many of the elements; sum0 and sum2 of both rows."""
        for i in elements:
            self.add(f"fma.rn.f32 ${self.p + i}, ${self.s + i}, ${self.unit}, base{_row(i)};")
            self.add(f"ex2.approx.ftz.f32 ${self.p + i}, ${self.p + i};")
            first = i < elements.start + 4
            self.add(
                f"mov.f32 sum{i & 3}, ${self.p + i};" if first else f"add.f32 sum{i & 3}, sum{i & 3}, ${self.p + i};"
            )
        self.add("add.f32 sum0, sum0, sum1;", "add.f32 sum2, sum2, sum3;")

    def base_is_maximum(self):
        self.add(*[f"neg.f32 base{r}, m{r};" for r in (0, 1)])

    def go_unless_any(self, label):
        """To the label, all threads of the warp, unless one of them has `some`."""
        self.add("vote.sync.any.pred some, some, 0xffffffff;", f"@!some bra.uni {label};")

    def sums_are_large(self):
        self.add(f"setp.gtu.f32 some, sum0, {_LIMIT};", f"setp.gtu.or.f32 some, sum2, {_LIMIT}, some;")

    def largest(self, values):
        """x: the largest of a row, of whose values each of four threads has some."""
        self.add(f"mov.f32 x, ${values[0]};")
        self.add(*[f"max.f32 x, x, ${value};" for value in values[1:]])
        self.largest_of_threads()

    def largest_of_threads(self):
        """x: the largest that one of the four threads of a row has there."""
        for lane in (1, 2):
            self.add(f"shfl.sync.bfly.b32 t, x, {lane}, 0x1f, 0xffffffff;", "max.f32 x, x, t;")

    def move(self, r, weighed):
        """Row r to the maximum x, for which 2^t makes up in what was weighed before."""
        self.add("ex2.approx.ftz.f32 t, t;", f"mov.f32 m{r}, x;")
        self.add(f"mul.f32 l{r}, l{r}, t;", f"mul.f32 shrunk{r}, shrunk{r}, t;")
        self.add(*[f"mul.f32 ${self.p + i}, ${self.p + i}, t;" for i in weighed if _row(i) == r])

    def look_for_maxima(self, elements):
        """m and base of both rows; base 0 for one that has seen nothing."""
        for r in (0, 1):
            self._largest_score(r, elements)
            self.add(f"setp.eq.f32 none, x, {_MINUS_INFINITY};", "selp.f32 t, 0f00000000, x, none;")
            self.add(f"neg.f32 base{r}, t;", f"sub.f32 t, m{r}, t;")
            self.move(r, range(elements.start))

    def look_for_finite_maxima(self):
        """m of both rows, the lowest number for one that has seen nothing, so that -m serves as base."""
        for r in (0, 1):
            self._largest_score(r, range(self.count))
            self.add(f"max.f32 x, x, {_LOWEST};", f"sub.f32 t, m{r}, x;")
            self.move(r, [])

    def _largest_score(self, r, elements):
        self.largest([self.s + i for i in elements if _row(i) == r])
        self.add(f"mul.f32 x, x, ${self.unit};", f"max.f32 x, x, m{r};")

    def mark_overflow(self):
        """l of what may not have fitted float16 is infinite for good."""
        for r in (0, 1):
            self.add(f"setp.gt.f32 none, l{r}, {_LARGEST};", f"selp.f32 l{r}, {_INFINITY}, l{r}, none;")

    def divide(self):
        """Both rows by the power of two in the largest sum of a thread."""
        for r in (0, 1):
            self.add(f"mov.f32 x, l{r};")
            self.largest_of_threads()
            self.add("mov.b32 e, x;", "shr.u32 e, e, 23;")
            self.add("max.u32 e, e, 127;")  # 1 and more, for a row that has seen little
            self.add("min.u32 e, e, 252;")  # of infinity, too: the factor must not be 0, which would hide it
            self.add("sub.u32 e, e, 127;", "cvt.rn.f32.u32 x, e;")
            self.add(f"add.f32 x, m{r}, x;", f"sub.f32 t, m{r}, x;")
            self.move(r, [])

    def keep_o(self):
        """$SHRUNK: $O, which only a new maximum makes smaller."""
        self.add(*[f"mov.f32 ${self.shrunk + i}, ${self.o + i};" for i in range(self.count)])

    def shrink_o(self):
        """$SHRUNK by the factors of its rows."""
        self.add(*[f"mul.f32 ${self.shrunk + i}, ${self.shrunk + i}, shrunk{_row(i)};" for i in range(self.count)])

    def add_sums(self):
        self.add("add.f32 l0, l0, sum0;", "add.f32 l1, l1, sum2;")

    def finish(self):
        """The code, which leaves m, l and the factor of both rows in $MORE."""
        left = ["m0", "l0", "m1", "l1", "shrunk0", "0f00000000", "shrunk1"]
        left += ["0f00000000"] * (self.count - len(left))
        self.add(*[f"mov.f32 ${self.more + i}, {value};" for i, value in enumerate(left)])
        return "\n".join(["{", *self.lines, "}"])


def _row(i):
    return i >> 1 & 1


@gluon.constexpr_function
def keeping(COUNT, PIECES):
    """Weighs in so many pieces; a warp that finds a large sum looks for the maxima and weighs its piece again."""
    code = _Code(COUNT)
    for k in range(PIECES):
        piece = range(COUNT // PIECES * k, COUNT // PIECES * (k + 1))
        code.base_is_maximum()  # anew: a row that has seen nothing has base 0 after its search, but must search again
        code.weigh(piece)
        code.sums_are_large()
        code.go_unless_any(f"NEAR{k}")
        code.look_for_maxima(piece)
        code.weigh(piece)
        code.add(f"NEAR{k}:")
        code.add_sums()
    return code.finish()


@gluon.constexpr_function
def in_place(COUNT, NARROW):
    """Weighs at once, after a look for the maxima where $SEARCH is not 0 or a row has seen nothing yet; NARROW, for
    float16: or a sum is large, and the warp divides its rows. It then shrinks $O, too.
    """
    code = _Code(COUNT, with_o=True)
    code.keep_o()
    code.add(f"setp.ne.u32 some, ${code.search}, 0;")
    code.add(*[f"setp.le.or.f32 some, m{r}, {_LOWEST}, some;" for r in (0, 1)])
    if NARROW:
        code.add(*[f"setp.gt.or.f32 some, l{r}, {_LIMIT_OF_ALL}, some;" for r in (0, 1)])
    code.go_unless_any("WEIGH")
    if NARROW:
        code.mark_overflow()
    code.look_for_finite_maxima()
    if NARROW:
        code.divide()
    code.shrink_o()
    code.add("WEIGH:")
    code.base_is_maximum()
    code.weigh(range(COUNT))
    code.add_sums()
    return code.finish()


@gluon.constexpr_function
def shrinking(COUNT):
    """$NEW: COUNT products of $OLD and $BY, by the warps that have a factor other than 1."""
    new, old, by = (COUNT * i for i in range(3))
    lines = [".reg .pred some;", *[f"mov.f32 ${new + i}, ${old + i};" for i in range(COUNT)]]
    lines += [f"setp.neu.f32 some, ${by}, 0f3F800000;", f"setp.neu.or.f32 some, ${by + 2}, 0f3F800000, some;"]
    lines += ["vote.sync.any.pred some, some, 0xffffffff;", "@!some bra.uni DONE;"]
    lines += [f"mul.f32 ${new + i}, ${old + i}, ${by + i};" for i in range(COUNT)]
    return "\n".join(["{", *lines, "DONE:", "}"])


@gluon.constexpr_function
def operands(COUNT, RESULTS, VALUES, NUMBERS):
    """Constraints of code with so many times COUNT results, float32 values and integers."""
    return ",".join(["=&f"] * RESULTS * COUNT + ["f"] * VALUES * COUNT + ["r"] * NUMBERS * COUNT)
