"""Where the sequences of a batch lie and how long they are, for the roles of both directions' kernels."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.dialect import aggregate
from flashtile.gpu.sequences import sequence


@aggregate
class Lengths:
    """Packed sequences by their cumulative lengths (VARLEN), or the rows that all of a dense batch have."""

    cu_q: gl.tensor
    cu_k: gl.tensor
    mailbox: gl.tensor
    max_q: gl.tensor
    max_k: gl.tensor
    total_q: gl.tensor
    total_k: gl.tensor
    VARLEN: gl.constexpr

    @gluon.jit
    def of(self, b, check):
        """(q_start, q_len, k_start, k_len) of sequence b; check: bad contents are reported to the mailbox."""
        q_start, q_len = self.of_queries(b, check)
        k_start, k_len = sequence(self.cu_k, b, self.max_k, self.total_k, 2, self.mailbox, self.VARLEN, check)
        return q_start, q_len, k_start, k_len

    @gluon.jit
    def of_queries(self, b, check):
        """(q_start, q_len) of sequence b."""
        return sequence(self.cu_q, b, self.max_q, self.total_q, 0, self.mailbox, self.VARLEN, check)
