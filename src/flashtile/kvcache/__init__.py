"""Attention over a cache of keys and values: contiguous or paged, appended to in place.

`cache` says where the tokens of each sequence lie, reads and writes them; `checks` is the table of what a call must
keep to; `reports` carries what a GPU finds out of range to the next call; `attend` puts them together; `varlen` packs
keys that lie in pages or are used in part.
"""

from __future__ import annotations

from flashtile.kvcache.attend import Scoring, attention_with_cache
from flashtile.kvcache.cache import Cache, Rotary
from flashtile.kvcache.varlen import packed_from_pages, packed_in_use

__all__ = ["Cache", "Rotary", "Scoring", "attention_with_cache", "packed_from_pages", "packed_in_use"]
