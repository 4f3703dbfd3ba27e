"""Makes `import flash_attn` resolve to flashtile, in this process and, on request, in those that it starts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

VERSION = "2.8.4"
FOLDER = Path(__file__).parent / "importable"
"""A folder for the import path: the package flash_attn, the module flash_attn_2_cuda, and their distribution's name."""

_MODULES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.bert_padding",
    "flash_attn.layers.rotary",
    "flash_attn.ops.triton.rotary",
    "flash_attn_2_cuda",
)


def install() -> None:
    """From here on `import flash_attn` and its modules are flashtile's, also where the original is installed.

    importlib.metadata finds a distribution "flash-attn" of VERSION, as software that looks for it by name does. Modules
    of the original that flashtile does not serve (flash_attn.modules, flash_attn.losses ...) still come from the
    original where it is installed. Calling it again changes nothing.

    Raises RuntimeError where another flash_attn has been imported already: what has its functions would keep them.
    """
    for name in ("flash_attn", "flash_attn_2_cuda"):
        module = sys.modules.get(name)
        if module is not None and not getattr(module, "SERVED_BY_FLASHTILE", False):
            place = getattr(module, "__file__", None)
            raise RuntimeError(
                f"{name}: got {place} imported already, expected install() before the first import of it"
            )
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
        importlib.invalidate_caches()
    for name in _MODULES:
        importlib.import_module(name)
