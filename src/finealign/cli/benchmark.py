"""`finealign benchmark`: methods on labelled sets, as a table."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from finealign.cli.app import app
from finealign.cli.grids import names_in, seeds_in, tell_cell
from finealign.cli.guards import print_json, refuse_launcher, working
from finealign.cli.options import AsJson, BackboneName
from finealign.errors import FinealignError


@app.command()
def benchmark(
    datasets: Annotated[str, typer.Option(help="Names with commas between, as dtd,eurosat, or path:DIR.")] = "",
    methods: Annotated[str, typer.Option(help="Names with commas between, as fair,dpa@published.")] = "fair,cupl",
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "0,1,2",
    backbone: BackboneName = None,
    data_root: Annotated[Path, typer.Option(help="Where the catalogue's sets lie.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="The grid's folder; a cell that is in it is not run again.")] = Path(
        "runs/benchmark"
    ),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, for every method alike.")
    ] = None,
    compare: Annotated[
        Literal["published"] | None, typer.Option(help="Our rows under the published ones for ViT-B/32.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch what is missing.")] = False,
    catalogue: Annotated[bool, typer.Option("--list", help="List the catalogue and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run methods on labelled sets and tabulate them: top-1, gain over the start, paired intervals, time."""
    with working(as_json):
        refuse_launcher()
        from finealign.benchmark.grid import Grid, run_grid
        from finealign.benchmark.table import against_published, gains, make_table, markdown, save_table
        from finealign.benchmark.table import as_json as table_as_json
        from finealign.cli.bars import Bars
        from finealign.config import DEFAULT_BACKBONE, read_overrides

        if catalogue:
            _list_catalogue(as_json)
            return
        grid = Grid(
            datasets=names_in(datasets, "--datasets"),
            methods=names_in(methods, "--methods"),
            seeds=seeds_in(seeds),
            backbone=backbone or DEFAULT_BACKBONE,
            data_root=data_root,
            out=out,
            settings=read_overrides(settings or ()),
            download=download,
        )
        try:
            cells = run_grid(grid, progress=Bars(), on_cell=partial(tell_cell, Console(stderr=True)))
        except KeyboardInterrupt:
            raise FinealignError(f"Interrupted. The finished cells are in {out}; the same command goes on.") from None
        table = make_table(cells, grid.datasets, grid.methods, grid.seeds)
        save_table(table, out)
        if as_json:
            print_json(table_as_json(table))
            return
        typer.echo(against_published(table) if compare else f"{markdown(table)}\n{gains(table)}")


def _list_catalogue(as_json: bool) -> None:
    from finealign.benchmark.catalogue import DATA_SETS
    from finealign.cli.tables import catalogue_table

    if as_json:
        print_json({"datasets": [data_set.as_json() for data_set in DATA_SETS.values()]})
    else:
        catalogue_table(DATA_SETS.values(), Console())
