"""Pixels on disk: the same bit for bit, decoded once, within the bound, whole or not there."""

import errno
import gc
import json
import os
import pickle
import re
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finealign.errors import ImageInputError, display_path
from finealign.images import pixel_cache
from finealign.images.decoding import read_pixels
from finealign.images.files import ImageReadError
from finealign.images.pixel_cache import INDEX, PIXELS, StoredPixels, store_pixels
from finealign.runtime.cores import usable_cores
from finealign.types import SetAside

SIDE, MAX_PIXELS, PLENTY = 8, 10_000, 10**9
EACH = 3 * 8 * 8  # bytes of one image of 8 x 8
same_folder = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def photo(path: Path, height: int = 8, width: int = 8, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def photos(folder: Path, number: int = 4, seed: int = 0) -> list[Path]:
    return [photo(folder / f"{seed}-{i}.png", seed=seed * 1000 + i) for i in range(number)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "made" / "on the way"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def store(
    paths: list[Path],
    folder: Path | None,
    *,
    shorter_side: int = SIDE,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = PLENTY,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[StoredPixels, list[SetAside]]:
    return store_pixels(
        paths,
        shorter_side=shorter_side,
        max_pixels=max_pixels,
        folder=folder,
        max_bytes=max_bytes,
        on_progress=on_progress,
    )


def check(found: tuple[StoredPixels, list[SetAside]], paths: list[Path], *, cached: int | None = None) -> None:
    """What was found is what ``read_pixels`` makes of each path, bit for bit and in order."""
    stored, set_aside = found
    wanted: list[tuple[Path, Any]] = []
    wanted_aside: list[SetAside] = []
    for path in paths:
        try:
            wanted.append((path, read_pixels(path, shorter_side=SIDE, max_pixels=MAX_PIXELS)))
        except ImageReadError as error:
            wanted_aside.append(SetAside(display_path(path), str(error)))
    assert set_aside == wanted_aside
    assert stored.paths == [path for path, _ in wanted]
    assert len(stored) == len(wanted)
    assert stored.cached == (len(wanted) if cached is None else cached)
    for pixels, (_, image) in zip(stored, wanted, strict=True):
        assert type(pixels) is np.ndarray
        assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous
        assert np.array_equal(pixels, image)


def entries(folder: Path) -> list[Path]:
    """The folders in the cache, used longest ago first; nothing else is in it."""
    found = sorted(folder.iterdir(), key=lambda path: (path / INDEX).stat().st_mtime_ns)
    assert all(re.fullmatch("[0-9a-f]{64}", path.name) for path in found)
    return found


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob(PIXELS))


def age(entry: Path, seconds: float) -> None:
    for path in [*entry.iterdir(), entry]:
        past = path.stat().st_mtime - seconds
        os.utime(path, (past, past))


class Decoder:
    """Counts what is decoded, and can be told to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        self.failure: Exception | None = None
        self._made: list[weakref.ref[Any]] = []
        self._read = read_pixels
        monkeypatch.setattr(pixel_cache, "read_pixels", self)

    def __call__(self, path: Path, **options: Any) -> Any:
        self.paths.append(path)
        if self.failure is not None:
            raise ImageReadError("failed") from self.failure
        pixels = self._read(path, **options)
        self._made.append(weakref.ref(pixels))
        return pixels

    def alive(self) -> int:
        """How many decoded images are in memory."""
        return sum(made() is not None for made in self._made)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    return Decoder(monkeypatch)


# --- the same as read_pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache", "temporary"])
def test_store_pixels__equal_to_read_pixels_whatever_the_size(tmp_path: Path, cache: Path, where: str) -> None:
    sizes = [(1, 1), (40, 20), (7, 50), (8, 8), (1, 30), (33, 91), (9, 9)]
    paths = [photo(tmp_path / f"{i}.png", *size) for i, size in enumerate(sizes)]
    paths += [tmp_path / "gone.png", photo(tmp_path / "large.png", 101, 100), paths[1]]
    check(store(paths, cache if where == "cache" else None), paths)


@same_folder
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6),
    max_bytes=st.integers(0, 4000),
    missing=st.integers(0, 6),
    temporary=st.booleans(),
)
def test_store_pixels__any_sizes_and_any_bound(
    tmp_path: Path, shapes: list[tuple[int, int]], max_bytes: int, missing: int, temporary: bool
) -> None:
    paths = [photo(tmp_path / f"{i}.png", *shape, seed=i) for i, shape in enumerate(shapes)]
    paths.insert(missing, tmp_path / "gone.png")
    folder = None if temporary else tmp_path / "cache"
    first = store(paths, folder, max_bytes=max_bytes)
    check(first, paths, cached=first[0].cached)
    sizes = [pixels.nbytes for pixels in first[0]]
    total = sum(sizes[: first[0].cached])
    assert total <= max_bytes
    assert first[0].cached == len(sizes) or total + sizes[first[0].cached] > max_bytes
    if folder is not None and max_bytes:
        assert stored_bytes(folder) <= max_bytes
    check(store(paths, folder, max_bytes=max_bytes), paths, cached=first[0].cached)


def test_stored_pixels__positions_are_those_of_a_list(tmp_path: Path, cache: Path) -> None:
    stored, _ = store(photos(tmp_path, 3), cache, max_bytes=2 * EACH)
    assert stored.cached == 2
    assert (stored[-1] == stored[2]).all() and (stored[-3] == stored[0]).all()
    assert not np.array_equal(stored[0], stored[1])
    assert (stored[np.int64(1)] == stored[1]).all()  # type: ignore[index]
    for index in (3, -4):
        with pytest.raises(IndexError):
            stored[index]
    with pytest.raises(TypeError):
        stored[0:2]  # type: ignore[index]


def test_stored_pixels__writing_into_an_image_leaves_the_file_alone(tmp_path: Path, cache: Path) -> None:
    paths = photos(tmp_path)
    stored, _ = store(paths, cache)
    stored[1][:] = 0
    check(store(paths, cache), paths)


def test_stored_pixels__an_image_outlives_the_rest(tmp_path: Path) -> None:
    paths = photos(tmp_path)
    image = store(paths, None)[0][2]
    gc.collect()
    assert np.array_equal(image, np.asarray(Image.open(paths[2])))


def test_store_pixels__nothing_readable(tmp_path: Path, cache: Path, temporary: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    first = "; ".join(f"{path}: no such file" for path in paths[:3])
    wanted = f"None of the 5 images tried could be read ({first}). Wanted at least one. Check the paths and the files."
    for folder, max_bytes in [(cache, PLENTY), (cache, PLENTY), (None, PLENTY), (cache, 0)]:
        with pytest.raises(ImageInputError, match=f"^{re.escape(wanted)}$"):
            store(paths, folder, max_bytes=max_bytes)
    with pytest.raises(ImageInputError, match=r"None of the 0 images tried could be read\. Wanted"):
        store([], cache)
    assert entries(cache) == [] and list(temporary.iterdir()) == []


def test_store_pixels__progress_is_told_in_this_thread(tmp_path: Path, cache: Path) -> None:
    paths = [*photos(tmp_path, 3), tmp_path / "gone.png"]
    told: list[tuple[int, int]] = []

    def tell(done: int) -> None:
        told.append((done, threading.get_ident()))

    store(paths, cache, on_progress=tell)
    assert told == [(done, threading.get_ident()) for done in (1, 2, 3, 4)]
    told.clear()
    store(paths, cache, on_progress=tell)
    assert told == [(4, threading.get_ident())]


def test_store_pixels__holds_a_handful_of_images(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = photos(tmp_path, 10) * 10
    held: list[int] = []
    for folder in (cache, None):
        store(paths, folder, max_bytes=50 * EACH, on_progress=lambda done: held.append(decoder.alive()))
    assert len(held) == 200
    assert max(held) <= 2 * min(8, usable_cores()) + 1  # what is read ahead, and the one at hand


# --- a second run -----------------------------------------------------------------------------------------------------


def test_store_pixels__second_run_decodes_nothing(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = [*photos(tmp_path), tmp_path / "gone.png"]
    (tmp_path / "not.png").write_text("an image")
    paths.insert(1, tmp_path / "not.png")
    first, set_aside = store(paths, cache)
    assert len(set_aside) == 2
    decoder.paths.clear()
    again = store(paths, cache)
    check(again, paths)
    assert again[1] == set_aside
    assert decoder.paths == [] and len(entries(cache)) == 1
    assert first.cached == 4


def test_store_pixels__no_file_is_read_to_find_what_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [*photos(tmp_path), tmp_path / "gone.png"]
    store(paths, cache)

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a file was opened")

    with monkeypatch.context() as patch:
        patch.setattr("finealign.images.files.open_regular", refuse)
        patch.setattr("finealign.images.decoding.open_regular", refuse)
        found = store(paths, cache)
    check(found, paths)


def test_store_pixels__a_folder_may_be_called_otherwise(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = photos(tmp_path / "here")
    (tmp_path / "here" / "not.png").write_text("an image")
    paths.append(tmp_path / "here" / "not.png")
    store(paths, cache)
    decoder.paths.clear()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = [tmp_path / "there" / path.name for path in paths]
    stored, set_aside = store(moved, cache)
    assert decoder.paths == []
    assert set_aside == [SetAside(str(moved[-1]), "not an image")]
    assert stored.paths == moved[:-1]


@pytest.mark.parametrize(
    "change", ["content", "replaced", "order", "fewer", "shorter_side", "max_pixels", "pillow", "gone"]
)
def test_store_pixels__another_set_is_another_entry(
    tmp_path: Path, cache: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    paths = [photo(tmp_path / f"{i}.bmp", seed=i) for i in range(3)]
    store(paths, cache)
    decoder.paths.clear()
    side, limit = SIDE, MAX_PIXELS
    if change == "content":
        before = paths[1].stat()
        photo(paths[1], seed=7)
        os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (paths[1].stat().st_size, paths[1].stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    elif change == "replaced":  # by another file of its name, size and times, as an unpacked archive has them
        photo(tmp_path / "other.bmp", seed=7)
        os.utime(tmp_path / "other.bmp", ns=(paths[1].stat().st_atime_ns, paths[1].stat().st_mtime_ns))
        (tmp_path / "other.bmp").replace(paths[1])
    elif change == "order":
        paths.reverse()
    elif change == "fewer":
        paths.pop()
    elif change == "pillow":
        monkeypatch.setattr("PIL.__version__", "0")
    elif change == "gone":
        paths[1].unlink()
    elif change == "shorter_side":
        side = 4
    else:
        limit = 9_999
    stored, set_aside = store(paths, cache, shorter_side=side, max_pixels=limit)
    assert decoder.paths == [path for path in paths if path.exists()]
    assert len(entries(cache)) == 2
    if change == "shorter_side":
        assert stored[0].shape == (4, 4, 3)
    else:
        check((stored, set_aside), paths)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_store_pixels__pipes_folders_and_empty_files_are_set_aside(tmp_path: Path, cache: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    names = ["pipe.png", "folder.png", "empty.png", "nul\0.png"]
    paths = [*photos(tmp_path, 1), *(tmp_path / name for name in names)]
    for folder in (cache, cache, None):
        check(store(paths, folder), paths)
    (tmp_path / "empty.png").write_text("no longer empty")
    check(store(paths, cache), paths)


@pytest.mark.parametrize(
    "tear",
    [
        lambda entry: (entry / INDEX).write_text("{"),
        lambda entry: (entry / INDEX).write_bytes(b"\xff"),
        lambda entry: (entry / INDEX).write_text("[]"),
        lambda entry: (entry / INDEX).write_text("{}"),
        lambda entry: (entry / INDEX).write_text('{"images": [5], "stored": 1, "bytes": 1}'),
        lambda entry: (entry / INDEX).write_text((entry / INDEX).read_text().replace("[8, 8], ", "", 1)),
        lambda entry: (entry / INDEX).write_text((entry / INDEX).read_text().replace("[8, 8]", "[9, 8]", 1)),
        lambda entry: (entry / INDEX).write_text((entry / INDEX).read_text().replace("[[", '["one more", [')),
        lambda entry: (entry / PIXELS).write_bytes((entry / PIXELS).read_bytes()[:-1]),
        lambda entry: (entry / PIXELS).write_bytes(b""),
        lambda entry: (entry / PIXELS).unlink(),
    ],
)
def test_store_pixels__torn_entry_is_made_anew(
    tmp_path: Path, cache: Path, decoder: Decoder, tear: Callable[[Path], object]
) -> None:
    paths = photos(tmp_path)
    store(paths, cache)
    tear(entries(cache)[0])
    decoder.paths.clear()
    check(store(paths, cache), paths)
    assert decoder.paths == paths
    decoder.paths.clear()
    check(store(paths, cache), paths)
    assert decoder.paths == [] and len(entries(cache)) == 1


def test_store_pixels__what_is_mapped_stays_when_its_entry_goes(tmp_path: Path, cache: Path) -> None:
    paths = photos(tmp_path)
    first = store(paths, cache)
    shutil.rmtree(entries(cache)[0])
    check(first, paths)


@pytest.mark.parametrize(
    "cause", [MemoryError(), PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")]
)
def test_store_pixels__an_image_that_fails_for_the_moment_is_tried_again(
    tmp_path: Path, cache: Path, decoder: Decoder, cause: Exception
) -> None:
    paths = photos(tmp_path)

    def fail_last(done: int) -> None:
        decoder.failure = cause

    paths = [*paths, *photos(tmp_path, 30, seed=1)]  # more than are read ahead
    stored, set_aside = store(paths, cache, on_progress=fail_last)
    assert set_aside and {row.reason for row in set_aside} == {"failed"}
    assert stored.cached == len(stored) and np.array_equal(stored[0], np.asarray(Image.open(stored.paths[0])))
    del stored
    gc.collect()
    assert entries(cache) == []
    decoder.failure = None
    check(store(paths, cache), paths)


def test_store_pixels__as_bright_as_the_white_value_says(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "sixteen bits.png"
    brightest = []
    Image.fromarray(np.linspace(0, 3000, 64).astype(np.uint16).reshape(8, 8)).save(path)
    for white in (3000, 6000, "auto"):
        how: dict[str, Any] = {"shorter_side": SIDE, "max_pixels": MAX_PIXELS, "white_value": white}
        stored, _ = store_pixels([path], **how, folder=cache, max_bytes=PLENTY)
        assert np.array_equal(stored[0], read_pixels(path, **how))
        brightest.append(int(stored[0].max()))
    assert brightest == [255, 128, 3000 >> 4]


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache", "temporary"])
def test_store_pixels__images_beyond_the_bound_are_decoded_at_access(
    tmp_path: Path, cache: Path, temporary: Path, decoder: Decoder, where: str
) -> None:
    paths = photos(tmp_path, 5)
    found = store(paths, cache if where == "cache" else None, max_bytes=3 * EACH - 1)
    assert stored_bytes(cache if where == "cache" else temporary) == 2 * EACH
    decoder.paths.clear()
    check(found, paths, cached=2)
    assert decoder.paths == paths[2:]
    for _ in range(2):
        assert np.array_equal(found[0][4], np.asarray(Image.open(paths[4])))
    assert decoder.paths == [*paths[2:], paths[4], paths[4]]


def test_store_pixels__part_of_a_set_is_a_hit_until_more_would_fit(
    tmp_path: Path, cache: Path, decoder: Decoder
) -> None:
    (tmp_path / "not.png").write_text("an image")
    paths = [*photos(tmp_path, 5), tmp_path / "not.png"]
    store(paths, cache, max_bytes=2 * EACH)
    for max_bytes, cached, decodes in [(2 * EACH, 2, 0), (3 * EACH - 1, 2, 0), (3 * EACH, 3, 6), (PLENTY, 5, 6)]:
        decoder.paths.clear()
        found = store(paths, cache, max_bytes=max_bytes)
        assert len(decoder.paths) == decodes
        check(found, paths, cached=cached)
        assert stored_bytes(cache) == cached * EACH
    for max_bytes, cached in [(5 * EACH - 1, 4), (EACH, 1), (EACH - 1, 0)]:
        check(store(paths, cache, max_bytes=max_bytes), paths, cached=cached)
        assert stored_bytes(cache) == cached * EACH
        decoder.paths.clear()
        store(paths, cache, max_bytes=max_bytes)
        assert decoder.paths == []


def test_store_pixels__least_recently_used_makes_room(tmp_path: Path, cache: Path) -> None:
    sets = [photos(tmp_path, 4, seed=seed) for seed in range(4)]
    made: list[Path] = []
    for number, paths in enumerate(sets[:3]):
        store(paths, cache, max_bytes=12 * EACH)
        (new,) = set(entries(cache)) - set(made)
        made.append(new)
        age(new, 1000 - number)
    assert stored_bytes(cache) == 12 * EACH
    store(sets[0], cache, max_bytes=12 * EACH)  # used again: now the second is the oldest
    store(sets[3], cache, max_bytes=12 * EACH)
    left = entries(cache)
    assert made[0] in left and made[1] not in left and made[2] in left and len(left) == 3
    assert stored_bytes(cache) == 12 * EACH

    store(sets[0], cache, max_bytes=8 * EACH)  # a hit keeps the bound too
    assert made[0] in entries(cache) and stored_bytes(cache) == 8 * EACH
    store(sets[1], cache, max_bytes=4 * EACH)
    assert len(entries(cache)) == 1 and stored_bytes(cache) == 4 * EACH


def test_store_pixels__a_set_that_does_not_fit_takes_the_whole_cache(tmp_path: Path, cache: Path) -> None:
    small, large = photos(tmp_path, 2, seed=1), photos(tmp_path, 9, seed=2)
    store(small, cache, max_bytes=5 * EACH)
    check(store(large, cache, max_bytes=5 * EACH), large, cached=5)
    assert stored_bytes(cache) == 5 * EACH


def test_store_pixels__no_room_is_made_for_what_will_not_fit(tmp_path: Path, cache: Path) -> None:
    small, mixed = photos(tmp_path, 2), [photo(tmp_path / "a.png", seed=1), photo(tmp_path / "b.png", 8, 80)]
    store(small, cache, max_bytes=4 * EACH)
    check(store(mixed, cache, max_bytes=4 * EACH), mixed, cached=1)
    assert len(entries(cache)) == 2


def test_store_pixels__nothing_of_others_is_touched(tmp_path: Path, cache: Path) -> None:
    paths = photos(tmp_path)
    index = json.dumps({"bytes": 5, "stored": 0, "images": []})
    foreign = [
        "notes",
        "f" * 63,
        "f" * 65,
        "F" * 64,
        "g" * 64,
        f"x{'f' * 64}",
        "building-here",
        f"building-{'0' * 17}",
    ]
    for name in foreign:
        (cache / name).mkdir(parents=True)
        (cache / name / PIXELS).write_bytes(bytes(10 * EACH))
        (cache / name / INDEX).write_text(index)
        age(cache / name, 10**6)
    bare = cache / ("a" * 64)  # a name like ours alone is not enough
    bare.mkdir()
    (bare / "thesis.txt").write_text("mine")
    (cache / ("b" * 64)).write_text("a file")
    (cache / f"building-{'0' * 16}").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / INDEX).write_text(index)
    (tmp_path / "elsewhere" / PIXELS).write_bytes(bytes(10 * EACH))
    (cache / ("c" * 64)).symlink_to(tmp_path / "elsewhere")
    before = sorted(path.relative_to(cache) for path in cache.rglob("*"))
    for seed in range(3):
        check(store(photos(tmp_path, seed=seed), cache, max_bytes=4 * EACH), photos(tmp_path, seed=seed))
    check(store(paths, cache, max_bytes=2 * EACH), paths, cached=2)
    ours = [path for path in cache.iterdir() if (path / INDEX).exists() and path.relative_to(cache) not in before]
    assert len(ours) == 1
    after = sorted(path.relative_to(cache) for path in cache.rglob("*") if ours[0] not in [path, *path.parents])
    assert after == before


def test_store_pixels__a_foreign_folder_in_the_place_of_the_entry_stays(
    tmp_path: Path, cache: Path, decoder: Decoder
) -> None:
    paths = photos(tmp_path)
    store(paths, cache)
    (entry,) = entries(cache)
    (entry / INDEX).unlink()
    (entry / "thesis.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"stored in .*not empty.*free some space") as warned:
        found = store(paths, cache)
    assert len(warned) == 1
    check(found, paths)
    assert (entry / "thesis.txt").read_text() == "mine"
    del found
    gc.collect()
    assert list(cache.iterdir()) == [entry]


def test_store_pixels__bound_of_nothing(tmp_path: Path, cache: Path, temporary: Path, decoder: Decoder) -> None:
    paths = [*photos(tmp_path), tmp_path / "gone.png"]
    for folder in (None, cache):
        decoder.paths.clear()
        found = store(paths, folder, max_bytes=0)
        assert decoder.paths == paths
        check(found, paths, cached=0)
    assert not cache.exists() and list(temporary.iterdir()) == []
    store(paths, cache)
    check(store(paths, cache, max_bytes=0), paths, cached=0)
    assert len(entries(cache)) == 1  # a run that wants none does not cost others theirs


@pytest.mark.parametrize("where", ["cache", "temporary"])
def test_stored_pixels__vanished_file_beyond_the_bound(tmp_path: Path, cache: Path, where: str) -> None:
    paths = photos(tmp_path, 2)
    wanted = np.asarray(Image.open(paths[0]))
    stored, _ = store(paths, cache if where == "cache" else None, max_bytes=EACH)
    for path in paths:
        path.unlink()
    assert np.array_equal(stored[0], wanted)
    message = f"'{re.escape(str(paths[1]))}' could be read .* no longer can: no such file. Put it back"
    with pytest.raises(ImageInputError, match=message):
        stored[1]


# --- cut short, in the way of others, nowhere to write ---------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache", "temporary"])
@pytest.mark.parametrize("after", [1, 4])
def test_store_pixels__interrupted_leaves_nothing(
    tmp_path: Path, cache: Path, temporary: Path, where: str, after: int
) -> None:
    paths = photos(tmp_path) * 10
    before = threading.active_count()

    def stop(done: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        store(paths, cache if where == "cache" else None, on_progress=stop)
    assert threading.active_count() == before  # though the traceback in `caught` still holds the frames
    assert caught.value
    assert list(temporary.iterdir()) == []
    assert where == "temporary" or entries(cache) == []
    check(store(paths, cache), paths)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("died", ["building", "making room"])
def test_store_pixels__what_a_killed_run_left_goes_after_a_day(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, died: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        """Nothing is cleaned up after a kill."""

    with monkeypatch.context() as patched:
        if died == "building":
            patched.setattr(shutil, "rmtree", killed)
            with pytest.raises(ZeroDivisionError):
                store(photos(tmp_path), cache, on_progress=lambda done: done // 0)  # type: ignore[arg-type]
        else:
            store(photos(tmp_path), cache)
            patched.setattr(shutil, "rmtree", killed)
            check(store(photos(tmp_path, seed=1), cache, max_bytes=4 * EACH), photos(tmp_path, seed=1))
    (left,) = cache.glob("building-*")
    store(photos(tmp_path, seed=2), cache)
    assert left.exists()  # it may be at work still
    age(left, 23 * 3600)
    store(photos(tmp_path, seed=3), cache)
    assert left.exists()
    age(left, 3600)
    store(photos(tmp_path, seed=4), cache)
    assert not left.exists()
    assert len(entries(cache)) == (3 if died == "building" else 4)


def test_store_pixels__an_old_unfinished_entry_that_is_still_written_to_stays(tmp_path: Path, cache: Path) -> None:
    unfinished = cache / f"building-{'0' * 16}"
    unfinished.mkdir(parents=True)
    for name in (PIXELS, "another"):
        (unfinished / name).write_bytes(b"")
    age(unfinished, 25 * 3600)
    os.utime(unfinished / PIXELS)
    store(photos(tmp_path), cache)
    assert unfinished.exists()
    age(unfinished, 25 * 3600)
    store(photos(tmp_path, seed=1), cache)
    assert not unfinished.exists()


def test_store_pixels__of_two_builders_the_later_keeps_what_is_there(
    tmp_path: Path, cache: Path, decoder: Decoder
) -> None:
    paths = photos(tmp_path)
    inner: list[tuple[StoredPixels, list[SetAside]]] = []
    kept: list[int] = []

    def race(done: int) -> None:
        if done == 3:
            inner.append(store(paths, cache))
            kept.extend(path.stat().st_ino for path in cache.glob(f"{'[0-9a-f]' * 64}/*"))

    outer = store(paths, cache, on_progress=race)
    check(outer, paths)
    check(inner[0], paths)
    (entry,) = entries(cache)
    assert sorted(path.stat().st_ino for path in entry.iterdir()) == sorted(kept)
    decoder.paths.clear()
    check(store(paths, cache), paths)
    assert decoder.paths == []


def test_store_pixels__two_builders_of_different_sets_keep_the_bound(tmp_path: Path, cache: Path) -> None:
    one, two = photos(tmp_path, seed=1), photos(tmp_path, seed=2)
    inner = []

    def race(done: int) -> None:
        if done == 3:
            inner.append(store(two, cache, max_bytes=6 * EACH))

    outer = store(one, cache, max_bytes=6 * EACH, on_progress=race)
    check(outer, one)
    check(inner[0], two)
    assert stored_bytes(cache) == 4 * EACH and len(entries(cache)) == 1


class FullFile:
    """Takes ``room`` bytes, then the disk is full."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: memoryview) -> int:
        self._room -= data.nbytes
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("where", ["cache", "temporary"])
@pytest.mark.parametrize("room", [0, 2])
def test_store_pixels__full_disk(
    tmp_path: Path, cache: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, where: str, room: int
) -> None:
    paths = [*photos(tmp_path), tmp_path / "gone.png"]
    open_path = Path.open

    def open_full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = open_path(self, mode, *rest, **options)
        return FullFile(file, room * EACH) if self.name == PIXELS and "w" in mode else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_full)
        with pytest.warns(UserWarning, match=r"^The decoded .*No space left.*slower; free some space") as warned:
            found = store(paths, cache if where == "cache" else None)
    assert len(warned) == 1
    check(found, paths, cached=0)
    assert list(temporary.iterdir()) == []
    assert where == "temporary" or entries(cache) == []
    check(store(paths, cache), paths)


def test_store_pixels__file_that_may_not_grow(tmp_path: Path, cache: Path) -> None:
    resource = pytest.importorskip("resource")
    paths = [photo(tmp_path / f"{i}.png", 40, 40, seed=i) for i in range(20)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.warns(UserWarning, match="too large") as warned:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            stored, _ = store(paths, cache, shorter_side=40)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(warned) == 1
    assert stored.cached == 0 and stored[19].shape == (40, 40, 3)
    assert entries(cache) == []


@pytest.mark.parametrize("call", ["fsync", "mkdir", "index"])
def test_store_pixels__failure_at_any_step_is_one_warning(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    paths = photos(tmp_path)

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    place = {"fsync": (os, "fsync"), "mkdir": (Path, "mkdir"), "index": (Path, "write_text")}[call]
    with monkeypatch.context() as patched:
        patched.setattr(*place, fail)
        with pytest.warns(UserWarning, match="Read-only file system") as warned:
            found = store(paths, cache)
    assert len(warned) == 1
    check(found, paths, cached=4 if call == "index" else 0)
    del found
    gc.collect()
    assert not cache.exists() or entries(cache) == []


def test_store_pixels__folder_that_is_a_file(tmp_path: Path) -> None:
    paths = photos(tmp_path)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.warns(UserWarning, match="cannot be stored in"):
            found = store(paths, folder)
        check(found, paths, cached=0)
    assert (tmp_path / "file").read_text() == "mine"


def test_store_pixels__cache_that_can_only_be_read_is_a_hit(
    tmp_path: Path, cache: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = photos(tmp_path)
    store(paths, cache)
    decoder.paths.clear()

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    for place, name in [(os, "utime"), (Path, "mkdir"), (Path, "rename"), (shutil, "rmtree")]:
        monkeypatch.setattr(place, name, fail)
    check(store(paths, cache), paths)
    monkeypatch.undo()
    assert decoder.paths == []


# --- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "max_bytes"), [("cache", PLENTY), ("temporary", 2 * EACH), ("cache", 0)])
def test_stored_pixels__pickled_and_back(tmp_path: Path, cache: Path, where: str, max_bytes: int) -> None:
    paths = [*photos(tmp_path), tmp_path / "gone.png"]
    stored, set_aside = store(paths, cache if where == "cache" else None, max_bytes=max_bytes)
    sent = pickle.dumps(stored)
    check((pickle.loads(sent), set_aside), paths, cached=min(4, max_bytes // EACH))
    gc.collect()
    check((stored, set_aside), paths, cached=min(4, max_bytes // EACH))  # a copy that goes takes nothing with it


def test_stored_pixels__pickled_without_the_pixels(tmp_path: Path, cache: Path) -> None:
    paths = [photo(tmp_path / f"{i}.png", 90, 90, seed=i) for i in range(4)]
    stored, _ = store(paths, cache, shorter_side=90)
    assert len(pickle.dumps(stored)) < 2000


def test_stored_pixels__unpickled_when_the_entry_is_gone(tmp_path: Path, cache: Path) -> None:
    paths = photos(tmp_path)
    stored, set_aside = store(paths, cache)
    sent = pickle.dumps(stored)
    shutil.rmtree(entries(cache)[0])
    with pytest.warns(UserWarning, match=r"cannot be read .*No such file.*run again"):
        copy = pickle.loads(sent)
    check((copy, set_aside), paths, cached=0)
    check((pickle.loads(pickle.dumps(copy)), set_aside), paths, cached=0)


def test_stored_pixels__temporary_folder_goes_with_its_owner(tmp_path: Path, temporary: Path) -> None:
    stored, _ = store(photos(tmp_path), None)
    assert len(list(temporary.iterdir())) == 1
    del stored
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_stored_pixels__temporary_folder_stays_when_a_forked_copy_goes(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, _ = store(photos(tmp_path), None)
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a worker
    del stored
    gc.collect()
    monkeypatch.undo()
    assert len(list(temporary.iterdir())) == 1
