"""Train the demo's model from scratch: a small CLIP that has seen captioned drawings of randomly composed birds.

    python recipes/demo_model.py --out src/finealign/demo/weights

It draws a pool of birds in three styles (paper, ink, crayon) by daylight and teaches both towers together: first single
words, a short phrase for every value of every trait against the whole image and against each patch that shows the part
(the drawing knows where its parts are; captions alone taught a transformer this small next to nothing in the first
minutes), then captions that name two to five traits, by CLIP's loss, with the words going on. No species of the demo is
ever drawn (every random bird is compared with all 24), none of their names is ever written, and none of the styles is
the demo's. Everything comes from the seed; 39 minutes on two cores of an EPYC, with torch 2.15 (2.9 or newer is
needed, for Muon).
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, interpolate, normalize, one_hot

from finealign.demo.birds import COLOURS, VALUES, Part, Traits, anatomy, random_pose, random_traits
from finealign.demo.species import SPECIES
from finealign.runtime.atomic import save_tensors

Pixels = NDArray[np.uint8]

IMAGE_SIZE, PATCH, POOL_SIZE = 48, 8, 72  # of the model's input, its patches, and the drawings it is cut from
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "width": 128,
        "layers": 5,
        "head_width": 32,
        "pool_type": "avg",
    },
    "text_cfg": {"context_length": 36, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}
PREPROCESS = {
    "size": IMAGE_SIZE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
HELD_OUT = 2_000  # drawings that are measured on
EVERY, SNAPSHOT = 100, 500  # steps between two lines of the log, and between two saved states
STYLES = ("paper", "ink", "crayon")
SPECIES_TRAITS = frozenset(traits for _, traits in SPECIES)
SPECIES_NAMES = frozenset(name for name, _ in SPECIES)


# --- drawing ----------------------------------------------------------------------------------------------------------


# What a caption can say of the place where a part is seen: the traits of the part, and the absence of what it lacks.
SAID_OF = {
    "body": ("body", "silhouette"),
    "neck": ("body", "silhouette"),
    "head": ("body", "silhouette"),
    "belly": ("belly", "breast"),
    "breast": ("breast",),
    "wing": ("wing", "wing_bars"),
    "wing bar": ("wing_bars",),
    "cap": ("cap", "crest"),
    "crest": ("crest",),
    "beak": ("beak", "beak_colour"),
    "eye": ("eye_ring",),
    "eye ring": ("eye_ring",),
    "glint": ("eye_ring",),
    "tail": ("tail",),
    "leg": ("legs",),
    "foot": ("legs",),
}
PARTS = tuple(SAID_OF)


def draw(traits: Traits, rng: np.random.Generator, size: int = POOL_SIZE) -> tuple[Pixels, Pixels]:
    """One drawing in one of the three styles, (size, size, 3), and the part seen at each pixel, 0 for none."""
    style = str(rng.choice(STYLES))
    canvas = _background(rng, 2 * size)
    parts = _placed(anatomy(traits, random_pose(rng)), rng, 2 * size)
    shift = rng.normal(0, 12, 3)
    pen = ImageDraw.Draw(canvas)
    places = Image.new("L", canvas.size)
    mark = ImageDraw.Draw(places)
    if style == "paper":
        for part in parts:
            pen.polygon(_flat(part.points + 3), fill=(70, 70, 75))
    for part in parts:
        colour = _tinted(COLOURS[part.colour], rng, shift)
        mark.polygon(_flat(part.points), fill=1 + PARTS.index(part.name))
        pen.polygon(_flat(part.points), fill=colour, outline=(30, 28, 30) if style == "ink" else None, width=2)
    if style == "crayon":
        grain = rng.normal(128, rng.uniform(15, 60), (2 * size, 2 * size)).clip(0, 255).astype(np.uint8)
        canvas = Image.blend(canvas, Image.fromarray(grain).convert("RGB"), float(rng.uniform(0.1, 0.22)))
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.5))))
    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    pixels = (pixels - 128) * rng.uniform(0.8, 1.15) + 128 + rng.uniform(-20, 20)
    noisy = (pixels + rng.normal(0, rng.uniform(0, 6), pixels.shape)).clip(0, 255).astype(np.uint8)
    return noisy, np.asarray(places.resize((size, size), Image.Resampling.NEAREST))


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    first, second = rng.uniform(60, 245, (2, 3))
    ramp = np.linspace(0, 1, size)[:, None, None]
    if rng.random() < 0.5:
        ramp = ramp.transpose(1, 0, 2)
    pixels = np.broadcast_to(first * (1 - ramp) + second * ramp, (size, size, 3))
    canvas = Image.fromarray(pixels.astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 6))):
        x, y = rng.uniform(0, size, 2)
        w, h = rng.uniform(0.03, 0.45, 2) * size
        colour = tuple(int(value) for value in rng.uniform(30, 250, 3))
        kind = rng.integers(3)
        if kind == 0:
            pen.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
        elif kind == 1:
            pen.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
        else:
            pen.line((x, y, *rng.uniform(0, size, 2)), fill=colour, width=int(rng.integers(1, 9)))
    return canvas


def _placed(parts: Sequence[Part], rng: np.random.Generator, size: int) -> list[Part]:
    points = np.concatenate([part.points for part in parts])
    low, high = points.min(0), points.max(0)
    scale = rng.uniform(0.6, 1.15) * size / (high - low).max()
    middle = (low + high) / 2
    if scale * (high - low).max() > size:  # too large for the page: any part of it may be what is seen
        middle = rng.uniform(low + 0.3 * (high - low), high - 0.3 * (high - low))
    at = size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    mirror = np.array([1.0 if rng.random() < 0.5 else -1.0, 1.0])
    return [Part(part.name, part.colour, (part.points - middle) * mirror * scale + at) for part in parts]


def _tinted(colour: Sequence[int], rng: np.random.Generator, shift: NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = (np.array(colour) + shift + rng.normal(0, 9, 3)).clip(0, 255).astype(int)
    return int(red), int(green), int(blue)


def _flat(points: NDArray[np.float64]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points]


# --- captions ---------------------------------------------------------------------------------------------------------

MARKED = {"spotted": ["spots on the breast"], "banded": ["a band across the breast"]}
SHAPED = {"none": "", "pointed": "pointed", "fan": "fan-shaped", "curled": "curled"}


def invented_name(rng: random.Random) -> str:
    """A word that means nothing, so that the model learns to expect nothing of a name."""
    while True:
        name = ""
        for _ in range(rng.randint(2, 3)):
            name += rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou")
            name += rng.choice(["", "", "n", "r", "l", "s", "m", "k"])
        if rng.random() < 0.3:
            name = f"{name} {rng.choice(['bird', 'wing', 'warbler', 'finch', 'tern', 'crane', 'duck', 'jay'])}"
        if name not in SPECIES_NAMES:
            return name


def word(trait: str, value: str, rng: random.Random) -> str:
    """A noun phrase for one value of one trait."""
    if value == "none":
        return rng.choice(
            {
                "crest": ["no crest", "a bare crown"],
                "wing_bars": ["no wing bars", "plain wings"],
                "eye_ring": ["no eye ring", "a plain eye"],
            }[trait]
        )
    shown = SHAPED.get(value, value)
    return rng.choice(
        {
            "silhouette": [f"{_a(shown)} {rng.choice(['build', 'shape', 'silhouette', 'body shape'])}"],
            "body": [f"{shown} plumage", f"{_a(shown)} body", f"{_a(shown)} back"],
            "wing": [f"{shown} wings", f"{_a(shown)} wing"],
            "belly": [f"{_a(shown)} belly", f"{shown} underparts"],
            "cap": [f"{_a(shown)} cap", f"{_a(shown)} crown"],
            "beak": [f"{_a(shown)} beak", f"{_a(shown)} bill"],
            "beak_colour": [f"{_a(shown)} beak", f"{_a(shown)} bill"],
            "crest": [f"{_a(shown)} crest"],
            "wing_bars": {
                "one": ["one wing bar", "a single wing bar"],
                "two": ["two wing bars", "a double wing bar"],
            }.get(value, []),
            "eye_ring": [f"{_a(shown)} eye ring", f"{_a(shown)} ring around the eye"],
            "tail": [f"{_a(shown)} tail"],
            "breast": [f"{_a(shown)} breast", *MARKED.get(value, [])],
            "legs": [f"{shown} legs", f"{shown} feet"],
        }[trait]
    )


def clause(bird: Traits, trait: str, rng: random.Random) -> str:
    """A clause on one trait of a bird."""
    value = getattr(bird, trait)
    if value == "none":
        return rng.choice(
            {
                "crest": ["it has no crest", "the crest is missing"],
                "wing_bars": ["its wings are plain", "the wing has no bars"],
                "eye_ring": ["it has no eye ring", "no ring is around the eye"],
            }[trait]
        )
    shown = SHAPED.get(value, value)
    bill = rng.choice(["beak", "bill"])
    return rng.choice(
        {
            "silhouette": [f"it is {_a(shown)} bird", f"its build is {shown}"],
            "body": [f"its body is {shown}", f"its plumage is {shown}"],
            "wing": [f"its wings are {shown}"],
            "belly": [f"its belly is {shown}", f"below it is {shown}"],
            "cap": [f"its crown is {shown}", f"its cap is {shown}"],
            "beak": [f"its {bill} is {shown}", f"the {bill} is {shown} and {bird.beak_colour}"],
            "beak_colour": [f"its {bill} is {shown}", f"the {bill} is {bird.beak_colour} and {bird.beak}"],
            "crest": [f"its crest is {shown}", f"the crest is {bird.cap} and {shown}"],
            "wing_bars": [f"its wing has {value} {'bar' if value == 'one' else 'bars'}"],
            "eye_ring": [f"its eye ring is {shown}", f"the eye is ringed in {shown}"],
            "tail": [f"its tail is {shown}", f"the tail is {bird.wing} and {shown}"],
            "breast": [f"its breast is {shown}"],
            "legs": [f"its {rng.choice(['legs', 'feet'])} are {shown}"],
        }[trait]
    )


def noun(bird: Traits, trait: str, rng: random.Random) -> str:
    """A noun phrase on one trait of a bird, at times with a second trait of the same part."""
    joint = {
        "beak": f"{_a(f'{bird.beak} {bird.beak_colour}')} {rng.choice(['beak', 'bill'])}",
        "beak_colour": f"{_a(f'{bird.beak_colour}, {bird.beak}')} {rng.choice(['beak', 'bill'])}",
        "tail": f"{_a(bird.tail)} {bird.wing} tail",
    }
    if bird.crest != "none":
        joint["crest"] = f"{_a(SHAPED[bird.crest])} {bird.cap} crest"
    return joint[trait] if trait in joint and rng.random() < 0.5 else word(trait, getattr(bird, trait), rng)


# Small parts are spoken of more often than the colours that fill half the picture.
TELLING = {
    name: 1.0 if name in ("silhouette", "body", "wing", "belly", "cap", "beak_colour") else 2.5 for name in VALUES
}


def caption(bird: Traits, rng: random.Random) -> str:
    """A sentence that names two to five of a bird's traits."""
    # The smallest of exponential draws: a choice without replacement, by weight.
    odds = {name: rng.expovariate(weight) for name, weight in TELLING.items()}
    chosen = sorted(odds, key=odds.__getitem__)[: rng.randint(2, 5)]
    who = _who(rng)
    if rng.random() < 0.3:
        opening = rng.choice(["", f"{who}: ", f"in {who} ", "note that "])
        return opening + _listed([clause(bird, name, rng) for name in chosen])
    nouns = _listed([noun(bird, name, rng) for name in chosen])
    kind = f"{_a(rng.choice([bird.silhouette, bird.body, f'{bird.silhouette} {bird.body}']))} bird"
    return rng.choice(FRAMES).format(who=who, nouns=nouns, kind=kind)


