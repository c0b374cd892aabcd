"""Descriptions asked of a chat endpoint: against a real server on this machine that fails in every way it can."""

import gzip
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_server import Answer, Asked, ChatServer, Script, failing, saying, texts
from conftest import HANG
from finealign.backbone.load import load_backbone
from finealign.backbone.model import OpenClipBackbone
from finealign.errors import ConfigError, OutputError, PromptError, StoppedError
from finealign.runtime.progress import Progress
from finealign.texts.describe.alike import alike_pairs, mixed_up, shares_of, shares_with, siblings_of
from finealign.texts.describe.checks import (
    MAX_CHARACTERS,
    blanked,
    clean,
    count_words,
    fault,
    generic_form,
    has_control,
    is_duplicate,
    is_generic,
    judge,
    names_class,
    non_visual_cue,
)
from finealign.texts.describe.endpoint import (
    MAX_BYTES,
    Asking,
    EndpointError,
    Line,
    Pace,
    Secrets,
    bare_endpoint,
    find_texts,
)
from finealign.texts.describe.record import Described, record_path
from finealign.texts.describe.run import WITHOUT_DESCRIPTIONS, describe, from_templates
from finealign.texts.prompts import make_texts, read_descriptions

Tiny = Callable[[str], str]
KEY = "sk-test-0123456789abcdef"
BIRDS = ("robin", "wren", "reed warbler", "marsh warbler", "finch")
TWO = ("robin", "wren")
SOON = {"retry_after_ms": "10"}  # spares the tests the client's own pause
few = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Tiny) -> OpenClipBackbone:
    return load_backbone(tiny_backbone("transformer"))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "birds.json"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


def asking(server: ChatServer, **changes: Any) -> Asking:
    plain = Asking(model="parrot", endpoint=server.url, per_class=2, per_minute=10_000, at_once=1, attempts=3)
    return replace(plain, **changes)


def run(
    server: ChatServer,
    backbone: OpenClipBackbone,
    out: Path,
    classes: tuple[str, ...] = TWO,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> Described:
    return describe(
        classes,
        domain="bird species",
        out=out,
        backbone=backbone,
        asking=asking(server, **changes),
        overwrite=overwrite,
        progress=progress,
    )


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(record_path(out).read_text(encoding="utf-8"))
    return found


def at_first(server: ChatServer, *answers: Answer) -> Script:
    """These answers in turn, then good ones."""
    return lambda asked: answers[asked.number] if asked.number < len(answers) else server.good(asked)


# --- the checks of a text ---------------------------------------------------------------------------------------------


def test_clean__composes_and_collapses() -> None:
    assert clean("  A cafe\u0301\n\tbird ") == "A café bird"


@pytest.mark.parametrize("bad", ["\x00", "\x1b[31m", "\x7f", "\u202e", "\u2066", "\x9b"])
def test_has_control__in_a_text(bad: str) -> None:
    assert has_control(f"A robin {bad} with a red breast")
    assert fault(f"A robin {bad} with a red breast", "robin") == "holds a control character"


def test_has_control__joiners_and_any_script_are_none() -> None:
    assert not has_control("🐈‍⬛ گربه‌ی سیاه 三毛猫")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("a robin", 2),
        ("三毛猫は白い毛の猫です", 5),
        ("a robin 三毛猫", 3),
        ("A320 是一架白色的飞机", 5),
        ("นกกระจอกมีปีก", 6),
        ("a - b", 2),
    ],
)
def test_count_words__by_spaces_or_by_characters(text: str, words: int) -> None:
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A robin with a red breast", "robin"),
        ("Robins have red breasts", "robin"),
        ("ROBIN: red", "robin"),
        ("a reed-warbler in brown", "Reed Warbler"),
        ("a reed_warbler in brown", "reed warbler"),
        ("the robin's breast is red", "robin"),
        ("三毛猫は白い毛の猫です", "三毛猫"),
        ("A Boeing 737-800 with winglets", "737-800"),
        ("a {} of red", "{} of"),
        ("A c++ (plus) bird", "c++ (plus)"),
    ],
)
def test_names_class__whatever_case_and_spacing(text: str, name: str) -> None:
    assert names_class(text, name.replace("{} ", ""))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("an elegant bird", "ant"),
        ("a scattered flock", "cat"),
        ("a bird", "robin"),
        ("a Boeing 7370", "737"),
        ("a {} bird", "robin"),
        ("", "robin"),
    ],
)
def test_names_class__not_within_a_longer_word(text: str, name: str) -> None:
    assert not names_class(text, name)


@few
@given(st.text(max_size=40), st.sampled_from(["robin", "reed warbler", "三毛猫", "a.b*c", "ß", "İ"]))
def test_names_class__a_text_that_holds_the_name_as_a_word(text: str, name: str) -> None:
    assert names_class(f"{text} {name} {text}", name)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("A robin that sings from dawn", "sound"),
        ("Its shrill call is heard", "sound"),
        ("A rose with a sweet scent", "smell"),
        ("A cake that is delicious", "taste"),
        ("A robin that eats worms", "behaviour"),
        ("A robin that migrates by night", "behaviour"),
        ("A robin in its range", "range"),
        ("A bird native to Asia", "range"),
        ("An expensive car with a red hood", "price"),
        ("A car of the nineteenth century", "history"),
        ("A bird named after its finder", "name origin"),
    ],
)
def test_non_visual_cue__of_every_kind(text: str, kind: str) -> None:
    assert non_visual_cue(text) == kind
    assert not non_visual_cue("A robin with a rust-red breast and a short brown tail; colours range from grey to red")


def test_non_visual_cue__a_name_may_hold_such_a_word() -> None:
    text = "A song sparrow with a streaked breast, unlike the playful finch"
    assert non_visual_cue(text, ["finch"]) == "sound"
    assert non_visual_cue(text, ["song sparrow", "playful finch"]) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A red robin", "is shorter than 4 words"),
        ("A robin " + "very " * 100 + "red", f"is longer than {MAX_CHARACTERS} characters"),
        ("A bird with a red breast", "does not name the class"),
        ("A robin with a loud song", "tells of what cannot be seen (sound)"),
        ("A robin with a red breast", ""),
    ],
)
def test_fault__tells_the_reason(text: str, reason: str) -> None:
    assert fault(text, "robin") == reason


