"""`trtqwen migrate`: a recipe for another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import DryRun, Force, Json, print_json, stderr, stdout
from trtqwen.migrate import Backend, default_output, notes_of, plan_migration, write_migration


def command(
    recipe: Annotated[str, typer.Argument(help="Migrate this recipe: a bundled name, or a YAML file.")],
    to: Annotated[Backend, typer.Option(help="Migrate to this backend.")],
    output: Annotated[
        Path | None, typer.Option(help="Write the new recipe here. [default: <recipe>-<backend>.yaml]")
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write the recipe for another engine, and list what stays, what changes and what is lost.

    Model repository, tensors, gateway and metric names stay the same, so clients do not notice.
    """
    migration = plan_migration(recipe, to, output)
    target = output or default_output(migration.source.name, to)
    if not dry_run:
        write_migration(migration, target, force=force)
    if json:
        print_json({"output": None if dry_run else str(target), **migration.as_json()})
        return
    for title, found in notes_of(migration).items():
        stdout.print(f"{title}:", style="bold", highlight=False)
        for note in found:
            stdout.print(f"  {note.setting}: {note.text}", markup=False, highlight=False, soft_wrap=True)
    stdout.print("Steps:", style="bold", highlight=False)
    for what, line in migration.commands:
        stdout.print(f"  # {what}\n  {line}", markup=False, highlight=False, soft_wrap=True)
    if not dry_run:
        stderr.print(f"wrote {target}", highlight=False, soft_wrap=True)