FRAMES = (
    "{who} with {nouns}",
    "{who} has {nouns}",
    "{nouns}",
    "{who} shows {nouns}",
    "look for {nouns}",
    "{kind} with {nouns}",
    "{who} is {kind} with {nouns}",
    "a drawing of {who} with {nouns}",
    "{who} is known by {nouns}",
    "{who} can be told by {nouns}",
    "{nouns} mark {who}",
)


def lesson(rng: random.Random) -> list[str]:
    """A short phrase for every value of every trait, in the order of ``VALUES``."""
    frame = rng.choice(["{who} with {nouns}", "{who} has {nouns}", "{nouns}", "look for {nouns}", "{nouns} of {who}"])
    who = _who(rng)
    return [frame.format(who=who, nouns=word(name, value, rng)) for name, values in VALUES.items() for value in values]


def _who(rng: random.Random) -> str:
    return rng.choice([f"the {invented_name(rng)}", f"a {invented_name(rng)}", "this bird", "a bird", "the bird"])


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# --- the pool ---------------------------------------------------------------------------------------------------------


def unknown_bird(rng: np.random.Generator) -> Traits:
    """A random bird that is no species of the demo."""
    while True:
        bird = random_traits(rng)
        if bird not in SPECIES_TRAITS:
            return bird


