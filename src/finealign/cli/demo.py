"""`finealign demo`: the methods side by side on drawn birds."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from finealign.cli.app import app
from finealign.cli.guards import print_json, refuse_launcher, working
from finealign.cli.options import AsJson, Device
from finealign.errors import FinealignError


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Where it goes. Default: runs/demo-seedN, with --quick -quick.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random draw, the world's included.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images: a look, not a measurement.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the demo in --out.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare the methods on drawn birds with the small model that ships along: no download, no labels."""
    with working(as_json):
        refuse_launcher()
        from finealign.cli.bars import Bars
        from finealign.cli.tables import demo_table
        from finealign.demo.run import default_folder, run_demo

        folder = out or default_folder(seed=seed, quick=quick)
        try:
            result = run_demo(folder, seed=seed, quick=quick, device=device, overwrite=overwrite, progress=Bars())
        except KeyboardInterrupt:
            raise FinealignError(
                f"Interrupted. The same command with --overwrite starts the demo in {folder} again."
            ) from None
        if as_json:
            print_json(result.as_json())
            return
        screen = Console()
        demo_table(result, screen)
        for name, path in (("Picture", result.picture), ("Report", result.report)):
            screen.print(f"{name}: [bold]{escape(str(path))}[/]", soft_wrap=True, highlight=False)
