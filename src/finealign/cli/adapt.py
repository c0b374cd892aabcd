"""`finealign adapt`: adapt a backbone to unlabelled images."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from finealign.cli.app import app
from finealign.cli.guards import how_to_resume, print_json, stoppable, tell_left_out, tell_set_aside, working
from finealign.cli.options import AsJson, BackboneName, Classes, Exclude, Templates
from finealign.errors import FinealignError


@app.command()
def adapt(
    images: Annotated[
        str, typer.Argument(help="A folder, a .txt list, a .csv with a column path, or hf:NAME:SPLIT. No labels.")
    ],
    classes: Classes,
    descriptions: Annotated[Path | None, typer.Option(help='JSON: {"class": ["a sentence", ...]}.')] = None,
    templates: Templates = None,
    backbone: BackboneName = None,
    method: Annotated[
        str | None, typer.Option(help="fair or a peer, as dpa, wca@published. `finealign methods` lists them.")
    ] = None,
    class_prior: Annotated[
        str | None,
        typer.Option(
            metavar="auto|even|FILE",
            help="The share of the images that each class has: auto, estimated without labels; even; or a FILE that "
            'says so, JSON {"class": share or count} or CSV with the columns class and share (or count).',
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The classes of a few of the images, to learn from: a CSV with the columns path and label, as that of "
            '`finealign review`. The label "none of these" is for an image of no class.',
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/IMAGES-METHOD-seedN.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML, as a run folder's config.yaml.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, as often as wanted.")] = None,
    exclude: Exclude = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random draw.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    keep_adapted: Annotated[
        bool, typer.Option("--keep-adapted", help="Use the adapted model whatever the verdict. Both are saved.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a backbone to unlabelled images of the named classes."""
    with working(as_json):
        from finealign.backbone.zoo import word_on
        from finealign.classifier import FineAlign
        from finealign.cli.bars import Bars
        from finealign.config import read_config
        from finealign.method.registry import method_settings, require_class_prior
        from finealign.run.adapt import adapt_into, default_folder, plan, refuse_early
        from finealign.run.contract import RUN
        from finealign.runtime.distributed import Ranks
        from finealign.texts.prompts import read_classes, read_descriptions, read_templates
        from finealign.texts.shares import read_class_prior

        base = method_settings(method) if method else {}
        name = method.partition("@")[0] if method else None
        flags: dict[str, Any] = {
            "backbone": backbone,
            "method__name": name,
            "seed": seed,
            "device": device,
            "precision": precision,
            "data__exclude": exclude,
        }
        prior = None if class_prior is None else read_class_prior(class_prior)
        chosen = read_config(config, settings or (), base=base, method__class_prior=prior, **flags)
        if prior is not None:
            require_class_prior(chosen.method.name)
        ranks = Ranks.launched(chosen.device)
        if ranks.first and (word := word_on(chosen.backbone)):
            Console(stderr=True).print(f"[dim]{escape(word)}[/]", soft_wrap=True, highlight=False)
        model = FineAlign(
            read_classes(classes),
            descriptions=read_descriptions(descriptions) if descriptions else None,
            templates=read_templates(templates) if templates else None,
            config=chosen,
            ranks=ranks,
        )
        if resume and overwrite:
            raise FinealignError("--resume continues what is there and --overwrite removes it. Give one of them.")
        folder = out or default_folder(images, chosen)
        if dry_run:
            refuse_early(folder, resume=resume, overwrite=overwrite, ranks=ranks)
            prepared = model.prepare(images, labels=labels, progress=Bars(drawn=ranks.first))
            planned = plan(folder, prepared, resume=resume, overwrite=overwrite)
            if ranks.first:
                _show_plan(planned, as_json)
            ranks.leave()
            return

        def go_on() -> str:
            begun = (folder / RUN).is_file()
            return f"What was done is in {folder}. {how_to_resume()}" if begun else "Nothing was begun yet."

        with stoppable(Bars(drawn=ranks.first), go_on=go_on) as progress:
            summary = adapt_into(
                folder,
                model,
                images,
                labels,
                resume=resume,
                overwrite=overwrite,
                keep_adapted=keep_adapted,
                progress=progress,
            )
        if ranks.first:
            _show_summary(summary.as_json(), as_json)
        ranks.leave()


def _of_listed(plan: dict[str, Any]) -> str:
    """How many images there are where those adapted to are a sample; empty where they are all."""
    return f" of {plan['listed']}" if plan["listed"] > plan["images"] else ""


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    typer.echo(
        f"{plan['images']} images{_of_listed(plan)}, {len(plan['classes'])} classes, "
        f"{plan['descriptions']} descriptions, {plan['epochs']} epochs of {plan['steps_an_epoch']} steps. "
        f"Would write {plan['out']}. Settings:\n"
    )
    typer.echo(plan["settings"].rstrip())
    if plan.get("labels"):
        from finealign.model.known_labels import labels_in_words

        typer.echo(f"\nIt would learn from {labels_in_words(plan['labels'], len(plan['classes']))}.")
        tell_left_out(plan["labels"]["not_used"], Console(stderr=True))
    tell_left_out(plan["left_out"], Console(stderr=True))


def _show_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    from finealign.cli.tables import verdict_lines

    screen = Console()
    screen.print(
        f"Adapted [bold]{escape(summary['backbone'])}[/] to {len(summary['classes'])} classes on {summary['images']} "
        f"images by {summary['method']} in {summary['seconds']:.0f} s ({summary['stopped']}).",
        highlight=False,
    )
    if summary.get("labels"):
        from finealign.model.known_labels import labels_in_words

        told = labels_in_words(summary["labels"], len(summary["classes"]))
        screen.print(f"It learned from {told}: this is a supervised model.", soft_wrap=True, highlight=False)
    if summary["verdict"]:
        verdict_lines(summary["verdict"], summary["kept"], summary["why_kept"], screen)
    folder = escape(summary["out"])
    if summary["listed"] > summary["images"] + len(summary["set_aside"]):
        screen.print(
            f"These were drawn from {summary['listed']} images; finealign predict {folder} IMAGES labels all.",
            soft_wrap=True,
            highlight=False,
        )
    if summary["strangers"] and summary["strangers"]["likely"]:
        screen.print(
            f"[yellow]{summary['strangers']['likely']} of {summary['images']} images seem to show none of the "
            f"classes[/]; finealign predict {folder} IMAGES --reject auto labels such images so.",
            soft_wrap=True,
            highlight=False,
        )
    tell_left_out(summary["blank"], Console(stderr=True))
    tell_set_aside(summary["set_aside"], Console(stderr=True))
    screen.print(f"Run folder: [bold]{folder}[/]", soft_wrap=True, highlight=False)
    if summary["report"]:
        screen.print(f"Report: [bold]{escape(summary['report'])}[/]", soft_wrap=True, highlight=False)
    else:
        warning = f"[yellow]No report:[/] {escape(summary['report_problem'])}"
        Console(stderr=True).print(warning, soft_wrap=True, highlight=False)
    screen.print(f"Next: finealign predict {folder} IMAGES, or finealign evaluate {folder} LABELLED", soft_wrap=True)
