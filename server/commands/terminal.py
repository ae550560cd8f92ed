"""What people see: tables and stages on standard output, errors on standard error.

Must not know: commands, servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def stage(text: str) -> None:
    """One line about where a command stands."""
    console.print(f"[dim]·[/dim] {escape(text)}")


def stages(as_json: bool) -> Callable[[str], None]:
    """`stage`, or nothing where standard output is for programs."""
    return (lambda _: None) if as_json else stage


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair per line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows:
        table.add_row(f"[dim]{key}[/dim]", value)
    return table
