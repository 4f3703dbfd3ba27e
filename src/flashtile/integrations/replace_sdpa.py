"""`replace_sdpa`: software that calls PyTorch's scaled_dot_product_attention runs on flashtile, unchanged."""

from __future__ import annotations

import sys
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtile import ops
from flashtile.api import renamed
from flashtile.autograd import transformed
from flashtile.dispatch import choose, requested_backend
from flashtile.integrations.sdpa import NAMES, in_their_layout, prepared, scaled_dot_product_attention
from flashtile.problem import DTYPES, MAX_HEAD_DIM
from flashtile.validation import describe

if TYPE_CHECKING:
    from typing_extensions import Self

_NAME = "scaled_dot_product_attention"
_pytorchs = F.scaled_dot_product_attention
_active: list[SdpaReplacement] = []


def replace_sdpa() -> SdpaReplacement:
    """Puts flashtile in the place of torch.nn.functional.scaled_dot_product_attention, at once and for the process.

    `with flashtile.replace_sdpa():` undoes it at the end, and so does `restore()` of what is returned. Modules that
    imported the function by its name are served too. torch.nn.MultiheadAttention and torch.nn.TransformerEncoder run
    on it as well: PyTorch's own fast path of inference, which goes another way, is off meanwhile.

    What flashtile cannot do exactly as PyTorch goes to PyTorch's own function and is listed, with the reason, in
    `passed_on`: nested and other special tensors, head dims over 256, forward-mode derivatives, a
    torch.nn.attention.sdpa_kernel that excludes the flash kernel, and every bad argument, which PyTorch then reports.
    MultiheadAttention with need_weights=True, its default, never calls the function: it forms the weights itself.

    It holds for all threads, and the innermost replacement counts. Code of torch.compile is compiled anew when the
    first replacement begins and when the last one ends.

    Returns:
        the replacement: `served`, the number of calls on flashtile; `passed_on`, reason -> number of calls;
        `restore()`; a context manager. Neither number counts inside compiled code.

    >>> import torch, flashtile
    >>> q = k = v = torch.randn(1, 4, 128, 64)
    >>> with flashtile.replace_sdpa() as replacement:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> replacement.served, replacement.passed_on
    (1, {})
    """
    return SdpaReplacement()


class SdpaReplacement:
    """One active replacement of PyTorch's attention; see `replace_sdpa`."""

    def __init__(self) -> None:
        self.served = 0
        self.passed_on: dict[str, int] = {}
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        self._places = [] if _active else _places()
        for module, name in self._places:
            setattr(module, name, _attention)
        torch.backends.mha.set_fastpath_enabled(False)
        _active.append(self)

    def restore(self) -> None:
        """Ends the replacement; the last one of several gives PyTorch its function back. Calling it again is fine."""
        if self not in _active:
            return
        _active.remove(self)
        if _active:
            _active[0]._places += self._places
            if self._places:
                _active[0]._fast_path = self._fast_path
        else:
            for module, name in self._places:
                setattr(module, name, _pytorchs)
            torch.backends.mha.set_fastpath_enabled(self._fast_path)
        self._places = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "active" if self in _active else "ended"
        return f"<replace_sdpa, {state}: {self.served} calls on flashtile, passed on: {self.passed_on or 'none'}>"


def _places() -> list[tuple[ModuleType, str]]:
    """Where the function is bound: torch.nn.functional, and modules outside of torch that imported it by name."""
    found: list[tuple[ModuleType, str]] = [(F, _NAME)]
    for qualified, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and qualified.split(".")[0] not in ("torch", "flashtile"):
            found += [(module, name) for name, value in list(vars(module).items()) if value is _pytorchs]
    return found


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention on flashtile; see flashtile.replace_sdpa."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.compiler.is_compiling():
        if not _active or _goes_to_pytorch_compiled(query, value):
            return _by_pytorch(*arguments)
        return scaled_dot_product_attention(*arguments)
    replacement = _active[-1] if _active else None
    if replacement is None:  # a module that was imported meanwhile may still hold this function
        return _by_pytorch(*arguments)
    reason = _why_not(query, key, value, attn_mask)
    if reason is None:
        try:
            call, rank, batch = prepared(*arguments)
            problem = describe(call)
            if requested_backend() is None:
                choose(problem)
        except (TypeError, ValueError, NotImplementedError) as error:
            reason = str(renamed(error, NAMES))
    if reason is not None:
        replacement.passed_on[reason] = replacement.passed_on.get(reason, 0) + 1
        return _by_pytorch(*arguments)
    replacement.served += 1
    return in_their_layout(ops.attention(call)[0], rank, batch)


def _by_pytorch(query: Any, key: Any, value: Any, attn_mask: Any, p: Any, causal: Any, scale: Any, gqa: Any) -> Tensor:
    # enable_gqa only where it is on: tensor types that answer for themselves may not know it.
    options = {"enable_gqa": gqa} if gqa else {}
    return _pytorchs(query, key, value, attn_mask, p, causal, scale=scale, **options)


_PLAIN = (Tensor, nn.Parameter)


def _why_not(query: Any, key: Any, value: Any, attn_mask: Any) -> str | None:
    """What cannot be seen in the description of a call: kinds of tensors, and what surrounds it."""
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if tensor is not None and type(tensor) not in _PLAIN and not _is_ours(tensor):
            return f"{name} is a {type(tensor).__name__}, which has an attention of its own or none"
        if tensor is not None and tensor.is_nested:
            return f"{name} is a nested tensor"
    if transformed() and torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives are PyTorch's own"
    if not torch._C._get_flash_sdp_enabled():
        return "torch.nn.attention.sdpa_kernel excludes the flash kernel, whose place flashtile takes"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch's own operations only"
    return None


def _is_ours(tensor: Any) -> bool:
    """Kinds of tensors beside the plain one that flashtile takes: without memory, and the causal mask objects."""
    from torch._subclasses.fake_tensor import FakeTensor  # late: torch itself imports it when somebody makes one

    return isinstance(tensor, FakeTensor) or type(tensor).__name__ == "CausalBias"


def _goes_to_pytorch_compiled(query: Tensor, value: Tensor) -> bool:
    """Inside a compiler nothing can be tried and types are the compiler's: what flashtile lacks is asked one by one."""
    return (
        not torch._C._get_flash_sdp_enabled()
        or query.dtype not in DTYPES
        or not 1 <= query.shape[-1] <= MAX_HEAD_DIM
        or not 1 <= value.shape[-1] <= MAX_HEAD_DIM
        or query.is_nested
    )
