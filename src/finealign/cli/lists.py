"""`finealign methods` and `finealign models`: lists of the methods and the backbones."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finealign.cli.app import app
from finealign.cli.guards import guarded, print_json
from finealign.cli.options import AsJson


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods, with their presets and what each is."""
    with guarded(as_json):
        from finealign.method.registry import broken_plug_ins, describe_methods

        rows, broken = describe_methods(), broken_plug_ins()
        if as_json:
            print_json({"methods": rows, "broken": broken})
            return
        others = any(row["from"] != "finealign" for row in rows)
        table = Table(box=None)
        for name in ("method", "presets", "trains", "what it is", *(["from"] if others else [])):
            table.add_column(name)
        for row in rows:
            presets = " ".join(f"@{preset}" for preset in row["presets"])
            trains, origin = "yes" if row["trains"] else "no", [escape(row["from"])] if others else []
            table.add_row(row["name"], escape(presets), trains, escape(row["about"]), *origin)
        Console().print(table)
        for problem in broken:
            Console(stderr=True).print(f"[yellow]{escape(problem)}[/]", soft_wrap=True, highlight=False)


@app.command()
def models(
    containing: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the backbones that can be named as ARCH/PRETRAINED, with what is known of them."""
    with guarded(as_json):
        from finealign.backbone.load import list_backbones
        from finealign.backbone.zoo import known_backbones
        from finealign.config import DEFAULT_BACKBONE

        names = [name for name in list_backbones() if containing.casefold() in name.casefold()]
        known = [one for name, one in known_backbones().items() if name in names]
        if as_json:
            print_json({"default": DEFAULT_BACKBONE, "models": names, "known": [one.as_json() for one in known]})
            return
        untested = [name for name in names if name not in {one.name for one in known}]
        width = max(map(len, names), default=0)
        for one in known:
            revision = f"at {one.revision:.7}" if one.revision else "not pinned"
            facts = f"{one.input_size} px  {one.licence:12}  ImageNet {one.imagenet:.2f}  {revision}"
            default = "  (default)" if one.name == DEFAULT_BACKBONE else ""
            typer.echo(f"{one.name:{width}}  {facts}  verified by {one.verified or 'nobody yet'}{default}")
        for name in untested:
            typer.echo(f"{name:{width}}  untested")
