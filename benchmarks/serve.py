"""How long an answer of `finealign serve` takes beside the bare call, and does a server stay as it is?

    python benchmarks/serve.py --out runs/serve                 # latency, about 20 seconds after the model is made
    python benchmarks/serve.py --out runs/serve --soak 30       # clients that keep sending, for so many minutes

The demo's model and images. Server and clients are processes of their own on the same machine, so they share its cores.
"""

import argparse
import http.client
import io
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from on_device import add_device
from task import make_task

IMAGES = 64
CONCURRENCY = (1, 4, 16)
MAX_UPLOAD = 1_000_000  # bytes, so that what is too large is quickly made and sent
BOUNDARY = "benchmark"
SERVER = """
import sys
from finealign import FineAlign
from finealign.runtime.devices import keep_freed_memory
from finealign.serve.forms import Limits
from finealign.serve.server import serve

keep_freed_memory()
limits = Limits(max_upload_bytes=int(sys.argv[2]))
model = FineAlign.load(sys.argv[1], device=sys.argv[3])
serve(model, port=0, limits=limits, on_listening=lambda address: print(address, flush=True))
"""


def make_model(out: Path, device: str) -> tuple[Path, list[bytes]]:
    """A model adapted for one epoch, and the files to classify: what they are adapted to changes no time."""
    from finealign import FineAlign
    from finealign.config import make_config

    task = make_task("demo", out, images=IMAGES)
    options = dict(zip(task.texts[::2], task.texts[1::2], strict=True))
    texts = json.loads(Path(options["--descriptions"]).read_text(encoding="utf-8"))
    config = make_config(
        {
            "backbone": task.backbone,
            "device": device,
            "data": {"cache": "temporary"},
            "training": {"epochs": 1, "batch_size": 32},
        }
    )
    FineAlign(list(texts), descriptions=texts, config=config).fit(task.images).save(out / "model")
    return out / "model", [path.read_bytes() for path in sorted(task.images.glob("*.png"))]


