"""The 24 species of the demo, eight genera of three sibling species, and descriptions as in a field guide.

Siblings share silhouette and plumage and differ in one or two small parts. The names are invented, so that a model can
know nothing about them.
"""

from dataclasses import fields, replace

from finealign.demo.birds import Traits

GENUS_SIZE = 3

_GENERA: tuple[tuple[Traits, dict[str, dict[str, str]]], ...] = (
    (
        Traits(
            silhouette="round", body="brown", wing="brown", belly="orange", cap="black", beak="short",
            beak_colour="black", crest="none", wing_bars="none", eye_ring="none", tail="short", breast="plain",
            legs="pink",
        ),
        {"tovenil": {}, "grumberet": {"beak": "hooked"}, "askaloon": {"eye_ring": "white"}},
    ),
    (
        Traits(
            silhouette="slender", body="green", wing="green", belly="yellow", cap="red", beak="short",
            beak_colour="grey", crest="none", wing_bars="none", eye_ring="none", tail="forked", breast="plain",
            legs="black",
        ),
        {"quilvane": {}, "dorrimet": {"tail": "long"}, "peshkari": {"wing_bars": "two"}},
    ),
    (
        Traits(
            silhouette="stilt-legged", body="white", wing="grey", belly="white", cap="black", beak="long",
            beak_colour="black", crest="none", wing_bars="none", eye_ring="none", tail="short", breast="plain",
            legs="red",
        ),
        {"halbrenna": {}, "owistrel": {"legs": "yellow"}, "maruvole": {"beak": "curved"}},
    ),
    (
        Traits(
            silhouette="swan-necked", body="black", wing="white", belly="black", cap="black", beak="broad",
            beak_colour="red", crest="none", wing_bars="none", eye_ring="none", tail="fanned", breast="plain",
            legs="black",
        ),
        {"zephando": {}, "cormalix": {"beak_colour": "yellow"}, "ibberoth": {"eye_ring": "yellow"}},
    ),
    (
        Traits(
            silhouette="upright", body="blue", wing="blue", belly="white", cap="blue", beak="hooked",
            beak_colour="grey", crest="pointed", wing_bars="none", eye_ring="none", tail="long", breast="plain",
            legs="black",
        ),
        {"festerlin": {}, "nuvaroy": {"crest": "curled"}, "trasque": {"breast": "banded"}},
    ),
    (
        Traits(
            silhouette="big-headed", body="violet", wing="pink", belly="pink", cap="violet", beak="long",
            beak_colour="orange", crest="none", wing_bars="one", eye_ring="white", tail="short", breast="plain",
            legs="orange",
        ),
        {"kellidram": {}, "sombulet": {"eye_ring": "red"}, "yarnafey": {"legs": "blue"}},
    ),
    (
        Traits(
            silhouette="boat-shaped", body="grey", wing="blue", belly="white", cap="green", beak="broad",
            beak_colour="yellow", crest="none", wing_bars="none", eye_ring="none", tail="short", breast="plain",
            legs="orange",
        ),
        {"lutterim": {}, "varnissole": {"wing_bars": "two"}, "ghespern": {"tail": "fanned"}},
    ),
    (
        Traits(
            silhouette="heavy-bodied", body="red", wing="black", belly="red", cap="red", beak="curved",
            beak_colour="black", crest="fan", wing_bars="none", eye_ring="none", tail="fanned", breast="plain",
            legs="black",
        ),
        {"brondelac": {}, "ellowhick": {"crest": "none"}, "jastrove": {"beak_colour": "yellow"}},
    ),
)  # fmt: skip

SPECIES: tuple[tuple[str, Traits], ...] = tuple(
    (name, replace(genus, **changes)) for genus, siblings in _GENERA for name, changes in siblings.items()
)


def telling_traits(index: int) -> tuple[str, ...]:
    """The names of the traits in which the species of a genus differ; ``index`` is that of any of them in SPECIES."""
    first = index - index % GENUS_SIZE
    siblings = [traits for _, traits in SPECIES[first : first + GENUS_SIZE]]
    return tuple(field.name for field in fields(Traits) if len({getattr(bird, field.name) for bird in siblings}) > 1)


def describe(index: int) -> tuple[str, ...]:
    """Eight sentences that describe the species at ``index`` in SPECIES.

    They cover its general look, its parts, and what distinguishes it from its siblings.
    """
    name, bird = SPECIES[index]
    # Traits of the same part can give the same phrase, which is kept once.
    telling = list(dict.fromkeys(_part(bird, trait) for trait in telling_traits(index)))
    return (
        f"The {name} is {_a(bird.silhouette)} {bird.body} bird with {_a(bird.belly)} belly.",
        f"Adult {name}: {bird.wing} wings, {_part(bird, 'breast')} and {_a(bird.cap)} crown.",
        f"The bill of the {name} is {bird.beak} and {bird.beak_colour}, its legs are {bird.legs}.",
        f"On the head the {name} has {_part(bird, 'crest')} and {_part(bird, 'eye_ring')}.",
        f"In flight the {name} shows {_part(bird, 'wing_bars')} and {_part(bird, 'tail')}.",
        f"Told from its relatives by {_listed(telling)}, the {name} is hard to mistake.",
        f"Birders know the {name} by {_listed(telling[::-1])}.",
        f"Field marks of the {name}: {_listed(telling)}; {_a(bird.body)} bird.",
    )


def _part(bird: Traits, trait: str) -> str:
    """A noun phrase for one trait."""
    value = getattr(bird, trait)
    if value == "none":
        return {"crest": "no crest", "wing_bars": "no wing bars", "eye_ring": "no eye ring"}[trait]
    return {
        "beak": f"{_a(bird.beak)} {bird.beak_colour} beak",
        "beak_colour": f"{_a(bird.beak_colour)} beak",
        "crest": f"{_a('fan-shaped' if value == 'fan' else value)} crest",
        "wing_bars": f"{value} wing {'bar' if value == 'one' else 'bars'}",
        "eye_ring": f"{_a(value)} eye ring",
        "tail": f"{_a(value)} tail",
        "breast": f"{_a(value)} breast",
        "legs": f"{value} legs",
    }[trait]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
