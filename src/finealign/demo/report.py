"""``report.md`` of a demo: its methods, settings and results."""

import shlex
from typing import Any

import yaml

from finealign.demo.result import ADAPTED, METHODS, PICTURE, START, SYNTHETIC, DemoResult, points
from finealign.demo.world import World


def write_up(result: DemoResult, world: World, settings: dict[str, Any]) -> str:
    """The text of ``report.md``. ``settings`` are those that differ from the defaults of `finealign adapt`."""
    rows = [
        f"| {row.method} | {METHODS[row.method]} | {row.top1.mean:.1%} | {row.top1.low:.1%} to {row.top1.high:.1%} "
        f"| {points(row.gain) if row.gain else '-'} | {row.seconds:.1f} | {row.images_per_second:.0f} |"
        for row in result.methods
    ]
    runs = [f"- `{row.run}`: {row.method}, {METHODS[row.method]}" for row in result.methods if row.run]
    adapted = shlex.quote(str(result.folder / ADAPTED))
    unlabelled, labelled = shlex.quote(str(world.unlabelled)), shlex.quote(str(world.truth))
    labels = shlex.quote(str(result.folder / "labels.csv"))
    return f"""# finealign demo

{len(world.classes)} species of birds, {result.unlabelled} images without a label to adapt to, {result.test} others to \
measure on. Seed {result.seed}, {result.seconds:.0f} seconds in all.

**{SYNTHETIC}** The backbone is a small one that ships with finealign and was never shown this style of drawing.

| method | what it is | top-1 | 95 % interval | against {START}, points | seconds | images/s |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Chance is {result.chance:.1%}. Points against {START} are paired, image by image, with their 95 % interval. Seconds are
for adapting and scoring the test images, images/s for the scoring alone; methods that learn nothing share one encoding
of the images, which counts for each of them. Each method is measured by its default score, those that train after their
last epoch. Intervals are bootstrapped over the test images of this one run; another seed moves the figures as well.

![accuracy by epoch, confusions, and labels that changed]({PICTURE})

Epoch 0 is each method's own score with nothing learned: the descriptions on the whole image for self-training, on the
crops for fair. The test images are scored after each epoch to draw the curves; their labels reach no method.

## Settings

Beside the defaults of `finealign adapt`. The published setting of wca is 60 crops:

```yaml
{yaml.safe_dump(settings, sort_keys=False).rstrip()}
```

All of them, resolved, are in `config.yaml` of each run folder:

{chr(10).join(runs)}

## Go on

```bash
finealign predict {adapted} {unlabelled} --out {labels}
finealign evaluate {adapted} {labelled}
```

The same with images of your own: `finealign adapt IMAGES --classes NAMES --descriptions SENTENCES.json`.
"""
