"""`strop keys FILE NAME`: a new API key for `strop serve --api-keys FILE`."""

from pathlib import Path

import click


@click.command("keys")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("name")
def command(file: Path, name: str) -> None:
    """Makes an API key and prints it, once.

    FILE keeps only NAME and the key's hash. A server that reads FILE takes the key at once; delete its line to
    withdraw it.
    """
    from strop.serve.keys import new_key

    print(new_key(file, name))