@dataclass(frozen=True)
class Pool:
    """Birds, their drawings, and the part seen at each pixel."""

    birds: list[Traits]
    images: Pixels  # (n, P, P, 3)
    places: Pixels  # (n, P, P), 0 or 1 + the index in PARTS


def pool_chunk(seed: int, start: int, count: int) -> Pool:
    birds, drawn = [], []
    for number in range(start, start + count):
        rng = np.random.default_rng((seed, number))
        birds.append(unknown_bird(rng))
        drawn.append(draw(birds[-1], rng))
    return Pool(birds, np.stack([image for image, _ in drawn]), np.stack([place for _, place in drawn]))


def draw_pool(seed: int, count: int, chunk: int = 500) -> Pool:
    """``count`` birds and their drawings, the same for the same seed whatever the number of processes."""
    starts = range(0, count, chunk)
    sizes = [min(chunk, count - start) for start in starts]
    with ProcessPoolExecutor() as workers:
        parts = list(workers.map(pool_chunk, [seed] * len(sizes), starts, sizes))
    return Pool(
        [bird for part in parts for bird in part.birds],
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.places for part in parts]),
    )


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What decides the weights."""

    seed: int = 0
    pool: int = 40_000
    steps: int = 4_000
    words: int = 1_500  # steps that teach single words before captions come in
    batch: int = 128
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.02  # Muon's, of the transformers' matrices
    weight_decay: float = 0.05
    warm_up: int = 100


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # (B, 3, S, S) in [0, 1]
    shown: Tensor  # (B, traits, patches) in [0, 1], how much of a patch shows a part that bears the trait
    words: Tensor  # (V, L) tokens of a phrase for each of the V values of all traits
    values: Tensor  # (B, traits) int64, the value of each trait
    sentences: Tensor | None  # (B, L) tokens of a caption each


Tokenizer = Callable[[list[str]], Tensor]


def batches(plan: Plan, pool: Pool, tokenize: Tokenizer) -> Iterator[Batch]:
    """Drawings cut and mirrored, and what is said of them, made one batch ahead."""
    known = np.array([[values.index(getattr(bird, name)) for name, values in VALUES.items()] for bird in pool.birds])
    bears = torch.tensor([[float(name in SAID_OF[part]) for part in PARTS] for name in VALUES])  # (traits, parts)

    def make(step: int) -> Batch:
        rng = np.random.default_rng((plan.seed, 1 << 30, step))
        rows = rng.integers(0, len(pool.birds), plan.batch)
        share = np.sqrt(rng.uniform(0.5, 1, plan.batch))  # of the side
        middle = rng.uniform(-1, 1, (plan.batch, 2)) * (1 - share)[:, None]
        mirror = rng.choice([-1.0, 1.0], plan.batch)
        where = np.zeros((plan.batch, 2, 3), np.float32)
        where[:, 0, 0], where[:, 1, 1], where[:, :, 2] = share * mirror, share, middle
        grid = affine_grid(torch.from_numpy(where), [plan.batch, 3, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        drawings = torch.from_numpy(pool.images[rows]).permute(0, 3, 1, 2).float() / 255
        spoken = random.Random(f"{plan.seed} {step}")
        sentences = [caption(pool.birds[row], spoken) for row in rows] if step >= plan.words else []
        places = torch.from_numpy(pool.places[rows])[:, None].float()
        places = grid_sample(places, grid, mode="nearest", align_corners=False)[:, 0].long()
        seen = avg_pool2d(one_hot(places, len(PARTS) + 1).permute(0, 3, 1, 2)[:, 1:].float(), PATCH).flatten(2)
        return Batch(
            shown=(8 * bears @ seen).clamp(max=1),
            pixels=grid_sample(drawings, grid, align_corners=False),
            words=tokenize(lesson(spoken)),
            values=torch.from_numpy(known[rows]),
            sentences=tokenize(sentences) if sentences else None,
        )

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(make, 0)
        for step in range(plan.steps):
            ready = coming.result()
            coming = ahead.submit(make, step + 1)
            yield ready


def train(plan: Plan, pool: Pool, snapshot: Callable[[torch.nn.Module], None]) -> tuple[torch.nn.Module, Tokenizer]:
    import open_clip
    from open_clip.model import CLIP

    torch.manual_seed(plan.seed)
    model = CLIP(**MODEL)
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])  # type: ignore[index]
    model.visual.output_tokens = True
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=plan.matrix_learning_rate, weight_decay=plan.weight_decay),
        torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    began, heard = time.time(), []
    target = torch.arange(plan.batch)
    for step, batch in enumerate(batches(plan, pool, tokenizer)):
        pace = min(1, (step + 1) / plan.warm_up) * (1 + math.cos(math.pi * step / plan.steps)) / 2
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * pace
        scale = model.logit_scale.exp()
        pooled, patches = model.visual((batch.pixels - mean) / std)
        seen = normalize(pooled, dim=-1)
        local = normalize(patches @ model.visual.proj, dim=-1)
        words = normalize(model.encode_text(batch.words), dim=-1)
        widths = [len(values) for values in VALUES.values()]
        whole = torch.split(scale * seen @ words.T, widths, dim=1)
        parts = torch.split(scale * local @ words.T, widths, dim=2)
        loss = seen.new_zeros(())
        for number, values in enumerate(batch.values.T):
            shown = batch.shown[:, number]
            here = cross_entropy(parts[number].transpose(1, 2), values[:, None].expand_as(shown), reduction="none")
            loss = loss + cross_entropy(whole[number], values) + (here * shown).sum() / shown.sum().clamp(min=1)
        loss = loss / len(widths)
        if batch.sentences is not None:
            read = normalize(model.encode_text(batch.sentences), dim=-1)
            logits = scale * seen @ read.T
            loss = loss + (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        heard.append(loss.item())
        if (step + 1) % SNAPSHOT == 0:
            snapshot(model)
        if (step + 1) % EVERY == 0:
            rate = (step + 1) * plan.batch / (time.time() - began)
            print(
                f"step {step + 1}/{plan.steps} loss {np.mean(heard[-EVERY:]):.3f} scale {model.logit_scale.exp():.1f} "
                f"{rate:.0f} images/s",
                flush=True,
            )
    model.visual.output_tokens = False
    return model.eval(), tokenizer


# --- what it learned, and what is kept --------------------------------------------------------------------------------


@torch.no_grad()
def trait_accuracy(model: torch.nn.Module, tokenizer: Tokenizer, pool: Pool) -> dict[str, float]:
    """For each trait, how often the right one of its values is picked, on drawings that were held out."""
    pixels = torch.from_numpy(pool.images).permute(0, 3, 1, 2).float()
    pixels = interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    seen = normalize(model.encode_image((pixels - mean) / std), dim=-1)  # type: ignore[operator]
    found = {}
    for trait, values in VALUES.items():
        texts = [PROMPTS[trait](value) for value in values]
        read = normalize(model.encode_text(tokenizer(texts)), dim=-1)  # type: ignore[operator]
        best = (seen @ read.T).argmax(1)
        right = [values[index] == getattr(bird, trait) for index, bird in zip(best.tolist(), pool.birds, strict=True)]
        found[trait] = round(float(np.mean(right)), 3)
    return found


PROMPTS = {
    "silhouette": lambda value: f"{_a(value)} bird",
    "body": lambda value: f"the bird has {value} plumage",
    "wing": lambda value: f"the bird has {value} wings",
    "belly": lambda value: f"the bird has {_a(value)} belly",
    "cap": lambda value: f"the bird has {_a(value)} cap",
    "beak": lambda value: f"the bird has {_a(value)} beak",
    "beak_colour": lambda value: f"the bird has {_a(value)} beak",
    "crest": lambda value: f"the bird has {_a(SHAPED[value]) if SHAPED[value] else 'no'} crest",
    "wing_bars": lambda value: (
        f"the bird has {value if value != 'none' else 'no'} wing {'bar' if value == 'one' else 'bars'}"
    ),
    "eye_ring": lambda value: f"the bird has {_a(value) if value != 'none' else 'no'} eye ring",
    "tail": lambda value: f"the bird has {_a(value)} tail",
    "breast": lambda value: f"the bird has {_a(value)} breast",
    "legs": lambda value: f"the bird has {value} legs",
}


def save(model: torch.nn.Module, out: Path, record: dict[str, object]) -> None:
    """An open_clip local directory with half-precision weights, and the record of how it was made."""
    out.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    weights = out / "open_clip_model.safetensors"
    save_tensors({name: value.half() for name, value in model.state_dict().items()}, weights)
    record["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    known = vars(parser.parse_args())
    out = known.pop("out")
    plan = Plan(**known)
    began = time.time()
    pool = draw_pool(plan.seed, plan.pool)
    drawn = time.time()
    print(f"{plan.pool} drawings in {drawn - began:.0f} s", flush=True)
    model, tokenizer = train(plan, pool, lambda model: save(model, out, {"unfinished": True}))
    accuracy = trait_accuracy(model, tokenizer, draw_pool(plan.seed + 1, HELD_OUT))
    record: dict[str, object] = {
        "recipe": "recipes/demo_model.py",
        "plan": asdict(plan),
        "seconds": {"drawing": round(drawn - began), "training": round(time.time() - drawn)},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "trait_accuracy": accuracy,
        "trait_chance": {name: round(1 / len(values), 3) for name, values in VALUES.items()},
    }
    save(model, out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
