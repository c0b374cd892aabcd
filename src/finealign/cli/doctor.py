"""`finealign doctor`: what this machine has, and whether a backbone is the one it is called."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from finealign.cli.app import app
from finealign.cli.guards import guarded, print_json
from finealign.cli.options import AsJson, BackboneName
from finealign.errors import BackboneError, FinealignError

if TYPE_CHECKING:  # it imports torch, which is slow
    from finealign.backbone.verify import Cosines


@app.command()
def doctor(
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the backbone on drawn pictures; it may be downloaded.")
    ] = False,
    backbone: BackboneName = None,
    against: Annotated[Path | None, typer.Option(help="Cosines to check against, from --record.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write this backbone's cosines to a JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine has: versions, device, precision, cached weights, hub within reach or not."""
    with guarded(as_json):
        if verify:
            _verify(backbone, against, record, as_json)
            return
        if backbone or against or record:
            raise FinealignError("--backbone, --against and --record go with --verify. Add --verify.")
        from finealign.cli.machine import examine

        facts = examine()
        if as_json:
            print_json(facts)
            return
        table = Table(show_header=False, box=None)
        for name, value in facts["versions"].items():
            table.add_row(name, value)
        bf16 = [name for name, supported in facts["cpu_bf16"].items() if supported]
        told = f"{facts['device_name']}, {facts['threads']} threads, {facts['cores']} usable cores"
        table.add_row("device", f"{facts['device']} ({told})")
        table.add_row("shared memory", _shared_memory(facts["shared_memory"]))
        table.add_row("precision", f"{facts['precision']} (bf16 on the CPU: {', '.join(bf16) or 'not supported'})")
        hub, cache = facts["hub"], facts["cache"]
        reach = {True: "within reach", False: "not within reach", None: "unknown"}[hub["reachable"]]
        table.add_row("hub", f"{hub['endpoint']}: {reach}{' (' + hub['reason'] + ')' if hub['reason'] else ''}")
        table.add_row("cache", f"{cache['folder']}: {', '.join(cache['models']) or 'no models'}")
        Console().print(table)


def _verify(backbone: str | None, against: Path | None, record: Path | None, as_json: bool) -> None:
    """Measure in fp32 on the CPU, where cosines are comparable; raise BackboneError where they differ."""
    from finealign.backbone.load import load_backbone
    from finealign.backbone.verify import TOLERANCE, measure, read, recorded
    from finealign.config import DEFAULT_BACKBONE
    from finealign.run.folder import write_json

    wanted = read(against) if against else None
    loaded = load_backbone(backbone or DEFAULT_BACKBONE)
    found = measure(loaded)
    wanted = wanted or recorded(found.identifier)
    difference = found.difference(wanted) if wanted else None
    if record:
        write_json(record, found.as_json())
    if difference is not None and difference > TOLERANCE:
        raise BackboneError(
            f"{found.identifier} is not what was recorded: cosines differ by up to {difference:.4f}, wanted at most "
            f"{TOLERANCE}. {_weights(found, wanted)} Look for another activation (QuickGELU), other means of the "
            "pixels, or another tokenizer."
        )
    told: dict[str, Any] = {
        "backbone": found.identifier,
        "checksum": found.checksum,
        "pictures": len(found.cosines),
        "named": found.named,
        "difference": difference,
        "recorded": wanted is not None,
    }
    if as_json:
        print_json(told)
        return
    console = Console(highlight=False)
    console.print(
        f"{found.identifier}: {found.named} of {len(found.cosines)} drawn pictures nearest to their own name."
    )
    if difference is None:
        console.print(
            "Nobody has recorded this backbone's cosines from genuine weights yet, so nothing more can be said. Where "
            "the weights are known to be genuine, write them with --record FILE and send them to the project.",
            soft_wrap=True,
        )
    else:
        console.print(f"Cosines as recorded: they differ by at most {difference:.4f}. {_weights(found, wanted)}")


def _weights(found: "Cosines", wanted: "Cosines | None") -> str:
    same = wanted is not None and found.checksum == wanted.checksum
    return "The weights are the same." if same else "The weights are not the same file."


def _shared_memory(facts: dict[str, Any]) -> str:
    """How much memory processes share, what worker processes need of it, and what to do where that is too little."""
    if facts["size"] is None:
        return f"no {facts['folder']}"
    told = f"{facts['folder']}: {facts['free'] / 1e9:.2f} of {facts['size'] / 1e9:.2f} GB free"
    if not facts["workers"]:
        return f"{told}; not needed, as one thread makes the views here (data.workers)"
    told += f", {facts['needed'] / 1e9:.2f} needed by {facts['workers']} workers with eight crops at 224 pixels"
    if facts["free"] >= facts["needed"]:
        return told
    return f"{told}: give the container more (docker run --shm-size), or set data.workers lower, 0 for a thread"
