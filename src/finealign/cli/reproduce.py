"""`finealign reproduce`: the published table on one's own machine."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from finealign.cli.app import app
from finealign.cli.grids import names_in, seeds_in, tell_cell
from finealign.cli.guards import print_json, refuse_launcher, working
from finealign.cli.options import AsJson, BackboneName
from finealign.errors import FinealignError

if TYPE_CHECKING:  # it imports torch, which is slow
    from finealign.benchmark.zero_shot import Checked


@app.command()
def reproduce(
    datasets: Annotated[str, typer.Option(help="Some of the 13, with commas between, as dtd,eurosat.")] = "all",
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "fair,fair@reconstruction,dpa,cupl",
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "0,1,2",
    backbone: BackboneName = None,
    data_root: Annotated[Path, typer.Option(help="Where the data sets lie.")] = Path("data"),
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    out: Annotated[Path, typer.Option(help="Where it goes; what is done there is not done again.")] = Path(
        "runs/reproduce"
    ),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, for every method alike.")
    ] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Check zero-shot accuracy and stop.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on where that is not what is known.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch what is missing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check zero-shot accuracy, run methods on the 13 sets of the field, and write the table beside published rows."""
    with working(as_json):
        refuse_launcher()
        from finealign.benchmark.catalogue import DPA_TABLE
        from finealign.benchmark.grid import Grid
        from finealign.benchmark.reproduce import reproduce as run
        from finealign.cli.bars import Bars
        from finealign.config import DEFAULT_BACKBONE, read_overrides
        from finealign.runtime.devices import choose_device

        chosen = read_overrides(settings or ())
        if device is not None:
            choose_device(device)  # which refuses one that is not there
            chosen["device"] = device
        grid = Grid(
            datasets=DPA_TABLE if datasets == "all" else names_in(datasets, "--datasets"),
            methods=names_in(methods, "--methods"),
            seeds=seeds_in(seeds),
            backbone=backbone or DEFAULT_BACKBONE,
            data_root=data_root,
            out=out,
            settings=chosen,
            download=download,
        )
        notes = Console(stderr=True)
        try:
            done = run(
                grid,
                check_only=check_only,
                anyway=anyway,
                progress=Bars(),
                on_checked=partial(_tell_checked, notes, grid.backbone),
                on_cell=partial(tell_cell, notes),
            )
        except KeyboardInterrupt:
            raise FinealignError(f"Interrupted. What is done is in {out}; the same command goes on.") from None
        if as_json:
            told: dict[str, Any] = done.result or {"check": [one.as_json() for one in done.checked]}
            print_json({**told, "saved": [str(path) for path in done.saved], "waiting": done.waiting})
            return
        if done.result is None:
            out_of_tolerance = sum(not one.within for one in done.checked)
            told_next = f"{len(done.checked)} data sets checked, {out_of_tolerance or 'nothing'} out of tolerance."
        else:
            typer.echo(done.page)
            places = " and ".join(f"[bold]{escape(str(path))}[/]" for path in done.saved)
            told_next = f"Written: {places}. To share it, copy both to docs/results and open a pull request."
        if done.waiting:
            told_next = escape(done.waiting)
        Console().print(told_next, soft_wrap=True, highlight=False)


def _tell_checked(notes: Console, backbone: str, checked: Sequence["Checked"]) -> None:
    for one in checked:
        within = "within a point" if one.within else "[yellow]out of tolerance[/]"
        notes.print(
            f"zero-shot {one.dataset}: {one.found:.1f}, known {one.known:.1f}, {within}",
            soft_wrap=True,
            highlight=False,
        )
    if not checked:
        notes.print(
            f"Not checked: no zero-shot accuracy is known of {escape(backbone)} on these sets.",
            soft_wrap=True,
            highlight=False,
        )
