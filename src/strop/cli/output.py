"""Tables for people: drawn by rich in a terminal, tab-separated columns when piped."""

import sys
from collections.abc import Collection, Iterable, Sequence

from strop.core.config import GIB, MIB


def size(num_bytes: int) -> str:
    """`1.50 GiB`, `12.3 MiB` or `4 KiB`."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB" if num_bytes >= MIB / 10 else f"{-(-num_bytes // 1024)} KiB"


def _printable(text: str) -> str:
    """One line that cannot steer the terminal: files and caches hold what anybody wrote."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right_aligned: Collection[str] = ()) -> None:
    """Prints a table; a pipe gets one line per row, its cells between tabs, the header first."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for cells in (header, *rows):
            print("\t".join(cells))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if name in right_aligned else "left", overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    Console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Prints `label  text` lines; those without text are left out, and a pipe gets a tab between the two."""
    shown = [(_printable(label), _printable(text)) for label, text in facts if text]
    if not sys.stdout.isatty():
        for label, text in shown:
            print(f"{label}\t{text}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for label, text in shown:
        grid.add_row(Text(label, style="bold"), Text(text))
    Console().print(grid)
