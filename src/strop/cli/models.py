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
        for model in chosen:
            print(f"{model.name} ({model.kind}, {size(model.num_bytes)}): {model.path}", file=sys.stderr)
        if not sys.stdin.isatty():
            raise RequestError("nothing was deleted: there is no terminal to ask in, so add --yes")
        click.confirm(f"delete {'it' if len(chosen) == 1 else f'all {len(chosen)}'}?", abort=True, err=True)
    freed_bytes = 0
    for model in chosen:
        removal = remove(model)
        freed_bytes += removal.freed_bytes
        note = f" ({removal.note})" if removal.note else ""
        print(f"{model.name} ({model.kind}): freed {size(removal.freed_bytes)}{note}")
    if len(chosen) > 1:
        print(f"freed {size(freed_bytes)} in all")
