"""What the encoder's learning adds on a few photos of each class, by its learning rate and by how far it may move them.

    python benchmarks/pace.py --out runs/pace --sets eurosat --images 200 --rates 2e-4,3e-2 --limits 1,off
    python benchmarks/pace.py --out runs/pace --backbone local-dir:CLIP-B16 --images 120 --set training.batch_size=16

Own top-1: on the images that are learned from, all classes evenly. `--rates` of 0 leave the encoder frozen. A run is a
line of OUT/pace.jsonl and is not done again. ``drift`` is how far images were moved at most, before
the encoder was held back, and ``kept`` the least share of what it had learned that was kept.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from folders import measured
from on_device import add_device
from real_data import require_shared

from finealign.classifier import FineAlign
from finealign.config import read_config
from finealign.images.listing import list_images
from finealign.texts.prompts import read_classes, read_descriptions


def run(folder: Path, images: int, backbone: str, device: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """Adapt to the first photos of each class and measure."""
    classes = read_classes(folder / "classes.txt")
    own = {
        photo: label
        for label, name in enumerate(classes)
        for photo in list_images(folder / "train" / name)[: images // len(classes)]
    }
    config = read_config(None, settings, backbone=backbone, device=device, seed=seed)
    model = FineAlign(classes, descriptions=read_descriptions(folder / "descriptions.json"), config=config)
    with TemporaryDirectory() as kept:
        model.fit(list(own), checkpoints=Path(kept))
        found = measured(model.predictions_of_adapted(), own)
    looked = [record for record in model.history_ if record.drift is not None]
    return {
        **{name: found[name] for name in ("images", "start", "adapted")},
        "drift": max((record.drift for record in looked if record.drift is not None), default=None),
        "kept": min((record.kept for record in looked), default=1.0),
    }


def main() -> None:
    shared = require_shared()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default="eurosat")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rates", default="2e-4")
    parser.add_argument("--limits", default="1", help="of training.drift_limit, or off")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--backbone", default=f"local-dir:{shared / 'models' / 'miniclip'}")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="section.key=value")
    add_device(parser)
    known = parser.parse_args()
    known.out.mkdir(parents=True, exist_ok=True)
    log = known.out / "pace.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    backbone = known.backbone.rpartition("/")[2]
    for seed in map(int, known.seeds.split(",")):
        for name in known.sets.split(","):
            for rate in known.rates.split(","):
                for limit in known.limits.split(",") if float(rate) else ["-"]:
                    pace = [f"training.learning_rate={rate}", f"training.drift_limit={limit}"]
                    settings = [*known.settings, *(pace if float(rate) else ["training.encoder=frozen"])]
                    key = {"backbone": backbone, "set": name, "wanted": known.images, "seed": seed, "rate": rate}
                    key |= {"limit": limit, "settings": known.settings}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    found = run(shared / "data" / name, known.images, known.backbone, known.device, seed, settings)
                    rows.append({**key, **found})
                    with log.open("a", encoding="utf-8") as opened:
                        opened.write(json.dumps(rows[-1]) + "\n")
    print("| backbone | set | images | seed | rate | limit | start | adapted | drift | kept |")
    print("|" + "---|" * 10)
    for row in rows:
        drift = "-" if row["drift"] is None else f"{row['drift']:.2f}"
        print(
            "| {backbone} | {set} | {images} | {seed} | {rate} | {limit} | {start:.1f} | {adapted:.1f} ".format(**row)
            + f"| {drift} | {row['kept']:g} |"
        )


if __name__ == "__main__":
    main()