@contextmanager
def served(model: Path, log: Path, device: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server of its own process, and the process."""
    with log.open("w", encoding="utf-8") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(model), str(MAX_UPLOAD), device],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with server:
            try:
                assert server.stdout
                yield urlsplit(server.stdout.readline().strip()).netloc, psutil.Process(server.pid)
            finally:
                server.terminate()
                server.wait(120)


def form(content: bytes, field: str = "file") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="x"\r\n\r\n'
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def send(connection: http.client.HTTPConnection, body: bytes) -> int:
    """The status of one POST /predict, its answer read to the end."""
    connection.request("POST", "/predict", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
    response = connection.getresponse()
    response.read()
    return response.status


# --- latency ----------------------------------------------------------------------------------------------------------


def bare(model: Path, files: Sequence[bytes], seconds: float, device: str) -> list[float]:
    """Seconds of each call of ``explain_pixels`` with one decoded image."""
    from finealign import FineAlign
    from finealign.images.decoding import decode_image

    loaded = FineAlign.load(model, device=device)
    images = [np.array(decode_image(io.BytesIO(content))) for content in files]

    def call(number: int) -> None:
        loaded.explain_pixels([images[number % len(images)]], with_start=True)

    return timed(call, seconds)


def through_server(address: str, files: Sequence[bytes], seconds: float, clients: int) -> list[float]:
    """Seconds of each request by so many clients at once, each on a connection that it keeps."""
    bodies = [form(content) for content in files]

    def client(first: int) -> list[float]:
        connection = http.client.HTTPConnection(address, timeout=60)

        def call(number: int) -> None:
            status = send(connection, bodies[(first + number) % len(bodies)])
            if status != 200:
                sys.exit(f"The server answered {status}; its log is in --out.")

        return timed(call, seconds)

    with ThreadPoolExecutor(clients) as pool:
        return [one for found in pool.map(client, range(0, 7 * clients, 7)) for one in found]


def timed(call: Callable[[int], None], seconds: float) -> list[float]:
    """How long each of the calls took that began within so many seconds, the first few left out."""
    for number in range(3):
        call(number)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        call(len(found))
        found.append(time.perf_counter() - began)
    return found


def latency(out: Path, seconds: float, device: str) -> None:
    model, files = make_model(out, device)
    each = seconds / (1 + len(CONCURRENCY))
    alone = bare(model, files, each, device)
    base = (statistics.median(alone), percentile(alone, 0.95))
    print(f"{'':24}  p50 ms  p95 ms   x p50   x p95  images/s")
    show("explain_pixels alone", alone, base, each)
    with served(model, out / "serve.log", device) as (address, _):
        for clients in CONCURRENCY:
            show(f"POST /predict, {clients} at once", through_server(address, files, each, clients), base, each)


def show(name: str, found: list[float], base: tuple[float, float], seconds: float) -> None:
    p50, p95 = statistics.median(found), percentile(found, 0.95)
    ratios = f"{p50 / base[0]:8.2f}{p95 / base[1]:8.2f}"
    print(f"{name:24}{1000 * p50:8.1f}{1000 * p95:8.1f}{ratios}{len(found) / seconds:10.1f}")


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# --- soak -------------------------------------------------------------------------------------------------------------


def soak(out: Path, minutes: float, clients: int, device: str) -> None:
    """Clients that keep sending good images, broken ones and too large ones; what came back, and what it cost."""
    model, files = make_model(out, device)
    rng, kinds = random.Random(0), {
        "good": (200, [form(content) for content in files]),
        "torn": (422, [form(content[: len(content) // 2]) for content in files]),
        "text": (422, [form(b"no image at all")]),
        "no file": (422, [form(b"x", field="image")]),
        "too large": (413, [form(bytes(MAX_UPLOAD + 50_000))]),
    }  # fmt: skip
    counts: Counter[tuple[str, int]] = Counter()
    lost: Counter[str] = Counter()
    lock, end, samples = threading.Lock(), time.monotonic() + 60 * minutes, list[tuple[float, int, int]]()
    seeds = [rng.random() for _ in range(clients)]

    def client(seed: float) -> None:
        draw, connection = random.Random(seed), http.client.HTTPConnection(address, timeout=120)
        while time.monotonic() < end:
            (kind,) = draw.choices(list(kinds), weights=(12, 2, 2, 1, 1))
            try:
                status = send(connection, draw.choice(kinds[kind][1]))
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with lock:
                    lost[f"{kind}: {type(error).__name__}"] += 1
                continue
            with lock:
                counts[kind, status] += 1

    with served(model, out / "serve.log", device) as (address, process), ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, seed) for seed in seeds]
        while not all(one.done() for one in running):
            time.sleep(min(1, minutes))
            samples.append((process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()))
        for one in running:
            one.result()
    wrong = {key: number for key, number in counts.items() if key[1] != kinds[key[0]][0]}
    print(f"{sum(counts.values())} requests by {clients} clients in {minutes:g} minutes")
    for (kind, status), number in sorted(counts.items()):
        print(f"  {kind}: {number} answered {status}")
    print(f"lost: {sum(lost.values())} {dict(lost) or ''}\nanswered by another status than wanted: {wrong or 0}")
    tenth = max(1, len(samples) // 10)
    settled = samples[tenth:] or samples[-1:]
    quarter = max(1, len(settled) // 4)
    for column, name in enumerate(("memory_mb", "open_files", "threads")):
        values = [row[column] for row in settled]
        first, last = statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])
        means = ", ".join(
            f"{statistics.mean(values[at : at + quarter]):.1f}" for at in range(0, len(values) - quarter + 1, quarter)
        )
        print(
            f"{name}: {first:.1f} after the warm-up, {last:.1f} at the end ({last / first - 1:+.2%}), "
            f"highest {max(values):.1f}; by quarters {means}"
        )
    if lost or wrong:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20, help="of latency measurements in all")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="keep sending for so long instead")
    parser.add_argument("--clients", type=int, default=8, help="of the soak")
    add_device(parser)
    known = parser.parse_args()
    known.out.mkdir(parents=True)  # a new folder, so that nothing of another run is mixed in
    if known.soak:
        soak(known.out, known.soak, known.clients, known.device)
    else:
        latency(known.out, known.seconds, known.device)


if __name__ == "__main__":
    main()
