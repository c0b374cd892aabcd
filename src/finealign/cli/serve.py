"""`finealign serve`: classify images in a browser."""

from typing import Annotated

import typer

from finealign.cli.app import app
from finealign.cli.guards import print_json, refuse_launcher, require, working
from finealign.cli.options import AsJson, Device, ExpectedPrior, Model, Precision, RejectShare, UsedModel


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="The address to listen on. There is no login: mind who can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0: a free one.")] = 8000,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, help="Of one image file, in megabytes.")] = 20,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name to answer to, as of a proxy before it; as often as wanted.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A site whose pages may ask, as https://birds.example; as often as wanted. '*': every site."),
    ] = None,
    root_path: Annotated[str, typer.Option(help="The path below which a proxy before it has it, as /birds.")] = "",
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Of one image.")] = 25,
    waiting: Annotated[int, typer.Option(min=1, help="Requests under way at once; one more is refused.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to upload in, and to wait for an answer.")] = 30,
    use: UsedModel = None,
    reject: RejectShare = None,
    class_prior: ExpectedPrior = None,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Classify images in a browser, or by POST /predict, with an adapted model."""
    with working(as_json):
        refuse_launcher()
        require("serve", "fastapi", "uvicorn", "python_multipart")
        from finealign.classifier import FineAlign
        from finealign.model.fitted import CALLED
        from finealign.model.refusal import read_reject
        from finealign.serve.addresses import Addresses
        from finealign.serve.forms import Limits
        from finealign.serve.server import serve as answer

        share = read_reject(reject)
        hosts, origins = allow_host or (), allow_origin or ()
        addresses = Addresses.from_options(hosts, root_path, origins)  # before the model is loaded
        loaded = FineAlign.load(model, use=use, class_prior=class_prior, device=device, precision=precision)
        limits = Limits(
            max_upload_bytes=round(1e6 * max_upload_mb),
            max_pixels=round(1e6 * max_megapixels),
            waiting=waiting,
            timeout=timeout,
        )

        def tell(address: str) -> None:
            if as_json:
                told = {"address": address, "root_path": addresses.root}
                print_json(told | {"use": loaded.use_, "class_prior": loaded.class_prior_})
            else:
                typer.echo(f"Open {address} in a browser; {CALLED[loaded.use_]} answers. Ctrl-C stops the server.")

        answer(
            loaded,
            host,
            port,
            limits,
            allow_hosts=hosts,
            allow_origins=origins,
            root_path=root_path,
            reject=share,
            on_listening=tell,
        )
