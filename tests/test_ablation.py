"""What benchmarks/ablation.py measures by: which worlds are meant, gains over the start, the table of them."""

from pathlib import Path
from typing import Any

import ablation
import pytest
import torch
from ablation import AXES, CHOOSING, Runs, fingerprint, gains, run, table, worlds_of
from features import Encoded, Settings
from frozen import WORLDS
from torch.nn.functional import normalize

from finealign.types import TextFeatures

SIZES = (3, 20, 4, 16)  # classes, images of each, crops, width


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    """Classes that lie apart, seen by texts that are a little off."""
    classes, each, crops, width = SIZES
    generator = torch.Generator().manual_seed(0)

    def near(centres: torch.Tensor, spread: float) -> torch.Tensor:
        return normalize(centres + spread * torch.randn(centres.shape, generator=generator), dim=-1)

    centres = torch.eye(classes, width)
    labels = torch.arange(classes).repeat_interleave(each)
    weak, test = near(centres[labels], 0.1), near(centres[labels], 0.1)
    texts = near(centres, 0.3)
    return Encoded(
        weak=weak,
        crops=near(weak[:, None].expand(-1, crops, -1), 0.05),
        strong=near(weak[None].expand(2, -1, -1), 0.05),
        test_weak=test,
        test_crops=near(test[:, None].expand(-1, crops, -1), 0.05),
        labels=labels,
        hidden=labels,
        texts=TextFeatures(texts, texts, torch.arange(classes)),
        logit_scale=20.0,
    )


def row(world: str, value: str, **top1: float) -> dict[str, Any]:
    return {"world": world, "value": value, "own": "las", "start": 50.0, "top1": top1}


@pytest.mark.parametrize("method", list(AXES["method"]))
def test_run__every_method_by_its_scores(encoded: Encoded, method: str) -> None:
    found = run(encoded, AXES["method"][method], 0)
    assert found["own"] in found["top1"]
    assert all(0 <= value <= 100 for value in (found["start"], *found["top1"].values()))


def test_run__the_own_score_is_the_one_that_the_settings_name(encoded: Encoded) -> None:
    default, by_global = run(encoded, {}, 0), run(encoded, {"prediction": {"score": "global"}}, 0)
    assert by_global["own"] == "global"
    assert by_global["top1"] == default["top1"]


def test_fingerprint__differs_where_a_setting_does_and_is_the_same_where_a_default_is_given(encoded: Encoded) -> None:
    default = fingerprint(encoded, {}, 0)
    assert fingerprint(encoded, {"views": {"crops": 8}}, 0) == default
    others: list[Settings] = [{"views": {"crops": 4}}, {"method": {"fairness_weight": 7.0}}, {"strong": "another crop"}]
    assert len({default, fingerprint(encoded, {}, 1), *(fingerprint(encoded, one, 0) for one in others)}) == 5


def test_runs__one_that_is_in_the_file_is_not_run_again(
    encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Runs(tmp_path / "runs.jsonl").result("demo", encoded, {}, 0)
    again = Runs(tmp_path / "runs.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(ablation, "run", lambda *_: pytest.fail("it was run again"))
        assert again.result("demo", encoded, {}, 0) == first
    other = again.result("demo", encoded, {"method": {"name": "cupl"}}, 0)
    assert other["top1"] != first["top1"]
    assert len((tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_gains__by_the_own_score_and_by_the_one_best_in_the_mean() -> None:
    rows = [row("demo", "a", las=52.0, fused=60.0, **{"global": 40.0}), row("demo", "a", las=54.0, fused=50.0)]
    rows[1]["top1"]["global"] = 66.0
    assert gains(rows) == (3.0, 5.0)


def test_table__worst_world_first_then_mean_gains_by_group() -> None:
    rows = [
        row("miniclip/eurosat", "a", las=60.0, fused=62.0),
        row("miniclip/food10", "a", las=50.0, fused=50.0),
        row("clip-b16/cifar100", "a", las=41.0, fused=53.0),
        row("demo", "a", las=80.0, fused=70.0),
    ]
    worlds = worlds_of("miniclip/eurosat,miniclip/food10,clip-b16/cifar100,demo")
    lines = table("method", rows, worlds, each=False).strip().splitlines()
    assert lines[0] == "| method | worst world | miniclip | clip-b16 | demo | choosing | untouched |"
    assert lines[2] == (
        "| a | clip-b16/cifar100 -9.0 | +5.0 / +6.0 | -9.0 / +3.0 | +30.0 / +30.0 | +10.3 / +15.0 | +0.0 / +0.0 |"
    )
    each = table("method", rows, worlds, each=True).strip().splitlines()
    assert each[0] == f"| method | worst world | {' | '.join(worlds)} |"


def test_worlds_of__groups_and_single_ones_each_once_in_order() -> None:
    assert worlds_of("demo,clip-b32,clip-b32/dtd") == [*WORLDS["clip-b32"], "demo"]
    assert len(worlds_of("all")) == 7 + 6 + 3 + 1
    assert set(worlds_of("choosing")) == set(CHOOSING)
    with pytest.raises(SystemExit, match="No world is called clip-b16/food10"):
        worlds_of("clip-b16/food10")
