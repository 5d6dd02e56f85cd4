"""`strop models`: what is cached, and `strop models remove NAME...`."""

import json
import sys
import time

import click

from strop.cli.output import print_table, size
from strop.core.errors import RequestError
from strop.formats.cached import CachedModel


@click.group("models", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Lists what is cached: packed weights (kind `packed`) and snapshots of the Hugging Face Hub (kind `hub`).

    Each with its model, size, last use, hash (of a pack's source, or the snapshot's commit) and source.
    """
    if context.invoked_subcommand is not None:
        return
    from strop.formats.cached import cached_models

    models = cached_models()
    if as_json:
        print(json.dumps([model.as_json() for model in models], indent=1))
        return
    if not models:
        print("nothing is cached")
        return
    rows = [_row(model) for model in models]
    print_table(["model", "kind", "size", "last used", "hash", "source"], rows, right_aligned=("size",))
    print(f"{len(models)} in all, {size(sum(model.num_bytes for model in models))}")


def _row(model: CachedModel) -> list[str]:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.last_used_s))
    return [model.name, model.kind, size(model.num_bytes), used, (model.hash or model.id)[:12], model.source]


@command.command("remove")
@click.argument("names", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask. Needed where there is no terminal to ask in.")
def remove_command(names: tuple[str, ...], yes: bool) -> None:
    """Deletes cached models.

    NAMES are names (all that is cached of this name goes), hashes, or prefixes that fit only one model.
    """
    from strop.formats.cached import cached_models, choose, remove

    chosen = choose(cached_models(), names)
    if not yes:
        told = [f"{model.name} ({model.kind}, {size(model.num_bytes)}, {model.path})" for model in chosen]
        if not sys.stdin.isatty():
            raise RequestError(f"there is no terminal to ask in: add --yes to delete {'; '.join(told)}")
        click.confirm("\n".join([*told, "delete?"]), abort=True)
    removals = [remove(model) for model in chosen]
    for removal in removals:
        note = f" ({removal.note})" if removal.note else ""
        print(f"{removal.model.name} ({removal.model.kind}): freed {size(removal.freed_bytes)}{note}")
    if len(chosen) > 1:
        print(f"freed {size(sum(removal.freed_bytes for removal in removals))} in all")
    if any(removal.note and not removal.freed_bytes for removal in removals):
        sys.exit(1)