SEEN = [  # sentences that must pass, each with its class
    ("Bullock’s oriole", "A Bullock's oriole has an orange face with a black eye line."),
    ("Bullock's oriole", "A Bullock’s oriole has a large white wing patch."),
    ("black-throated blue warbler", "The black‑throated blue warbler has a small white square on the wing."),
    ("Chuck-will's-widow", "A Chuck–will’s–widow is mottled in brown and buff all over."),
    ("canary", "Canaries are bright yellow with short pink bills."),
    ("house finch", "House finches have streaked flanks and a red forehead."),
    ("robin", "A robin has a friendly round face and a red breast."),
    ("wren", "Wrens are small, and their range of browns runs from rust to grey."),
    ("goshawk", "The goshawk has an aggressive look from its heavy white brow."),
    ("cardinal", "The cardinal has a loud red all over and a black mask."),
    ("goldfinch", "A goldfinch shows the widespread yellow on its wing in flight."),
    ("house wren", "A house wren is plainer than a song sparrow, without streaks."),
    ("bluethroat", "The bluethroat has the blue throat that gives it its name."),
    ("Audi R8", "An Audi R8 has dark side blades behind the doors."),
    ("Jeep Wrangler", "The Jeep Wrangler has round headlights, and seven slots known as its grille."),
    ("Fiat 500", "A Fiat 500 has the friendly front with round lamps introduced in the new model."),
    ("BMW M3", "A BMW M3 has an aggressive bumper with large air intakes."),
    ("Boeing 737-800", "A Boeing 737‑800 has winglets and a pointed tail cone."),
    ("Porsche 911", "A Porsche 911 has a sloping roof and the name in a line across the tail."),
    ("Ford F-150", "The Ford F–150 has a wide grille with two bars."),
    ("peony", "Peonies have many ruffled petals in a ball."),
    ("tiger lily", "Tiger lilies have orange petals with dark spots, curled back."),
    ("water lily", "A water lily floats with wide pointed petals around a yellow heart."),
    ("lavender", "Lavender is an aromatic herb with spikes of small violet flowers."),
    ("pansy", "Pansies have a dark blotch like a face on flat petals."),
    ("foxglove", "A foxglove, also called digitalis, has bells along one tall stem."),
    ("black-eyed susan", "A black-eyed susan has yellow rays around a dark dome."),
    ("rose", "A rose has layered petals like those found in a cabbage."),
    ("honeycombed", "A honeycombed surface has six-sided cells, as found in hives."),
    ("cracked", "A cracked texture has thin dark lines found across the whole surface."),
    ("polka-dotted", "A polka dotted cloth has round dots in even rows."),
    ("swirly", "A swirly pattern has curves that wind into one another."),
    ("annual crop", "An annual crop field shows even rows in a rectangle of one green."),
    ("highway", "Highways are long grey bands with cars and lanes."),
    ("sea/lake", "A sea/lake seen from above is a smooth dark blue sheet."),
    ("industrial area", "An industrial area has large flat white roofs found in rows."),
    ("ice cream", "A scoop of ice cream in three flavours, pink, white and brown."),
    ("strawberry shortcake", "A strawberry shortcake is flavoured red with slices between white layers."),
    ("pho", "A bowl of pho with pale noodles and aromatic green herbs."),
    ("french fries", "French fries are thin golden sticks in a heap."),
    ("curry", "Curries are thick yellow sauces over white rice."),
    ("A320", "A320 是一架有弯翼尖的白色客机"),
    ("นกกระจอก", "นกกระจอกมีปีกสีน้ำตาลและท้องสีขาว"),
    ("三毛猫", "三毛猫は白い毛に黒と茶の模様があります"),
]
UNSEEN = [
    ("robin", "A robin with a sweet song at dawn."),
    ("wren", "A wren gives a harsh call from the hedge."),
    ("rose", "A rose with a strong scent and red petals."),
    ("curry", "A curry that tastes of ginger, yellow in colour."),
    ("swallow", "A swallow migrates south with a forked tail."),
    ("kiwi", "A kiwi is native to New Zealand and brown."),
    ("wren", "Wrens are brown, and their range extends to the coast."),
    ("Audi R8", "An Audi R8 has a high price and low doors."),
    ("Fiat 500", "A Fiat 500 is cheap and has round lamps."),
    ("dahlia", "A dahlia was named after a botanist and has many petals."),
    ("jay", "A jay nests in tall trees and is blue."),
    ("Ford F-150", "A Ford F-150 was first built long ago, with a square hood."),
]


@pytest.mark.parametrize(("name", "text"), SEEN)
def test_fault__a_sentence_that_tells_of_what_is_seen_passes(name: str, text: str) -> None:
    assert fault(clean(text), name, others=["song sparrow"]) == ""


@pytest.mark.parametrize(("name", "text"), UNSEEN)
def test_fault__a_sentence_that_tells_of_what_is_not_seen(name: str, text: str) -> None:
    assert fault(text, name, others=["song sparrow"]).startswith("tells of what cannot be seen")


def test_describe__a_word_of_any_class_name_is_no_cue(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    said = "A robin with plainer flanks than a song sparrow."
    server.script = at_first(server, texts(said, GOOD))
    run(server, backbone, out, ("robin", "wren", "song sparrow"), siblings=0)
    assert record_of(out)["entries"]["robin"]["first"]["texts"] == [said, GOOD]


def test_is_duplicate__but_for_case_and_the_full_stop() -> None:
    assert is_duplicate("A ROBIN with a red breast", ["A robin with a red breast."])
    assert not is_duplicate("A robin with a rusty breast", ["A robin with a red breast."])


def test_is_generic__another_class_has_it_but_for_the_name_and_its_article() -> None:
    owners = {generic_form("An owl has two wings.", "owl"): "owl"}
    assert is_generic("A robin has two wings", "robin", owners)
    assert not is_generic("An owl has two wings.", "owl", owners)
    assert not is_generic("A robin has two red wings", "robin", owners)
    assert blanked("The owls of an owl", "owl") == "{} of {}"


def test_judge__takes_as_many_as_wanted_and_tells_why_it_rejects() -> None:
    given = ["short", "A robin with a red breast.", "a robin with a red breast", "A robin of far too many words", "x"]
    given += ["A robin has wings.", "A robin with a brown back.", "A robin with thin legs."]
    accepted, rejected = judge(
        given,
        "robin",
        others=[],
        kept=[],
        wanted=2,
        owners={generic_form("A wren has wings.", "wren"): "wren"},
        beyond_window=lambda sentences: ["far too many" in one for one in sentences],
    )
    assert accepted == ["A robin with a red breast.", "A robin with a brown back."]
    assert [reason for _, reason in rejected] == [
        "is shorter than 4 words",
        "is a duplicate",
        "is longer than the encoder reads",
        "is shorter than 4 words",
        "would fit another class as well",
    ]


def test_judge__looks_at_four_times_as_many_as_wanted_and_no_more() -> None:
    looked: list[str] = []

    def beyond(sentences: Any) -> list[bool]:
        looked.extend(sentences)
        return [True]

    many = [f"A robin with {number} red feathers" for number in range(1000)]
    accepted, rejected = judge(many, "robin", others=[], kept=[], wanted=3, owners={}, beyond_window=beyond)
    assert (accepted, len(rejected), len(looked)) == ([], 12, 12)


# --- the parts of a request -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '{"descriptions": ["a", "b"]}',
        'Sure!\n```json\n{"descriptions": ["a", "b"]}\n```\nAnything else?',
        '<think>{"class": {}}</think> {"descriptions": ["a", "b"]}',
        '{"why": {"x": [1]}, "descriptions": ["a", "b"]}',
        '{"descriptions": ["a", "b"]}\nI hope that {this} helps }',
        '<think>{"descriptions": ["x"]}</think>{"descriptions": ["a", "b"]} {"descriptions": ["y"]}',
    ],
)
def test_find_texts__with_whatever_stands_around(content: str) -> None:
    assert find_texts(content) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no",
        "{",
        "}{",
        "[]",
        '["a"]',
        '{"descriptions": "a"}',
        '{"descriptions": [1]}',
        '{"descriptions": [["a"]]}',
        '{"descriptions": null}',
        '{"texts": ["a"]}',
        '{"descriptions": ["a"',
        '{"descriptions": ["\\ud800"]}',
        '{"a":' * 5000,
    ],
)
def test_find_texts__of_another_shape(content: str) -> None:
    assert find_texts(content) is None


