"""The backbones of which facts are kept: each is one of open_clip, agrees with it, and nothing is invented."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest

from finealign.backbone.load import list_backbones, load_backbone
from finealign.backbone.zoo import LICENCES, KnownBackbone, imagenet_source, known_backbones, word_on
from finealign.benchmark.zero_shot import KNOWN
from finealign.config import DEFAULT_BACKBONE
from test_cli import QUICK, command, only_json

DOCS = Path(__file__).parents[1] / "docs"
every = pytest.mark.parametrize("known", known_backbones().values(), ids=known_backbones())


def test_known__a_dozen_or_so_the_default_first() -> None:
    assert 12 <= len(known_backbones()) <= 20
    assert next(iter(known_backbones())) == DEFAULT_BACKBONE
    assert KNOWN.keys() <= known_backbones().keys()
    assert set(known_backbones()) <= set(list_backbones())


@every
def test_known__agrees_with_open_clip(known: KnownBackbone) -> None:
    architecture, _, tag = known.name.partition("/")
    weights = open_clip.get_pretrained_cfg(architecture, tag)
    assert known.repository == weights["hf_hub"].rstrip("/")
    assert known.input_size == open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
    if known.sha256 is not None:  # by which open_clip, too, checks what it fetches from OpenAI
        assert re.fullmatch(r"[0-9a-f]{64}", known.sha256)
        assert known.sha256 in weights["url"].split("/")
    assert (known.sha256 is not None) == ("openaipublic" in weights["url"])


@every
def test_known__has_a_licence_of_the_list_and_where_it_is_stated(known: KnownBackbone) -> None:
    assert known.licence in LICENCES
    assert known.licence_from.startswith(("https://github.com/", f"https://huggingface.co/{known.repository}"))
    assert known.revision is None or re.fullmatch(r"[0-9a-f]{40}", known.revision)
    assert 50 < known.imagenet < 90


@every
def test_known__is_verified_only_by_a_result_that_is_there(known: KnownBackbone) -> None:
    assert known.verified is None or (DOCS / "results" / f"{known.verified}.json").is_file()


@every
def test_docs__show_it(known: KnownBackbone) -> None:
    """The table of the how-to is that of the file."""
    revision = f"`{known.revision:.7}`" if known.revision else "not pinned"
    checksum = f"`{known.sha256:.8}`" if known.sha256 else "none"
    repository = f"[{known.repository}](https://huggingface.co/{known.repository})"
    licence = f"[{known.licence}]({known.licence_from})"
    facts = (known.input_size, licence, f"{known.imagenet:.2f}", repository, revision, checksum)
    page = (DOCS / "how-to" / "backbones.md").read_text(encoding="utf-8")
    cells = " | ".join(map(str, (f"`{known.name}`", *facts, known.verified or "nobody yet")))
    assert f"| {cells} |" in page
    assert imagenet_source() in page
    assert page.count("| nobody yet |") == sum(not one.verified for one in known_backbones().values())


# --- what the command shows of it -------------------------------------------------------------------------------------


def test_models__shows_the_known_first_and_the_rest_as_untested() -> None:
    lines = command("models").stdout.splitlines()
    known = list(known_backbones().values())
    for line, one in zip(lines, known, strict=False):
        assert line.split()[0] == one.name
        assert one.licence in line and f"{one.imagenet:.2f}" in line and f"{one.input_size} px" in line
        assert f"at {one.revision:.7}" in line if one.revision else "not pinned" in line
        assert "verified by nobody yet" in line
    rest = [line.split() for line in lines[len(known) :]]
    assert {name for name, _ in rest} == set(list_backbones()) - set(known_backbones())
    assert {mark for _, mark in rest} == {"untested"}


def test_models__as_json_has_every_fact() -> None:
    told = only_json(command("models", "openai", "--json"))["known"]
    assert [one["name"] for one in told] == [name for name in known_backbones() if "openai" in name]
    assert told[0] == known_backbones()[DEFAULT_BACKBONE].as_json()


@pytest.mark.parametrize(
    ("identifier", "said"),
    [
        (DEFAULT_BACKBONE, ""),
        ("ViT-B-32-quickgelu/laion400m_e32", "ViT-B-32-quickgelu/laion400m_e32 is untested here"),
        ("ViT-B-16-quickgelu/metaclip_400m", "licensed CC-BY-NC-4.0: not for commercial use."),
        ("ViT-B-16-quickgelu/dfn2b", "a licence of Apple's own"),
        ("ViT-B-32/random", ""),
        ("ViT-B-32/epoch_10.pt", ""),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", ""),
        ("local-dir:runs/birds/model", ""),
        ("no-such/pair", ""),
    ],
)
def test_word_on__says_what_is_to_be_known_and_nothing_else(identifier: str, said: str) -> None:
    assert said in word_on(identifier)
    assert bool(word_on(identifier)) == bool(said)


def test_adapt__says_once_that_a_pair_is_untested(
    tiny_backbone: Callable[[str], str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model stands in for weights that would have to be fetched."""

    def stand_in(identifier: str, **how: Any) -> Any:
        return load_backbone(tiny_backbone("transformer"), **how)

    monkeypatch.setattr("finealign.classifier.load_backbone", stand_in)
    monkeypatch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
    asked = ["adapt", str(photos), "--classes", "red,green,blue", *QUICK, "--out", str(tmp_path / "run"), "--dry-run"]
    untested = command(*asked, "--backbone", "ViT-B-32-quickgelu/laion400m_e32", "--json")
    assert only_json(untested)["images"] == 24
    assert untested.stderr.count("is untested here") == 1
    assert "untested" not in command(*asked, "--backbone", DEFAULT_BACKBONE).stderr
