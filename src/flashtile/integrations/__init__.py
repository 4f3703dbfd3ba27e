"""Foreign attention signatures on top of the native call: one file, one signature family."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """`flashtile.integrations.transformers`, imported when it is first used: it needs that package."""
    if name == "transformers":
        return import_module("flashtile.integrations.transformers")
    raise AttributeError(f"module 'flashtile.integrations' has no attribute {name!r}")