@few
@given(st.text(max_size=200))
def test_find_texts__any_text_is_survived(content: str) -> None:
    assert find_texts(content) is None or '"descriptions"' in content.replace("\\u", "")


def test_bare_endpoint__loses_what_is_secret() -> None:
    assert bare_endpoint("https://me:pass@host:8443/v1/?key=abc#x") == "https://host:8443/v1"
    assert bare_endpoint("http://[::1]:11434/v1") == "http://[::1]:11434/v1"


def test_secrets__are_scrubbed_in_every_form() -> None:
    secrets = Secrets(KEY, "https://me:pass%40word@host/v1?token=query-token&v=1")
    said = f"{KEY} pass%40word pass@word query-token bWU6cGFzc0B3b3Jk v=1"
    assert secrets.scrub(said) == "[secret] [secret] [secret] [secret] [secret] v=1"


def test_secrets__a_word_that_local_servers_take_is_left() -> None:
    assert Secrets("EMPTY").scrub("EMPTY") == "EMPTY"
    assert Secrets("ollama").scrub("an ollama server") == "an ollama server"


@pytest.mark.parametrize(
    "said",
    [
        "hf_user+token/1",
        "hf_user%2Btoken%2F1",
        "aGZfdXNlcit0b2tlbi8xOg==",
        "query token/2",
        "query%20token%2F2",
        "query+token/2",
        "query+token%2F2",
    ],
)
def test_secrets__a_user_without_password_and_a_query_in_every_form(said: str) -> None:
    secrets = Secrets("", "http://hf_user%2Btoken%2F1@host/v1?token=query+token/2")
    assert secrets.scrub(f"<{said}>") == "<[secret]>"


def test_pace__holds_any_minute_to_the_bound() -> None:
    now, begun = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    pace = Pace(3, clock=lambda: now[0], sleep=sleep)
    for _ in range(8):
        pace.wait()
        begun.append(now[0])
        now[0] += 5
    assert begun == [0, 5, 10, 60, 65, 70, 120, 125]
    assert all(late - early >= 60 for early, late in zip(begun, begun[3:], strict=False))


def test_pace__holds_several_threads_to_it() -> None:
    slept: list[float] = []
    pace = Pace(2, clock=lambda: 0.0, sleep=slept.append)
    threads = [threading.Thread(target=pace.wait) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == [60, 60, 120, 120]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": " "},
        {"model": "a\nb"},
        {"per_class": 0},
        {"per_class": 51},
        {"siblings": -1},
        {"per_minute": 0},
        {"at_once": 0},
        {"attempts": 0},
        {"max_tokens": 0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
    ],
)
def test_asking__out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Wanted"):
        replace(Asking(model="parrot"), **changes)


# --- proxies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTPS_PROXY"])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "foo://127.0.0.1:9"])
def test_line__a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, proxy: str) -> None:
    monkeypatch.setenv(name, proxy)
    with pytest.raises(ConfigError, match=name):
        Line(Asking(model="parrot", endpoint="https://host.invalid/v1"))


