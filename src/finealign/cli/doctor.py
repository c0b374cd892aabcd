"""`finealign doctor`: what this machine has."""

from rich.console import Console
from rich.table import Table

from finealign.cli.app import app
from finealign.cli.guards import guarded, print_json
from finealign.cli.options import AsJson


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine has: versions, device, precision, cached weights, hub within reach or not."""
    with guarded(as_json):
        from finealign.cli.machine import examine

        facts = examine()
        if as_json:
            print_json(facts)
            return
        table = Table(show_header=False, box=None)
        for name, value in facts["versions"].items():
            table.add_row(name, value)
        bf16 = [name for name, supported in facts["cpu_bf16"].items() if supported]
        table.add_row("device", f"{facts['device']} ({facts['device_name']}, {facts['threads']} threads)")
        table.add_row("precision", f"{facts['precision']} (bf16 on the CPU: {', '.join(bf16) or 'not supported'})")
        hub, cache = facts["hub"], facts["cache"]
        reach = {True: "within reach", False: "not within reach", None: "unknown"}[hub["reachable"]]
        table.add_row("hub", f"{hub['endpoint']}: {reach}{' (' + hub['reason'] + ')' if hub['reason'] else ''}")
        table.add_row("cache", f"{cache['folder']}: {', '.join(cache['models']) or 'no models'}")
        Console().print(table)
