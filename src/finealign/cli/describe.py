"""`finealign describe`: ask a chat endpoint for descriptions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from finealign.cli.app import app
from finealign.cli.guards import print_json, refuse_launcher, stoppable, working
from finealign.cli.options import AsJson, BackboneName, Classes, Device, Templates
from finealign.errors import FinealignError

if TYPE_CHECKING:  # they import torch, which is slow
    from finealign.backbone.base import Backbone
    from finealign.texts.describe.endpoint import Asking
    from finealign.texts.describe.record import Described


@app.command()
def describe(
    classes: Classes,
    domain: Annotated[str, typer.Option(help="What the classes are, as 'bird species'.")],
    out: Annotated[Path, typer.Option(help="FILE.json for --descriptions; its record is FILE.record.json.")],
    endpoint: Annotated[
        str | None, typer.Option(help="As http://localhost:11434/v1. Default: OPENAI_BASE_URL, else OpenAI.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model that the endpoint knows.")] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Descriptions a class.")] = 8,
    siblings: Annotated[int, typer.Option(min=0, help="Nearest classes that each is told apart from.")] = 3,
    per_minute: Annotated[int, typer.Option(min=1, help="Requests a minute.")] = 60,
    at_once: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 60.0,
    attempts: Annotated[int, typer.Option(min=1, help="Requests for one class, retries included.")] = 4,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that one answer may take, what a model thinks unseen included.")
    ] = 4096,
    backbone: BackboneName = None,
    templates: Templates = None,
    from_templates: Annotated[
        bool, typer.Option("--from-templates", help="Ask nobody: write filled templates.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again, and replace --out when done.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask a chat endpoint (OpenAI, vLLM, Ollama, llama.cpp) for visual descriptions of every class."""
    with working(as_json):
        refuse_launcher()
        from finealign.cli.tables import described_lines
        from finealign.texts.describe.endpoint import Asking
        from finealign.texts.describe.run import from_templates as fill
        from finealign.texts.prompts import read_classes, read_templates

        names = read_classes(classes)
        prompts = read_templates(templates) if templates else None
        if from_templates:
            if model or endpoint:
                raise FinealignError(
                    "--from-templates asks nobody, so --model and --endpoint have no use. Leave them out."
                )
            described = fill(names, domain=domain, out=out, templates=prompts, overwrite=overwrite)
        elif model is None:
            raise FinealignError(
                "--model is missing. Wanted: the name of a model that the endpoint knows, or --from-templates to ask "
                "none."
            )
        else:
            asking = Asking(
                model=model,
                endpoint=endpoint,
                per_class=per_class,
                siblings=siblings,
                per_minute=per_minute,
                at_once=at_once,
                timeout=timeout,
                attempts=attempts,
                max_tokens=max_tokens,
            )
            encoder = partial(_load, backbone, device)
            described = _ask(asking, encoder, names, domain=domain, out=out, templates=prompts, overwrite=overwrite)
        if as_json:
            print_json(described.as_json())
            return
        described_lines(described.as_json(), Console(), Console(stderr=True))


def _load(backbone: str | None, device: str) -> "Backbone":
    from finealign.backbone.load import load_backbone
    from finealign.config import DEFAULT_BACKBONE
    from finealign.runtime.devices import choose_device

    return load_backbone(backbone or DEFAULT_BACKBONE, device=choose_device(device))


def _ask(
    asking: "Asking", encoder: "Callable[[], Backbone]", names: Sequence[str], *, out: Path, **options: Any
) -> "Described":
    """Ask the endpoint until all is described or a signal asks to stop; then print how to continue."""
    from finealign.cli.bars import Bars
    from finealign.texts.describe.record import record_path
    from finealign.texts.describe.run import describe as ask_for

    def go_on() -> str:
        record = record_path(out)
        advice = f"What was accepted is in {record}. The same command, without --overwrite, goes on."
        return advice if record.is_file() else "Nothing was begun yet."

    with stoppable(Bars(), go_on=go_on) as progress:
        return ask_for(names, out=out, backbone=encoder(), asking=asking, progress=progress, **options)