def test_line__no_proxy_sees_what_stays_on_this_machine(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChatServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        run(server, backbone, out)
    assert server.asked and not proxy.asked


# --- what the encoder makes of the classes ----------------------------------------------------------------------------


def test_siblings_of__are_the_nearest_names(backbone: OpenClipBackbone) -> None:
    found = siblings_of(BIRDS, backbone, count=2)
    names = backbone.encode_texts(make_texts(BIRDS)).names
    for place, name in enumerate(BIRDS):
        cosines = {other: float(names[place] @ names[at]) for at, other in enumerate(BIRDS) if other != name}
        assert found[name] == tuple(sorted(cosines, key=lambda other: -cosines[other])[:2])


def test_siblings_of__no_more_than_there_are_others(backbone: OpenClipBackbone) -> None:
    assert siblings_of(TWO, backbone, count=3) == {"robin": ("wren",), "wren": ("robin",)}
    assert siblings_of(TWO, backbone, count=0) == {"robin": (), "wren": ()}


def unit(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_mixed_up__classes_apart() -> None:
    found = mixed_up(unit(0, 10, 80, 90), torch.tensor([0, 0, 1, 1]), 2)
    assert found.tolist() == [[0, 0], [0, 0]]


def test_mixed_up__knows_no_scale() -> None:
    far = mixed_up(unit(0, 40, 25, 27), torch.tensor([0, 0, 1, 1]), 2)
    near = mixed_up(unit(0, 4, 2.5, 2.7), torch.tensor([0, 0, 1, 1]), 2)
    assert far.tolist() == near.tolist() == [[0, 1], [0, 0]]


def test_mixed_up__leaves_the_text_itself_out() -> None:
    """Each text is nearest to a mean that holds itself; left out, twins in the other class are nearer."""
    found = mixed_up(unit(0, 60, 120, 1, 61, 121), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert found[0, 1] == pytest.approx(2 / 3)
    assert found[1, 0] == pytest.approx(2 / 3)


def test_mixed_up__the_only_text_of_a_class_is_its_own() -> None:
    found = mixed_up(unit(0, 1, 60), torch.tensor([0, 1, 1]), 2)
    assert found.tolist() == [[0, 0], [0.5, 0]]


def test_shares_with__one_set_changed_is_as_computed_anew() -> None:
    torch.manual_seed(0)
    sets = [torch.nn.functional.normalize(torch.randn(count, 3), dim=1) for count in (3, 1, 4, 2)]
    before = shares_of(sets)
    for place in range(4):
        changed = [*sets[:place], torch.nn.functional.normalize(torch.randn(3, 3), dim=1), *sets[place + 1 :]]
        assert torch.equal(shares_with(before, changed, place), shares_of(changed))


def test_alike_pairs__above_half_in_either_direction_the_worst_first() -> None:
    shares = torch.tensor([[0, 0.5, 0.6], [0.5, 0, 0.1], [0.0, 0.9, 0]])
    found = alike_pairs(shares, ["a", "b", "c"])
    assert [pair.classes for pair in found] == [("b", "c"), ("a", "c")]
    assert [pair.shares for pair in found] == [pytest.approx((0.1, 0.9)), pytest.approx((0.6, 0))]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_describe__what_it_writes_is_read_as_descriptions(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    found = run(server, backbone, out, BIRDS, at_once=3)
    made = make_texts(BIRDS, read_descriptions(out))
    assert list(read_descriptions(out)) == list(BIRDS)
    assert [len(group) for group in made.descriptions] == [2] * 5
    assert all(names_class(text, name) for name, group in zip(BIRDS, made.descriptions, strict=True) for text in group)
    assert found.as_json() == {
        "out": str(out),
        "record": str(out.with_name("birds.record.json")),
        "classes": BIRDS,
        "texts": 10,
        "requests": len(server.asked),
        "tokens": {"prompt": 20 * len(server.asked), "completion": 10 * len(server.asked)},
        "rejected": {},
        "alike_at_first": found.as_json()["alike_at_first"],
        "alike": found.as_json()["alike"],
        "warning": "",
    }
    assert json.loads(json.dumps(found.as_json()))


def test_describe__what_the_server_is_asked(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    run(server, backbone, out, BIRDS, siblings=2)
    near = siblings_of(BIRDS, backbone, count=2)
    assert server.names() == list(BIRDS)
    for asked in server.asked:
        assert asked.path == "/v1/chat/completions"
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        assert asked.body["model"] == "parrot"
        assert asked.body["max_tokens"] == 4096
        assert asked.body["response_format"]["json_schema"]["strict"] is True
        assert [message["role"] for message in asked.body["messages"]] == ["system", "user"]
        if not asked.again:
            assert "Domain: bird species" in asked.prompt
            assert all(f'"{other}"' in asked.prompt for other in near[asked.name])


def test_describe__the_record_tells_all_there_is_to_tell(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    server.script = at_first(server, texts("A robin that sings from dawn.", "A robin with a red breast."))
    run(server, backbone, out)
    found = record_of(out)
    assert found["version"] == 2 and found["finished"]
    assert found["date"].endswith("+00:00")
    assert found["answered"] == ["parrot-1-2026"]
    assert found["requests"] == len(server.asked)
    assert found["settings"] == {
        "source": "endpoint",
        "classes": list(TWO),
        "domain": "bird species",
        "templates": list(make_texts(TWO).templates),
        "per_class": 2,
        "siblings": 3,
        "model": "parrot",
        "endpoint": server.url,
        "backbone": backbone.identifier,
        "system": server.asked[0].body["messages"][0]["content"],
    }
    assert found["replaces"] == [hashlib.sha256(out.read_bytes()).hexdigest()]
    robin = found["entries"]["robin"]
    assert robin["siblings"] == ["wren"]
    assert robin["first"]["prompt"] == server.asked[0].prompt
    assert robin["first"]["rejected"] == [
        {"text": "A robin that sings from dawn.", "reason": "tells of what cannot be seen (sound)"}
    ]
    assert robin["first"]["texts"][0] == "A robin with a red breast." and len(robin["first"]["texts"]) == 2


def test_describe__the_order_of_classes_whatever_order_answers_come_in(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    last = threading.Event()

    def script(asked: Asked) -> Answer:
        if asked.name == "robin" and not asked.again:
            return replace(server.good(asked), held=last)
        if asked.name == "finch":
            last.set()
        return server.good(asked)

    server.script = script
    run(server, backbone, out, BIRDS, at_once=2)
    assert list(read_descriptions(out)) == list(BIRDS)


@pytest.mark.parametrize("at_once", [1, 3])
def test_describe__so_many_requests_at_once(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, at_once: int
) -> None:
    all_here = threading.Event()

    def script(asked: Asked) -> Answer:
        if asked.number == at_once - 1:
            all_here.set()
        return replace(server.good(asked), held=all_here, after=0.02)

    server.script = script
    run(server, backbone, out, tuple(f"bird {number}" for number in range(7)), at_once=at_once)
    assert server.most_at_once == at_once


def test_describe__several_classes_by_any_script(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    classes = ("三毛猫", "naïve café", 'a "quoted" {} name', "قط منزلي")

    def script(asked: Asked) -> Answer:
        name = next(name for name in classes if json.dumps(name, ensure_ascii=False) in asked.prompt)
        return texts(*(server.sentence(name) for _ in range(2)))

    server.script = script
    run(server, backbone, out, classes, siblings=0)
    assert list(make_texts(classes, read_descriptions(out)).classes) == list(classes)


def test_describe__the_bound_of_an_answer_and_a_key_between_spaces(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    run(server, backbone, out, max_tokens=9000)
    assert server.asked[0].body["max_tokens"] == 9000
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"


def test_describe__no_key_for_a_local_server(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    run(server, backbone, out)
    assert server.asked[0].headers["authorization"] == "Bearer none"


def test_describe__the_endpoint_from_the_environment(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    describe(
        TWO,
        domain="birds",
        out=out,
        backbone=backbone,
        asking=replace(asking(server), endpoint=None),
    )
    assert record_of(out)["settings"]["endpoint"] == server.url


def test_describe__no_key_for_the_usual_endpoint(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="Set OPENAI_API_KEY"):
        describe(TWO, domain="birds", out=out, backbone=backbone, asking=Asking(model="parrot"))
    assert not out.parent.joinpath("birds.record.json").exists()


@pytest.mark.parametrize("key", ["sk-\nabc", "sk-ä-secret"])
def test_describe__a_key_that_no_header_holds(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="no request can carry") as caught:
        run(server, backbone, out)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://h:99999/v1",
        "http://a\nb",
        "http://ex_.xn--a/v1",
        "http://exa mple:1/v1",
    ],
)
def test_describe__an_endpoint_that_is_no_address(backbone: OpenClipBackbone, out: Path, endpoint: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        describe(TWO, domain="birds", out=out, backbone=backbone, asking=Asking(model="parrot", endpoint=endpoint))


@pytest.mark.parametrize("domain", ["", "  ", "a\x00b", "x" * 201])
def test_describe__a_domain_that_is_no_phrase(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, domain: str
) -> None:
    with pytest.raises(ConfigError, match="no phrase"):
        describe(TWO, domain=domain, out=out, backbone=backbone, asking=asking(server))
    assert server.asked == []


def test_describe__one_class_is_nothing_to_tell_apart(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    with pytest.raises(PromptError, match="at least two"):
        run(server, backbone, out, ("robin",))


# --- faults of the server ---------------------------------------------------------------------------------------------

GOOD = "A robin with a red breast."
MENDED: dict[str, tuple[list[Answer], int]] = {  # answers to the first requests; how many are made for the class
    "429 with Retry-After": ([failing(429, "slow down", **SOON)], 2),
    "500": ([failing(500, **SOON)], 2),
    "503 twice": ([failing(503, **SOON), failing(503, **SOON)], 3),
    "408": ([failing(408, **SOON)], 2),
    "409": ([failing(409, **SOON)], 2),
    "no answer within the timeout": ([replace(texts(GOOD), after=10)], 2),
    "connection closed": ([replace(texts(GOOD), send="nothing")], 2),
    "connection lost in mid-answer": ([replace(texts(GOOD), send="half")], 2),
    "an answer that drips": ([replace(texts(GOOD), send="drip")], 2),
    "500 lost in mid-answer": ([replace(failing(500), send="half")], 2),
    "not JSON": ([saying("Here is what I think of robins.")], 2),
    "not a chat completion": ([Answer(b"<html>gateway</html>")], 2),
    "not UTF-8": ([Answer(b"\xff\xfe")], 2),
    "an error with status 200": ([Answer(b'{"error": {"message": "overloaded"}}')], 2),
    "wrong shape": ([saying('{"descriptions": {"robin": "red"}}')], 2),
    "cut short": ([saying('{"descriptions": ["A rob', finish="length")], 2),
    "no choices": ([Answer(b'{"choices": [], "model": "parrot"}')], 2),
    "no content": ([saying(None)], 2),
    "a huge answer": ([texts("A robin " + "very " * (MAX_BYTES // 4))], 2),
    "one that unpacks to a huge one": (
        [Answer(gzip.compress(b" " * 5_000_000), headers={"content-encoding": "gzip"})],
        2,
    ),
    "an error that unpacks to a huge one": (
        [Answer(gzip.compress(b" " * 5_000_000), 500, {"content-encoding": "gzip", "retry-after-ms": "10"})],
        2,
    ),
    "a huge error": ([failing(500, "x" * 1_000_000, **SOON)], 2),
    "no texts": ([texts()], 2),
    "too few good texts": ([texts(GOOD, "A robin that sings.")], 2),
    "does not name the class": ([texts("A small bird with a red breast.")], 2),
    "too short": ([texts("A robin.")], 2),
    "too long": ([texts("A robin " + "very " * 100 + "red.")], 2),
    "beyond the window": ([texts("A robin " + "a b c d " * 30 + "red.")], 2),
    "a control character": ([texts("A robin with a \x07 red breast.")], 2),
    "duplicates": ([texts(GOOD, GOOD.upper())], 2),
}


@pytest.mark.parametrize("what", MENDED)
def test_fault__that_passes_is_asked_again(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, what: str
) -> None:
    answers, requests = MENDED[what]
    server.script = at_first(server, *answers)
    waits = answers[0].after or answers[0].send == "drip"
    found = run(server, backbone, out, timeout=3.0 if waits else 60.0)
    assert server.names().count("robin") == requests
    assert server.names().count("wren") == 1
    assert found.requests == len(server.asked)
    assert len(read_descriptions(out)["robin"]) == 2
    assert all(one.form == "json_schema" for one in server.asked)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (saying("no"), "it is not a JSON object"),
        (saying("{}", finish="length"), "cut short"),
        (Answer(b'{"choices": []}'), "no choices"),
        (texts("A robin that sings."), "(sound)"),
        (texts("A bird with a red breast."), "does not name the class"),
        (texts(GOOD), "These are kept, do not repeat them:\n- A robin with a red breast.\nWrite 1 more."),
    ],
)
def test_fault__the_reasons_are_told(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, answer: Answer, told: str
) -> None:
    server.script = at_first(server, answer)
    run(server, backbone, out)
    assert told not in server.asked[0].prompt
    assert told in server.asked[1].prompt
    assert server.asked[1].prompt.startswith(server.asked[0].prompt)


def test_fault__retry_after_is_honoured(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="openai._base_client")
    server.script = at_first(server, failing(429, retry_after="0.25"))
    run(server, backbone, out)
    assert "Retrying request in 0.250000 seconds" in caplog.text


def test_fault__the_same_sentence_but_for_the_name(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    server.script = at_first(
        server,
        texts(GOOD, "A robin has two wings."),
        texts("A wren has two wings.", "A wren with a short tail."),
    )
    found = run(server, backbone, out)
    assert found.rejected == {"would fit another class as well": 1}
    assert "A robin has two wings." in read_descriptions(out)["robin"]
    assert "A wren has two wings." not in read_descriptions(out)["wren"]


@pytest.mark.parametrize("status", [400, 404, 422])
@pytest.mark.parametrize(("known", "form"), [({"json_object", "text"}, "json_object"), ({"text"}, "text")])
def test_fault__a_server_without_that_response_format(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, status: int, known: set[str], form: str
) -> None:
    def script(asked: Asked) -> Answer:
        if asked.form not in known:
            return failing(status, "response_format is not supported")
        body = json.dumps({"descriptions": [server.sentence(asked.name) for _ in range(asked.wanted)]})
        return saying(f"Certainly:\n```json\n{body}\n```")

    server.script = script
    run(server, backbone, out, BIRDS, attempts=1)
    forms = [asked.form for asked in server.asked]
    tried = ["json_schema", "json_object", "text"][: 3 - len(known) + 1]
    assert forms[: len(tried)] == tried
    assert set(forms[len(tried) :]) == {form}  # what worked is remembered
    assert "response_format" in server.asked[0].body


def test_fault__a_server_that_wants_max_completion_tokens(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    def script(asked: Asked) -> Answer:
        if "max_tokens" in asked.body:
            return failing(400, "Use 'max_completion_tokens' instead.", "unsupported_parameter")
        return server.good(asked)

    server.script = script
    run(server, backbone, out, attempts=1)
    first = [("max_completion_tokens" in asked.body, asked.form) for asked in server.asked]
    assert first[0] == (False, "json_schema")
    assert set(first[1:]) == {(True, "json_schema")}


REFUSALS = {
    "401": failing(401, f"Incorrect API key provided: {KEY}", "invalid_api_key"),
    "402": failing(402, "payment required"),
    "403": failing(403, "country not supported"),
    "404 of the model in words alone": failing(404, 'model "parrot" not found, try pulling it first'),
    "404 of the model": failing(404, "The model `parrot` does not exist", "model_not_found"),
    "the quota is used up": failing(429, "You exceeded your current quota", "insufficient_quota", **SOON),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_fault__a_refusal_for_good_ends_all_at_once(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.script = lambda asked: REFUSALS[what]
    with pytest.raises(EndpointError, match="does not serve 'parrot'") as caught:
        run(server, backbone, out, BIRDS)
    assert len(server.asked) == 1
    assert not out.exists()
    assert record_of(out)["requests"] == 1
    assert KEY not in str(caught.value) and KEY not in caplog.text


@pytest.mark.parametrize(("length", "send"), [(100_000_000, "all"), (2000, "drip")])
def test_fault__a_refusal_without_end_is_not_read_to_its_end(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, length: int, send: str
) -> None:
    answer = replace(failing(401, "x" * length), send=send)
    server.script = lambda asked: answer
    with pytest.raises(EndpointError, match="'parrot': 401: "):
        run(server, backbone, out, timeout=0.5 if send == "drip" else 60.0)
    assert len(server.asked) == 1
    assert server.sent < length / 2


def test_fault__a_wrong_path_is_a_refusal(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    server.script = lambda asked: failing(404, "no such page")
    with pytest.raises(EndpointError, match="404"):
        run(server, backbone, out, BIRDS)
    assert [asked.form for asked in server.asked] == ["json_schema", "json_object", "text"]


def test_fault__a_refusal_in_the_middle_keeps_what_is_done(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    server.script = lambda asked: server.good(asked) if asked.number < 2 else REFUSALS["401"]
    with pytest.raises(EndpointError, match=r"2 of 5 classes are in .*the same command"):
        run(server, backbone, out, BIRDS)
    server.script = server.good
    run(server, backbone, out, BIRDS)
    assert server.names() == ["robin", "wren", "reed warbler", "reed warbler", "marsh warbler", "finch"]


@pytest.mark.parametrize("answer", [failing(500, **SOON), replace(texts(GOOD), send="nothing")])
def test_fault__a_server_that_never_answers_ends_it_after_three_classes(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, answer: Answer
) -> None:
    server.script = lambda asked: answer
    with pytest.raises(EndpointError, match="no answer for 3 classes in a row"):
        run(server, backbone, out, BIRDS, attempts=2)
    assert server.names() == ["robin", "robin", "wren", "wren", "reed warbler", "reed warbler"]


def test_fault__no_server_at_all(backbone: OpenClipBackbone, out: Path) -> None:
    with ChatServer() as gone:
        pass
    with pytest.raises(EndpointError, match=r"Connection error.*refused"):
        run(gone, backbone, out, BIRDS, attempts=1)


def test_fault__a_pause_that_is_too_long_to_wait_for(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    server.script = lambda asked: failing(429, "tomorrow", retry_after="3600")
    with pytest.raises(EndpointError, match="tomorrow"):
        run(server, backbone, out, BIRDS)
    assert server.names() == ["robin", "wren", "reed warbler"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (saying("no"), "it is not a JSON object"),
        (saying("{}", finish="length"), "cut short"),
        (replace(texts(GOOD), send="half"), "broke in mid-answer"),
        (texts("A reed warbler that sings."), r"3 times a text tells of what cannot be seen \(sound\)"),
        (failing(500, "boom", **SOON), "500: boom"),
    ],
)
def test_fault__for_good_with_some_classes(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, answer: Answer, why: str
) -> None:
    server.script = lambda asked: answer if asked.name == "reed warbler" else server.good(asked)
    with pytest.raises(EndpointError, match=f"1 of 5 classes(?s:.*)'reed warbler': .*{why}(?s:.*)The same command"):
        run(server, backbone, out, BIRDS)
    assert server.names().count("reed warbler") == 3  # attempts
    assert not out.exists()
    done = [name for name, entry in record_of(out)["entries"].items() if entry["first"]["done"]]
    assert done == [name for name in BIRDS if name != "reed warbler"]
    before = len(server.names())
    server.script = server.good
    run(server, backbone, out, BIRDS)
    assert server.names()[before:] == ["reed warbler"]
    assert list(read_descriptions(out)) == list(BIRDS)


def test_fault__a_prompt_that_is_refused_is_not_sent_again(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    server.script = lambda asked: failing(400, "content filter") if asked.name == "wren" else server.good(asked)
    with pytest.raises(EndpointError, match="'wren': 400: content filter"):
        run(server, backbone, out, BIRDS)
    assert server.names().count("wren") == 1


def test_fault__half_of_the_texts_are_enough_in_the_end(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    server.script = lambda asked: texts(GOOD) if asked.name == "robin" else server.good(asked)
    run(server, backbone, out, per_class=2)
    assert read_descriptions(out)["robin"] == [GOOD]
    assert server.names().count("robin") == 3


def test_fault__requests_for_a_class_are_bounded_whatever_happens(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    bad = [failing(500, **SOON), saying("no"), failing(429, **SOON), texts("A robin."), replace(texts(), send="half")]
    server.script = lambda asked: bad[asked.number % 5] if asked.name == "robin" else server.good(asked)
    with pytest.raises(EndpointError, match="'robin'"):
        run(server, backbone, out, attempts=4)
    assert server.names().count("robin") == 4


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets__the_key_is_in_no_file_no_message_and_no_log(
    server: ChatServer,
    backbone: OpenClipBackbone,
    out: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = [
        texts(f"A robin with {KEY} on its breast.", f"A robin with {KEY}", f"{KEY}"),
        replace(saying(KEY), body=saying(KEY).body.replace(b"parrot-1-2026", KEY.encode())),
        saying(json.dumps({"descriptions": [f"A robin with {KEY}"]}).replace("-", "\\u002d")),
        failing(500, f"Authorization: Bearer {KEY}", **SOON),
    ]
    server.script = lambda asked: answers[asked.number % 4]
    with pytest.raises(EndpointError) as caught:
        run(server, backbone, out, per_class=8, attempts=4)
    written = "".join(path.read_text(encoding="utf-8") for path in out.parent.rglob("*") if path.is_file())
    printed = capfd.readouterr()
    for where in (written, str(caught.value), repr(caught.value), caplog.text, printed.out, printed.err):
        assert KEY not in where
    assert "[secret]" in written


def test_secrets__those_of_an_address_are_used_and_not_recorded(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    server.script = lambda asked: failing(403, f"no: {asked.path} {asked.headers['authorization']}")
    address = server.url.replace("http://", "http://me:open-sesame@") + "?token=query-token"
    with pytest.raises(EndpointError) as caught:
        run(server, backbone, out, endpoint=address)
    assert server.asked[0].path == "/v1/chat/completions?token=query-token"
    assert record_of(out)["settings"]["endpoint"] == server.url
    for secret in (KEY, "open-sesame", "query-token", "bWU6b3Blbi1zZXNhbWU="):
        assert secret not in str(caught.value) + record_path(out).read_text(encoding="utf-8")


# --- classes that the encoder mixes up --------------------------------------------------------------------------------


OWN = dict(
    zip(BIRDS, ["red ruby rose", "blue navy teal", "green lime olive", "grey ash slate", "gold tan sand"], strict=True)
)


def twins(asked: Asked) -> Answer:
    """Texts of two classes that differ by a comma, and of the others that do not; to tell apart, texts of their own."""
    seen = [
        "very bright red bill on a thin branch",
        "long grey tail over dark wet stones",
        "white belly against the sky",
    ]
    name, comma = asked.name, "," if asked.name == "reed warbler" else ""
    if asked.again or "warbler" not in name:
        return texts(*(f"{name} {name} {name} {name} {name} {colour} {name}" for colour in OWN[name].split()))
    return texts(*(f"A bird with a{comma} {one} as a {name} has." for one in seen))


def test_alike__are_asked_again_with_both_ones_texts_and_kept_if_better(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    server.script = twins
    found = run(server, backbone, out, BIRDS, per_class=3)
    pair = found.alike_at_first[0]
    assert set(pair.classes) == {"reed warbler", "marsh warbler"}
    assert max(pair.shares) > 0.5
    assert sorted(server.names(again=True)) == sorted({name for one in found.alike_at_first for name in one.classes})
    entries = record_of(out)["entries"]
    again = next(asked for asked in server.asked if asked.again and asked.name == "reed warbler")
    for name in ("reed warbler", "marsh warbler"):
        assert all(text in again.prompt for text in entries[name]["first"]["texts"])
    assert "visibly differs" in " ".join(again.prompt.split())
    assert found.alike == ()
    kept = [name for name in BIRDS if entries[name]["again_kept"]]
    assert kept
    for name in BIRDS:
        used = "again" if name in kept else "first"
        assert read_descriptions(out)[name] == entries[name][used]["texts"]


def test_alike__what_is_no_better_is_not_kept_and_what_remains_is_told(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    def script(asked: Asked) -> Answer:
        if not asked.again:
            return twins(asked)
        comma = ";" if asked.name == "reed warbler" else ":"
        seen = [
            "very bright red bill on a thin branch",
            "long grey tail over dark wet stones",
            "white belly in the sky",
        ]
        return texts(*(f"A bird with a{comma} {one} as a {asked.name} has." for one in seen))

    server.script = script
    found = run(server, backbone, out, ("reed warbler", "marsh warbler"), per_class=3)
    assert found.alike
    assert found.as_json()["alike"][0]["classes"] == ("reed warbler", "marsh warbler")
    assert record_of(out)["alike"][0]["classes"] == ["reed warbler", "marsh warbler"]
    final = [backbone.encode_sentences(group) for group in read_descriptions(out).values()]
    shares = mixed_up(torch.cat(final), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert found.alike[0].shares == pytest.approx((float(shares[0, 1]), float(shares[1, 0])))


def test_alike__a_second_round_that_fails_leaves_the_first(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    server.script = lambda asked: saying("no") if asked.again else twins(asked)
    found = run(server, backbone, out, ("reed warbler", "marsh warbler"), per_class=3)
    assert found.alike == found.alike_at_first != ()
    assert server.names(again=True) == ["reed warbler"] * 3 + ["marsh warbler"] * 3
    entries = record_of(out)["entries"]
    assert "not a JSON object" in entries["reed warbler"]["again"]["failed"]
    assert read_descriptions(out)["reed warbler"] == entries["reed warbler"]["first"]["texts"]


def test_alike__the_second_round_is_gone_on_with(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    def script(asked: Asked) -> Answer:
        return REFUSALS["401"] if asked.again and asked.name == "marsh warbler" else twins(asked)

    classes = ("reed warbler", "marsh warbler")
    server.script = script
    with pytest.raises(EndpointError):
        run(server, backbone, out, classes, per_class=3)
    assert not out.exists()
    server.script = twins
    run(server, backbone, out, classes, per_class=3)
    assert server.names() == list(classes)
    assert server.names(again=True) == ["reed warbler", "marsh warbler", "marsh warbler"]


# --- going on, and what is there already ------------------------------------------------------------------------------


def test_resume__a_finished_run_asks_nothing(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    first = run(server, backbone, out, BIRDS)
    before, written = len(server.asked), out.read_bytes()
    assert run(server, backbone, out, BIRDS) == first
    out.unlink()
    assert run(server, backbone, out, BIRDS) == first
    assert (len(server.asked), out.read_bytes()) == (before, written)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "owl"}, "model"),
        ({"per_class": 3}, "per_class"),
        ({"siblings": 1}, "siblings"),
    ],
)
def test_resume__other_settings_are_refused(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, changes: dict[str, Any], named: str
) -> None:
    run(server, backbone, out)
    before, asked = record_path(out).read_bytes(), len(server.asked)
    with pytest.raises(OutputError, match=rf"other settings: {named} \([^;]*\)\. "):
        run(server, backbone, out, **changes)
    assert (record_path(out).read_bytes(), len(server.asked)) == (before, asked)
    run(server, backbone, out, overwrite=True, **changes)
    assert record_of(out)["settings"] != json.loads(before)["settings"]


def test_resume__other_classes_are_refused(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    run(server, backbone, out)
    with pytest.raises(OutputError, match="other settings: classes"):
        run(server, backbone, out, BIRDS)


def test_resume__how_fast_to_ask_may_change(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    run(server, backbone, out)
    before = len(server.asked)
    run(server, backbone, out, at_once=4, per_minute=1, timeout=5.0, attempts=9)
    assert len(server.asked) == before


def test_resume__an_output_without_a_record_is_refused(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="without a record"):
        run(server, backbone, out)
    assert (out.read_text(encoding="utf-8"), server.asked) == ("mine", [])
    run(server, backbone, out, overwrite=True)
    assert list(read_descriptions(out)) == list(TWO)


def unfinished(server: ChatServer, backbone: OpenClipBackbone, out: Path, **changes: Any) -> None:
    server.script = lambda asked: REFUSALS["401"]
    with pytest.raises(EndpointError):
        run(server, backbone, out, **changes)
    server.script = server.good


def test_resume__an_unfinished_record_gives_no_leave_to_replace_a_file(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    unfinished(server, backbone, out)
    out.write_text("mine", encoding="utf-8")
    before = len(server.asked)
    with pytest.raises(OutputError, match="did not write it"):
        run(server, backbone, out)
    assert (out.read_text(encoding="utf-8"), len(server.asked)) == ("mine", before)


def test_resume__what_overwrite_named_may_be_replaced_and_nothing_else(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    out.write_text("old", encoding="utf-8")
    unfinished(server, backbone, out, overwrite=True)
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="did not write it"):
        run(server, backbone, out)
    out.write_text("old", encoding="utf-8")
    run(server, backbone, out)
    assert list(read_descriptions(out)) == list(TWO)


def test_resume__a_file_that_comes_during_the_run_is_left(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    def script(asked: Asked) -> Answer:
        out.write_text("mine", encoding="utf-8")
        return server.good(asked)

    server.script = script
    with pytest.raises(OutputError, match="did not write it"):
        run(server, backbone, out)
    assert out.read_text(encoding="utf-8") == "mine"


def test_resume__a_record_of_another_version_or_prompt_is_told(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    run(server, backbone, out)
    path = record_path(out)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("You write", "Please write"), encoding="utf-8")
    with pytest.raises(OutputError, match="system \\(the prompt of another release"):
        run(server, backbone, out)
    path.write_text('{"version": 1, "colour": "red"}', encoding="utf-8")
    with pytest.raises(OutputError, match=r"version 1\. Wanted: version 2"):
        run(server, backbone, out)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: text[: len(text) // 2],
        lambda text: "[1]",
        lambda text: text.replace('"version": 2', '"version": 1'),
        lambda text: text.replace('"entries"', '"others"'),
        lambda text: text.replace('"robin": {', '"raven": {'),
    ],
)
def test_resume__a_record_that_is_none(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, change: Callable[[str], str]
) -> None:
    run(server, backbone, out)
    path = record_path(out)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    before, asked = path.read_bytes(), len(server.asked)
    with pytest.raises(OutputError, match=r"birds\.record\.json is"):
        run(server, backbone, out)
    assert (path.read_bytes(), len(server.asked)) == (before, asked)


@pytest.mark.parametrize("name", ["birds", "birds.csv"])
def test_resume__an_output_of_another_kind(
    server: ChatServer, backbone: OpenClipBackbone, tmp_path: Path, name: str
) -> None:
    with pytest.raises(OutputError, match=r"ends in \.json"):
        run(server, backbone, tmp_path / name)


def test_resume__an_output_that_is_a_folder(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    out.mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        run(server, backbone, out, overwrite=True)


def test_resume__a_place_that_cannot_be_written_is_found_before_anything_is_asked(
    server: ChatServer, backbone: OpenClipBackbone, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        run(server, backbone, tmp_path / "file" / "birds.json")
    assert server.asked == []


class Stopping(Progress):
    """Asked to stop once so many classes are recorded."""

    def __init__(self, out: Path, after: int) -> None:
        self.out, self.after = out, after

    @property
    def asked_to_stop(self) -> bool:
        return len(done(self.out)) >= self.after


def done(out: Path) -> list[str]:
    if not record_path(out).exists():
        return []
    return [name for name, entry in record_of(out)["entries"].items() if entry["first"]["done"]]


@pytest.mark.parametrize("at_once", [1, 3])
def test_stop__leaves_a_whole_record_that_is_gone_on_with(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, at_once: int
) -> None:
    with pytest.raises(StoppedError):
        run(server, backbone, out, BIRDS, progress=Stopping(out, 2), at_once=at_once)
    recorded = done(out)
    assert 2 <= len(recorded) < 2 + at_once
    assert sorted(recorded) == sorted(server.names())  # what was on its way is kept
    assert record_of(out)["requests"] == len(server.asked)
    assert not out.exists()
    run(server, backbone, out, BIRDS, at_once=at_once)
    assert sorted(server.names()) == sorted(BIRDS)


def test_stop__no_retry_goes_out_after_it(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    record_exists = threading.Event()

    class Now(Progress):
        @property
        def asked_to_stop(self) -> bool:
            return record_exists.is_set()

    def script(asked: Asked) -> Answer:
        record_exists.set()
        return failing(500, retry_after="3")

    server.script = script
    with pytest.raises(StoppedError):
        run(server, backbone, out, progress=Now())
    assert len(server.asked) == 1


def test_stop__a_silent_server_holds_nothing_up(
    server: ChatServer, backbone: OpenClipBackbone, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers only once the run has ended."""
    monkeypatch.setattr("finealign.texts.describe.run.LEAVE", 0.2)
    ended, here = threading.Event(), threading.Event()

    class Now(Progress):
        @property
        def asked_to_stop(self) -> bool:
            return here.is_set()

    def script(asked: Asked) -> Answer:
        here.set()
        return replace(server.good(asked), held=ended)

    server.script = script
    with pytest.raises(StoppedError):
        run(server, backbone, out, progress=Now())
    assert not ended.is_set() and record_of(out)["requests"] == 0
    ended.set()


def test_stop__does_not_wait_for_the_next_minute(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    with pytest.raises(StoppedError):
        run(server, backbone, out, BIRDS, progress=Stopping(out, 1), per_minute=1, at_once=3)
    assert len(server.asked) == len(done(out)) == record_of(out)["requests"] == 1


# A suite that a shell runs in the background ignores Ctrl-C, and so would what it starts.
PROGRAM = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from finealign.backbone import load_backbone
from finealign.texts.describe.endpoint import Asking
from finealign.texts.describe.run import describe
assert "openai" not in sys.modules  # it is heavy, and not everybody has it
backbone, endpoint, out, *classes = sys.argv[1:]
asking = Asking(model="parrot", endpoint=endpoint, per_class=2, per_minute=10_000, at_once=2, attempts=3)
describe(classes, domain="bird species", out=Path(out), backbone=load_backbone(backbone), asking=asking)
"""


def test_kill__in_the_middle_and_no_class_that_was_recorded_is_asked_again(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    classes = tuple(f"bird {number}" for number in range(12))
    never = threading.Event()

    def script(asked: Asked) -> Answer:
        return server.good(asked) if asked.number < 5 else replace(server.good(asked), held=never)

    server.script = script
    words = [sys.executable, "-c", PROGRAM, backbone.identifier, server.url, str(out), *classes]
    with subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and len(done(out)) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    never.set()
    recorded, before = done(out), len(server.names())
    assert process.returncode == -signal.SIGKILL
    assert len(recorded) == 5 and not out.exists()
    server.script = server.good
    run(server, backbone, out, classes, at_once=2)
    asked = server.names()[before:]
    assert sorted(asked) == sorted(set(classes) - set(recorded))
    assert list(read_descriptions(out)) == list(classes)


def test_interrupt__ends_a_run_against_a_silent_server_at_once(
    server: ChatServer, backbone: OpenClipBackbone, out: Path
) -> None:
    """The server holds its answers until the process has ended."""
    ended, here = threading.Event(), threading.Event()

    def script(asked: Asked) -> Answer:
        here.set()
        return replace(server.good(asked), held=ended)

    server.script = script
    words = [sys.executable, "-c", PROGRAM, backbone.identifier, server.url, str(out), *TWO]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert here.wait(HANG)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=HANG)
    ended.set()
    assert told.rstrip().endswith("KeyboardInterrupt") and process.returncode == -signal.SIGINT
    assert done(out) == [] and record_path(out).exists()


# --- without an endpoint ----------------------------------------------------------------------------------------------


def test_from_templates__writes_the_same_two_files(out: Path) -> None:
    found = from_templates(TWO, domain="birds", out=out)
    assert found.warning == WITHOUT_DESCRIPTIONS and found.as_json()["warning"]
    assert make_texts(TWO, read_descriptions(out)).descriptions == make_texts(TWO).descriptions
    assert record_of(out)["settings"]["source"] == "templates"
    assert found.requests == 0
    assert from_templates(TWO, domain="birds", out=out) == found


def test_from_templates__own_templates(out: Path) -> None:
    from_templates(TWO, domain="birds", out=out, templates=["a drawing of a {}"])
    assert read_descriptions(out) == {"robin": ["a drawing of a robin"], "wren": ["a drawing of a wren"]}


def test_from_templates__replaces_nothing_unasked(server: ChatServer, backbone: OpenClipBackbone, out: Path) -> None:
    run(server, backbone, out)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="source"):
        from_templates(TWO, domain="bird species", out=out)
    assert out.read_bytes() == before
    from_templates(TWO, domain="bird species", out=out, overwrite=True)
    with pytest.raises(OutputError, match="source"):
        run(server, backbone, out)
