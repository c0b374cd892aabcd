"""The command's verbs. No logic lives here, and what is heavy to import is imported inside the verbs."""

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finealign import __version__
from finealign.errors import FinealignError, StoppedError

if TYPE_CHECKING:  # torch comes with them
    from finealign.classifier import FineAlign
    from finealign.terminal import Bars
    from finealign.types import Score

app = typer.Typer(
    name="finealign",
    help="Adapt a CLIP-like model to your classes from unlabelled images and class names.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Precision = Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where it is fast.")]
ScoreKind = Annotated[
    Literal["global", "las", "fused"] | None,
    typer.Option("--score", help="global: one pass; las: crops; fused: their mean. Default: the method's."),
]


def main() -> None:
    """The command."""
    # open_clip logs to the root logger, and one that nobody has set up would print every line to the screen.
    logging.basicConfig(handlers=[logging.NullHandler()])
    try:
        app()
    except SystemExit as done:
        if "LOCAL_RANK" in os.environ:  # threads of gloo's now and then abort an interpreter that takes itself down
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(done.code if isinstance(done.code, int) else done.code is not None)
        raise


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def adapt(
    images: Annotated[str, typer.Argument(help="A folder, a .txt list, or a .csv with a column path. No labels.")],
    classes: Annotated[str, typer.Option(help="A file with one class name a line, or names with commas between.")],
    descriptions: Annotated[Path | None, typer.Option(help='JSON: {"class": ["a sentence", ...]}.')] = None,
    templates: Annotated[Path | None, typer.Option(help="A file with one template a line, {} for the name.")] = None,
    backbone: Annotated[str | None, typer.Option(help="ARCH/PRETRAINED, hf-hub:NAME or local-dir:PATH.")] = None,
    method: Annotated[
        str | None, typer.Option(help="fair or a peer, as dpa, wca@published. `finealign methods` lists them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/IMAGES-METHOD-seedN.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML, as a run folder's config.yaml.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, as often as wanted.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random draw.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    keep_adapted: Annotated[
        bool, typer.Option("--keep-adapted", help="Save the adapted model even if the verdict is that it hurt.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a backbone to unlabelled images of the named classes."""
    with _working(as_json):
        from finealign.classifier import FineAlign
        from finealign.config import read_config
        from finealign.layout import RUN
        from finealign.methods import method_settings
        from finealign.prompts import read_classes, read_descriptions, read_templates
        from finealign.ranks import Ranks
        from finealign.run_folder import adapt_into, default_folder, plan
        from finealign.terminal import Bars

        base = method_settings(method) if method else {}
        name = method.partition("@")[0] if method else None
        flags = {"backbone": backbone, "method__name": name, "seed": seed, "device": device, "precision": precision}
        chosen = read_config(config, settings or (), base=base, **flags)
        ranks = Ranks.launched(chosen.device)
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
            found = plan(folder, model, images, resume=resume, overwrite=overwrite)
            if ranks.first:
                _show_plan(found, as_json)
            ranks.leave()
            return

        def go_on() -> str:
            begun = (folder / RUN).is_file()
            return f"What was done is in {folder}. {_how_to_resume()}" if begun else "Nothing was begun yet."

        with _stoppable(Bars(drawn=ranks.first), go_on=go_on) as progress:
            summary = adapt_into(
                folder, model, images, resume=resume, overwrite=overwrite, keep_adapted=keep_adapted, progress=progress
            )
        if ranks.first:
            _show_summary(summary.as_json(), as_json)
        ranks.leave()


@app.command()
def describe(
    classes: Annotated[str, typer.Option(help="A file with one class name a line, or names with commas between.")],
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
    backbone: Annotated[str | None, typer.Option(help="ARCH/PRETRAINED, hf-hub:NAME or local-dir:PATH.")] = None,
    templates: Annotated[Path | None, typer.Option(help="A file with one template a line, {} for the name.")] = None,
    from_templates: Annotated[
        bool, typer.Option("--from-templates", help="Ask nobody: write filled templates.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again, and replace --out when done.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask a chat endpoint (OpenAI, vLLM, Ollama, llama.cpp) for visual descriptions of every class."""
    with _working(as_json):
        _refuse_launcher()
        from finealign.backbone import load_backbone
        from finealign.config import DEFAULT_BACKBONE
        from finealign.describe.endpoint import Asking
        from finealign.describe.record import record_path
        from finealign.describe.run import describe as ask_for
        from finealign.describe.run import from_templates as fill
        from finealign.devices import choose_device
        from finealign.prompts import read_classes, read_templates
        from finealign.terminal import Bars, described_lines

        names = read_classes(classes)
        wanted = read_templates(templates) if templates else None
        if from_templates:
            found = fill(names, domain=domain, out=out, templates=wanted, overwrite=overwrite)
        else:
            if model is None:
                raise FinealignError(
                    "--model is missing. Wanted: the name of a model that the endpoint knows, or --from-templates to "
                    "ask none."
                )
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

            def go_on() -> str:
                record = record_path(out)
                kept = f"What was accepted is in {record}. The same command, without --overwrite, goes on."
                return kept if record.is_file() else "Nothing was begun yet."

            with _stoppable(Bars(), go_on=go_on) as progress:
                found = ask_for(
                    names,
                    domain=domain,
                    out=out,
                    backbone=load_backbone(backbone or DEFAULT_BACKBONE, device=choose_device(device)),
                    asking=asking,
                    templates=wanted,
                    overwrite=overwrite,
                    progress=progress,
                )
        if as_json:
            _print_json(found.as_json())
            return
        described_lines(found.as_json(), Console(), Console(stderr=True))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A run folder, or its model/.")],
    images: Annotated[str, typer.Argument(help="A folder, an image, a .txt list or a .csv with a column path.")],
    out: Annotated[Path | None, typer.Option(help="FILE.csv, .jsonl or .parquet. Default: CSV to the screen.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes a row.")] = 1,
    score: ScoreKind = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it is there.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Classify images with an adapted model."""
    with _working(as_json):
        from finealign.classifier import FineAlign
        from finealign.images import list_images, set_aside_csv
        from finealign.predictions import Row, beside, best_rows, check_destination, write_csv, write_predictions
        from finealign.ranks import Ranks
        from finealign.terminal import Bars

        ranks = Ranks.launched(device)

        if out:
            check_destination(out, overwrite=overwrite)
            check_destination(beside(out), overwrite=overwrite)
        paths = list_images(images)
        loaded = FineAlign.load(model, device=device, precision=precision, ranks=ranks)
        names = loaded.texts_.classes

        def go_on() -> str:
            return "No file was written; the same command starts again."

        with (
            _stoppable(Bars(drawn=ranks.first), go_on=go_on) as progress,
            progress.stage("predicting", len(paths)) as stage,
        ):
            found = loaded.readable_predictions(paths, score=score, advance=progress.between(stage, ranks))
            rows: list[Row] = []
            if not ranks.first:
                count = sum(1 for _ in found)
            elif out:
                count = write_predictions(found, names, out, top_k=top_k)
            elif as_json:
                rows = list(best_rows(found, names, top_k))
                count = len(rows)
            else:
                count = write_csv(best_rows(found, names, top_k), sys.stdout, min(top_k, len(names)))
        ranks.leave()
        if not ranks.first:
            return
        if out and loaded.set_aside_:
            set_aside_csv(loaded.set_aside_, beside(out))
        elif out:
            with suppress(OSError):
                beside(out).unlink(missing_ok=True)  # of an earlier run that is being replaced
        if as_json:
            result: dict[str, Any] = {"images": count, "set_aside": [asdict(row) for row in loaded.set_aside_]}
            _print_json(result | ({"out": str(out)} if out else {"predictions": [row.as_json() for row in rows]}))
            return
        notes = Console(stderr=True)
        if out:
            notes.print(f"{count} predictions in {escape(str(out))}.")
        _tell_set_aside([asdict(row) for row in loaded.set_aside_], notes)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder, or its model/.")],
    labelled: Annotated[Path, typer.Argument(help="A folder of class folders, or a CSV with columns path and label.")],
    score: ScoreKind = None,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure an adapted model, and the one it started from, on labelled images."""
    with _working(as_json):
        from finealign.classifier import FineAlign
        from finealign.ranks import Ranks
        from finealign.terminal import evaluation_tables

        ranks = Ranks.launched(device)
        loaded = FineAlign.load(model, device=device, precision=precision, ranks=ranks)
        found = _measured(loaded, labelled, score)
        ranks.leave()
        if not ranks.first:
            return
        if as_json:
            _print_json(found)
            return
        evaluation_tables(found, Console())
        _tell_set_aside([asdict(row) for row in loaded.set_aside_], Console(stderr=True))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder of `finealign adapt`.")],
    labelled: Annotated[
        Path | None, typer.Option(help="Measure on these too: a folder of class folders, or a CSV path,label.")
    ] = None,
    score: ScoreKind = None,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a run's report.html anew, with accuracy, confusion and calibration where there are labels."""
    with _working(as_json):
        _refuse_launcher()
        from finealign.report import render, save_evaluation, write_report

        if score and not labelled:
            raise FinealignError("--score is of what --labelled measures. Give --labelled, or leave it out.")
        if labelled:
            from finealign.classifier import FineAlign

            render(run, measured=False)  # before the images are looked at: is there a run to report?
            loaded = FineAlign.load(run, device=device, precision=precision)
            found = _measured(loaded, labelled, score, in_full=True)
            save_evaluation(found | {"score": score or loaded.score_}, run)
        path = write_report(run)
        if as_json:
            _print_json({"report": str(path)})
            return
        Console().print(f"Report: [bold]{escape(str(path))}[/]", soft_wrap=True, highlight=False)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="A run folder, or its model/.")],
    host: Annotated[str, typer.Option(help="The address to listen on. There is no login: mind who can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0: a free one.")] = 8000,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, help="Of one image file, in megabytes.")] = 20,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name to answer to, as of a proxy before it; as often as wanted.")
    ] = None,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Of one image.")] = 25,
    waiting: Annotated[int, typer.Option(min=1, help="Requests under way at once; one more is refused.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to upload in, and to wait for an answer.")] = 30,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Classify images in a browser, or by POST /predict, with an adapted model."""
    with _working(as_json):
        _refuse_launcher()
        _require("serve", "fastapi", "uvicorn", "python_multipart")
        from finealign.classifier import FineAlign
        from finealign.serve.app import Limits
        from finealign.serve.server import serve as answer

        loaded = FineAlign.load(model, device=device, precision=precision)
        limits = Limits(
            max_upload_bytes=round(1e6 * max_upload_mb),
            max_pixels=round(1e6 * max_megapixels),
            waiting=waiting,
            timeout=timeout,
        )

        def tell(address: str) -> None:
            if as_json:
                _print_json({"address": address})
            else:
                typer.echo(f"Open {address} in a browser. Ctrl-C stops the server.")

        answer(loaded, host, port, limits, allow_hosts=allow_host or (), on_listening=tell)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A run folder, or its model/.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[
        Literal["open_clip", "hf", "onnx"], typer.Option(help="open_clip; hf: transformers; onnx: one file.")
    ],
    score: ScoreKind = None,
    push: Annotated[str | None, typer.Option(help="ORG/NAME on the hub to upload what was written to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="For yourself alone on the hub.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapted model for another library, checked there against finealign's own scores."""
    with _working(as_json):
        _refuse_launcher()
        from finealign.classifier import FineAlign
        from finealign.export.hub import push as upload
        from finealign.export.run import export as write
        from finealign.terminal import exported_lines

        if private and not push:
            raise FinealignError("--private is of what --push uploads. Give --push ORG/NAME, or leave it out.")
        loaded = FineAlign.load(model, device="cpu", precision="fp32")
        found = write(loaded, out, format=format, score=score, overwrite=overwrite).as_json()
        found["url"] = upload(out, push, private) if push else None
        if as_json:
            _print_json(found)
            return
        exported_lines(found, Console())


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Where it goes. Default: runs/demo-seedN, with --quick -quick.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random draw, the world's included.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images and steps: a look, not a measurement.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the demo in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the methods on drawn birds with the small model that ships along: no download, no labels."""
    with _working(as_json):
        _refuse_launcher()
        from finealign.demo.run import default_folder, run_demo
        from finealign.terminal import Bars, demo_table

        folder = out or default_folder(seed=seed, quick=quick)
        try:
            found = run_demo(folder, seed=seed, quick=quick, overwrite=overwrite, progress=Bars())
        except KeyboardInterrupt:
            raise FinealignError(
                f"Interrupted. The same command with --overwrite starts the demo in {folder} again."
            ) from None
        if as_json:
            _print_json(found.as_json())
            return
        screen = Console()
        demo_table(found, screen)
        for name, path in (("Picture", found.picture), ("Report", found.report)):
            screen.print(f"{name}: [bold]{escape(str(path))}[/]", soft_wrap=True, highlight=False)


@app.command()
def benchmark(
    datasets: Annotated[str, typer.Option(help="Names with commas between, as dtd,eurosat, or path:DIR.")] = "",
    methods: Annotated[str, typer.Option(help="Names with commas between, as fair,dpa@published.")] = "fair,cupl",
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "0,1,2",
    backbone: Annotated[str | None, typer.Option(help="ARCH/PRETRAINED, hf-hub:NAME or local-dir:PATH.")] = None,
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
    """Run methods on labelled sets and tabulate them: top-1, gain over zero-shot, paired intervals, time."""
    with _working(as_json):
        _refuse_launcher()
        from finealign.benchmark.catalogue import DATA_SETS
        from finealign.benchmark.grid import Cell, Grid, run_grid
        from finealign.benchmark.table import against_published, gains, make_table, markdown, save_table
        from finealign.benchmark.table import as_json as table_as_json
        from finealign.config import DEFAULT_BACKBONE, read_overrides
        from finealign.terminal import Bars, catalogue_table

        if catalogue:
            if as_json:
                _print_json({"datasets": [one.as_json() for one in DATA_SETS.values()]})
            else:
                catalogue_table(DATA_SETS.values(), Console())
            return
        try:
            numbers = tuple(int(seed) for seed in _names(seeds, "--seeds"))
        except ValueError:
            raise FinealignError(f"--seeds {seeds!r} are not numbers. Wanted: as 0,1,2.") from None
        grid = Grid(
            datasets=_names(datasets, "--datasets"),
            methods=_names(methods, "--methods"),
            seeds=numbers,
            backbone=backbone or DEFAULT_BACKBONE,
            data_root=data_root,
            out=out,
            settings=read_overrides(settings or ()),
            download=download,
        )
        notes = Console(stderr=True)

        def tell(cell: Cell) -> None:
            gained = 100 * (cell.top1[cell.score] - cell.top1["start"])
            notes.print(
                f"{cell.dataset} {cell.method} seed {cell.seed}: {100 * cell.top1[cell.score]:.1f} ({gained:+.1f}) "
                f"in {cell.seconds['fit']:.0f} s",
                highlight=False,
                soft_wrap=True,
            )

        try:
            cells = run_grid(grid, progress=Bars(), on_cell=tell)
        except KeyboardInterrupt:
            raise FinealignError(f"Interrupted. The finished cells are in {out}; the same command goes on.") from None
        table = make_table(cells, grid.datasets, grid.methods, grid.seeds)
        save_table(table, out)
        if as_json:
            _print_json(table_as_json(table))
            return
        typer.echo(against_published(table) if compare else f"{markdown(table)}\n{gains(table)}")


def _names(text: str, flag: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise FinealignError(f"{flag} names nothing. Wanted: at least one name, several with commas between.")
    return names


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods, with their presets and what each is."""
    with _guarded(as_json):
        from finealign.methods import describe_methods

        found = describe_methods()
        if as_json:
            _print_json({"methods": found})
            return
        table = Table(box=None)
        for name in ("method", "presets", "trains", "what it is"):
            table.add_column(name)
        for row in found:
            presets = " ".join(f"@{preset}" for preset in row["presets"])
            table.add_row(row["name"], presets, "yes" if row["trains"] else "no", escape(row["about"]))
        Console().print(table)


@app.command()
def models(
    containing: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the backbones that can be named as ARCH/PRETRAINED."""
    with _guarded(as_json):
        from finealign.backbone import list_backbones
        from finealign.config import DEFAULT_BACKBONE

        names = [name for name in list_backbones() if containing.casefold() in name.casefold()]
        if as_json:
            _print_json({"default": DEFAULT_BACKBONE, "models": names})
            return
        for name in names:
            typer.echo(f"{name}  (default)" if name == DEFAULT_BACKBONE else name)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine has: versions, device, precision, cached weights, hub within reach or not."""
    with _guarded(as_json):
        from finealign.doctor import examine

        found = examine()
        if as_json:
            _print_json(found)
            return
        table = Table(show_header=False, box=None)
        for name, value in found["versions"].items():
            table.add_row(name, value)
        bf16 = [name for name, there in found["cpu_bf16"].items() if there]
        table.add_row("device", f"{found['device']} ({found['device_name']}, {found['threads']} threads)")
        table.add_row("precision", f"{found['precision']} (bf16 on the CPU: {', '.join(bf16) or 'not supported'})")
        hub, cache = found["hub"], found["cache"]
        reach = {True: "within reach", False: "not within reach", None: "unknown"}[hub["reachable"]]
        table.add_row("hub", f"{hub['endpoint']}: {reach}{' (' + hub['reason'] + ')' if hub['reason'] else ''}")
        table.add_row("cache", f"{cache['folder']}: {', '.join(cache['models']) or 'no models'}")
        Console().print(table)


@contextmanager
def _working(as_json: bool) -> Iterator[None]:
    """For the verbs that encode: as ``_guarded``, in a process set up for it."""
    with _guarded(as_json):
        from finealign.devices import keep_freed_memory

        keep_freed_memory()
        yield


@contextmanager
def _guarded(as_json: bool) -> Iterator[None]:
    """A user's mistake ends with its sentence and exit code 1, not with a traceback."""
    try:
        yield
    except FinealignError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":  # most often it says what the first says
            typer.echo(f"process {rank}: {error}", err=True)
        elif as_json:
            _print_json({"error": str(error), "kind": type(error).__name__})
        else:
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None


@contextmanager
def _stoppable(progress: "Bars", *, go_on: Callable[[], str]) -> Iterator["Bars"]:
    """Where SIGTERM and Ctrl-C end the work between two pieces of it: exit code 128 plus the signal, as in a shell."""
    try:
        with progress.listening():
            yield progress
    except (StoppedError, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"{error if isinstance(error, StoppedError) else 'Interrupted.'} {go_on()}", err=True)
        raise typer.Exit(128 + (progress.stopped_by or signal.SIGINT)) from None


def _require(extra: str, *packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise FinealignError(f"This needs {', '.join(missing)}: pip install 'finealign[{extra}]'.")


def _refuse_launcher() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FinealignError(
            "This verb is not shared among the processes of a launcher. Start it without one; several "
            "`finealign benchmark` with the same --out share its cells."
        )


def _how_to_resume() -> str:
    """This very command, to go on with what it began."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    program = ["python", "-m", "finealign"] if Path(sys.argv[0]).name == "__main__.py" else ["finealign"]
    launcher = " by the same launcher" if "LOCAL_RANK" in os.environ else ""
    return f"Go on{launcher} with:\n{shlex.join([*program, *words, '--resume'])}"


def _print_json(value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    typer.echo(text.encode("utf-8", "backslashreplace"))  # a path may be no UTF-8


def _measured(model: "FineAlign", labelled: Path, score: "Score | None", *, in_full: bool = False) -> dict[str, object]:
    """What labels tell of a model and of the one it started from."""
    from finealign.evaluate import evaluate_predictions, read_truth
    from finealign.terminal import Bars

    names = model.texts_.classes
    truth = read_truth(labelled, names)
    with Bars().stage("evaluating", len(truth.paths)) as stage:
        predictions = list(model.readable_predictions(truth.paths, score=score, with_start=True, advance=stage.advance))
    return evaluate_predictions(predictions, truth, names, set_aside=len(model.set_aside_), in_full=in_full)


def _show_plan(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(found)
        return
    typer.echo(
        f"{found['images']} images, {len(found['classes'])} classes, {found['descriptions']} descriptions, "
        f"{found['epochs']} epochs of {found['steps_an_epoch']} steps. Would write {found['out']}. Settings:\n"
    )
    typer.echo(found["settings"].rstrip())


def _show_summary(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(found)
        return
    from finealign.terminal import verdict_lines

    screen = Console()
    screen.print(
        f"Adapted [bold]{escape(found['backbone'])}[/] to {len(found['classes'])} classes on {found['images']} images "
        f"by {found['method']} in {found['seconds']:.0f} s ({found['stopped']}).",
        highlight=False,
    )
    if found["verdict"]:
        verdict_lines(found["verdict"], found["kept"], screen)
    _tell_set_aside(found["set_aside"], Console(stderr=True))
    folder = escape(found["out"])
    screen.print(f"Run folder: [bold]{folder}[/]", soft_wrap=True, highlight=False)
    if found["report"]:
        screen.print(f"Report: [bold]{escape(found['report'])}[/]", soft_wrap=True, highlight=False)
    else:
        warning = f"[yellow]No report:[/] {escape(found['report_problem'])}"
        Console(stderr=True).print(warning, soft_wrap=True, highlight=False)
    screen.print(f"Next: finealign predict {folder} IMAGES, or finealign evaluate {folder} LABELLED", soft_wrap=True)


def _tell_set_aside(rows: list[dict[str, str]], screen: Console) -> None:
    if not rows:
        return
    from finealign.images import printable

    first = rows[0]
    screen.print(
        f"[yellow]{len(rows)} images could not be read[/]; "
        f"the first: {escape(printable(first['path']))} ({escape(first['reason'])}).",
        soft_wrap=True,
        highlight=False,
    )
