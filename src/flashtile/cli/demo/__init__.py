"""`flashtile demo`: exactness, cost over sequence length, and a small GPT trained with each attention, on this machine.

Everything measured is in one result, written as report.json; the report page and its plots show it and nothing else.
"""

from flashtile.cli.demo.main import Options, run, show

__all__ = ["Options", "run", "show"]
