"""Views: boxes inside the image, crops that show what their box says, and draws that nothing outside can change."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from finealign.config import ViewSettings
from finealign.images import views as views_module
from finealign.images.views import (
    ASPECT,
    CROP,
    PREDICTION_EPOCH,
    STRONG,
    Views,
    crop_box,
    cut_and_resize,
    cut_on,
    draw,
    padded,
    strong_box,
)

Pixels = NDArray[np.uint8]

few = settings(max_examples=100, deadline=None)
side = st.integers(1, 700) | st.sampled_from([1, 2, 3, 5000])
seeds = st.integers(0, 2**32)

SIZE = 24
POLICY = "rand-m9-mstd0.5-inc1"


def make(*, seed: int = 0, size: int = SIZE, policy: str = POLICY, crops: int = 3) -> Views:
    chosen = ViewSettings(crops=crops, crop_low=0.5, crop_high=0.9, strong_low=0.3, randaugment=policy)

    def geometry(image: Image.Image) -> Image.Image:
        return image.resize((size, size), Image.Resampling.BICUBIC)

    return Views(chosen, size=size, geometry=geometry, mean=(0.5, 0.4, 0.3), seed=seed)


def noise(number: int = 0, height: int = 40, width: int = 56) -> Pixels:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height: int = 200, width: int = 250) -> Pixels:
    """Red tells the column, green the row, so that the mean colour of a part tells where its middle is."""
    pixels = np.full((height, width, 3), 77, dtype=np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    return pixels


def unaugmented(views: Views) -> Views:
    views._augment = lambda image: image
    return views


PHOTOS = [noise(number) for number in range(8)]

# Each kind of drawn view, as a function of (views, epoch, image).
KINDS: dict[str, Callable[[Views, int, int], Tensor]] = {
    "strong": lambda views, epoch, image: views.strong(PHOTOS[image], epoch=epoch, image=image),
    "crops": lambda views, epoch, image: views.crops(PHOTOS[image], epoch=epoch, image=image),
}
kinds = pytest.mark.parametrize("kind", KINDS)


# --- crop_box, strong_box ---------------------------------------------------------------------------------------------


@few
@given(height=side, width=side, low=st.floats(0.01, 1), high=st.floats(0.01, 1), seed=seeds)
@example(height=1, width=1, low=0.5, high=0.9, seed=0)
@example(height=1, width=5000, low=0.5, high=0.9, seed=0)
@example(height=5000, width=1, low=0.01, high=0.01, seed=0)
@example(height=50, width=50, low=1.0, high=1.0, seed=0)
def test_crop_box__is_a_square_inside_the_image(height: int, width: int, low: float, high: float, seed: int) -> None:
    low, high = min(low, high), max(low, high)
    left, top, right, bottom = crop_box(np.random.default_rng(seed), height, width, low=low, high=high)
    shorter = min(height, width)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == bottom - top
    assert max(1, low * shorter - 0.5) <= right - left <= max(1, high * shorter + 0.5)


@few
@given(height=side, width=side, low=st.floats(0.01, 1), seed=seeds)
@example(height=1, width=1, low=0.3, seed=0)
@example(height=1, width=5000, low=0.3, seed=0)
@example(height=5000, width=1, low=1.0, seed=0)
def test_strong_box__lies_inside_the_image(height: int, width: int, low: float, seed: int) -> None:
    left, top, right, bottom = strong_box(np.random.default_rng(seed), height, width, low=low)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize(("height", "width"), [(600, 600), (480, 640), (640, 480)])
def test_strong_box__keeps_to_its_share_and_its_aspect(height: int, width: int) -> None:
    shares, aspects = [], []
    for seed in range(400):
        left, top, right, bottom = strong_box(np.random.default_rng(seed), height, width, low=0.3)
        shares.append((right - left) * (bottom - top) / (height * width))
        aspects.append((right - left) / (bottom - top))
    assert 0.29 < min(shares) < 0.33
    assert 0.85 < max(shares) <= 1
    assert ASPECT[0] - 0.01 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < ASPECT[1] + 0.01


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10)])
def test_strong_box__of_a_ribbon_is_its_middle(height: int, width: int) -> None:
    box = strong_box(np.random.default_rng(0), height, width, low=0.3)
    assert box == ((195, 0, 205, 10) if width > height else (0, 195, 10, 205))


def test_crop_box__reaches_every_place_and_the_whole_range() -> None:
    boxes = [crop_box(np.random.default_rng(seed), 4, 5, low=0.5, high=0.5) for seed in range(300)]
    assert {box[2] - box[0] for box in boxes} == {2}
    assert {(box[0], box[1]) for box in boxes} == {(left, top) for left in range(4) for top in range(3)}
    sides = [crop_box(np.random.default_rng(seed), 1000, 2000, low=0.5, high=0.9) for seed in range(300)]
    widths = [box[2] - box[0] for box in sides]
    assert 500 <= min(widths) < 520
    assert 880 < max(widths) <= 900
    assert 670 < sum(widths) / len(widths) < 730


# --- draw: only (seed, epoch, image, view) counts ---------------------------------------------------------------------


def test_draw__is_the_same_for_the_same_and_differs_in_each_part() -> None:
    def drawn(*identity: int) -> tuple[float, ...]:
        return tuple(draw(*identity).random(4))

    assert drawn(1, 2, 3, 4) == drawn(1, 2, 3, 4)
    assert len({drawn(*identity) for identity in np.ndindex(4, 4, 4, 4)}) == 4**4
    assert drawn(0, PREDICTION_EPOCH, 0, CROP) != drawn(0, 0, 0, CROP)


def test_draw__the_strong_view_shares_no_draw_with_a_crop() -> None:
    assert STRONG not in range(CROP, CROP + 1000)


@kinds
def test_views__repeat_themselves(kind: str) -> None:
    assert torch.equal(KINDS[kind](make(), 1, 2), KINDS[kind](make(), 1, 2))


@kinds
def test_views__do_not_depend_on_the_order_or_on_other_images(kind: str) -> None:
    identities = [(epoch, image) for epoch in range(3) for image in range(len(PHOTOS))]
    alone = {identity: KINDS[kind](make(), *identity) for identity in identities}
    for order in (identities, identities[::-1], identities[::2]):
        views = make()
        for identity in order:
            for other in KINDS:  # the other kind in between
                found = KINDS[other](views, *identity)
                if other == kind:
                    assert torch.equal(found, alone[identity])


def test_views__do_not_depend_on_the_number_of_threads() -> None:
    identities = [(kind, epoch, image) for kind in KINDS for epoch in range(6) for image in range(len(PHOTOS))]
    views = make()

    def render(identity: tuple[str, int, int]) -> Tensor:
        return KINDS[identity[0]](views, *identity[1:])

    before = global_states()
    serial = [render(identity) for identity in identities]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(render, identities))
    for one, other in zip(serial, threaded, strict=True):
        assert torch.equal(one, other)
    assert global_states() == before


def test_views__of_two_seeds_in_threads_do_not_mix() -> None:
    both = [make(seed=seed) for seed in (0, 1)]
    tasks = [(seed, image) for image in range(len(PHOTOS)) for seed in (0, 1)] * 3
    alone = {task: make(seed=task[0]).strong(PHOTOS[task[1]], epoch=0, image=task[1]) for task in set(tasks)}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda task: both[task[0]].strong(PHOTOS[task[1]], epoch=0, image=task[1]), tasks)
        for task, view in zip(tasks, found, strict=True):
            assert torch.equal(view, alone[task])


def global_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, tuple(np.asarray(keys).tolist()), *rest, torch.get_rng_state().numpy().tobytes()


def seed_everything(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@kinds
def test_views__leave_the_global_generators_as_found_and_unheeded(kind: str) -> None:
    kept_python, kept_numpy, kept_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        found = []
        for number in (0, 1):
            seed_everything(number)
            np.random.normal()  # leaves a second draw waiting, which belongs to the state
            before = global_states()
            found.append([KINDS[kind](make(), 0, image) for image in range(len(PHOTOS))])
            assert global_states() == before
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
    finally:
        random.setstate(kept_python)
        np.random.set_state(kept_numpy)
        torch.set_rng_state(kept_torch)


def test_strong__an_error_in_augmentation_gives_back_what_was_borrowed() -> None:
    def fail(image: Image.Image) -> NoReturn:
        random.random()
        np.random.normal()
        raise RuntimeError("augmentation failed")

    views = make()
    views._augment = fail
    before = global_states()
    for _ in range(2):  # the second would wait for ever if the first had kept the lock
        with pytest.raises(RuntimeError, match="augmentation failed"):
            views.strong(PHOTOS[0], epoch=0, image=0)
        assert not views_module._GLOBAL_RANDOM.locked()
    assert global_states() == before


@kinds
def test_views__another_seed_epoch_or_image_is_another_view(kind: str) -> None:
    same_photo: dict[str, Callable[[int, int, int], Tensor]] = {
        "strong": lambda seed, epoch, image: make(seed=seed).strong(PHOTOS[0], epoch=epoch, image=image),
        "crops": lambda seed, epoch, image: make(seed=seed).crops(PHOTOS[0], epoch=epoch, image=image),
    }
    found = {same_photo[kind](*identity).numpy().tobytes() for identity in np.ndindex(3, 3, 3)}
    assert len(found) == 27


def test_crops__each_is_another_part() -> None:
    crops = make(crops=8).crops(PHOTOS[0], epoch=0, image=0)
    assert len({crop.numpy().tobytes() for crop in crops}) == 8


def test_crops__more_crops_leave_the_first_ones_as_they_were() -> None:
    few_crops, many = (make(crops=count).crops(PHOTOS[0], epoch=0, image=0) for count in (2, 5))
    assert torch.equal(many[:2], few_crops)


# --- weak -------------------------------------------------------------------------------------------------------------


def test_weak__is_the_backbones_geometry_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> NoReturn:
        raise AssertionError("the weak view is not to draw")

    monkeypatch.setattr(views_module, "draw", refuse)
    before = global_states()
    found = [make(seed=seed).weak(PHOTOS[0]) for seed in (0, 1)]
    assert global_states() == before
    wanted = np.asarray(Image.fromarray(PHOTOS[0]).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    for view in found:
        assert np.array_equal(view.numpy(), wanted.transpose(2, 0, 1))


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (2, 3), (24, 24), (60, 31)])
@pytest.mark.parametrize("size", [8, 24])
def test_views__shape_and_type(height: int, width: int, size: int) -> None:
    views, pixels = make(size=size), noise(0, height, width)
    before = pixels.copy()
    found = [views.weak(pixels), views.strong(pixels, epoch=0, image=0), *views.crops(pixels, epoch=0, image=0)]
    assert views.crops(pixels, epoch=0, image=0).shape == (3, 3, size, size)
    for view in found:
        assert view.shape == (3, size, size)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
    assert np.array_equal(pixels, before)


def test_views__a_view_is_the_callers_own() -> None:
    pixels = noise(0, SIZE, SIZE)
    before = pixels.copy()
    views = make()
    for view in (views.weak(pixels), views.strong(pixels, epoch=0, image=0), views.crops(pixels, epoch=0, image=0)):
        view.zero_()
    assert np.array_equal(pixels, before)


# --- what a view shows ------------------------------------------------------------------------------------------------


def agrees(view: Tensor, pixels: Pixels, box: tuple[int, ...]) -> bool:
    """Whether a view shows the part of the picture in the box, by Pillow's own resampling of that part."""
    part = Image.fromarray(pixels).crop((box[0], box[1], box[2], box[3]))
    wanted = np.asarray(part.resize((view.shape[2], view.shape[1]), Image.Resampling.BICUBIC)).astype(int)
    return bool(np.abs(view.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 3)


def test_crops__show_their_boxes_and_nothing_else() -> None:
    pixels = gradient()
    height, width = pixels.shape[:2]
    for image in range(10):
        crops = make(seed=5, crops=4).crops(pixels, epoch=2, image=image)
        for number, crop in enumerate(crops):
            box = crop_box(draw(5, 2, image, CROP + number), height, width, low=0.5, high=0.9)
            left, top, right, bottom = box
            red, green, blue = crop.float().mean(dim=(1, 2)).tolist()
            assert red == pytest.approx((left + right - 1) / 2, abs=0.6)
            assert green == pytest.approx((top + bottom - 1) / 2, abs=0.6)
            assert blue == 77
            assert agrees(crop, pixels, box)


def test_crops__of_a_finer_size_than_the_picture_show_it_too() -> None:
    pixels = noise(3, 12, 12)
    crop = make(size=48, crops=1).crops(pixels, epoch=0, image=0)[0]
    assert agrees(crop, pixels, crop_box(draw(0, 0, 0, CROP), 12, 12, low=0.5, high=0.9))


def test_strong__without_augmentation_is_its_box_or_the_mirror_image() -> None:
    pixels = gradient()
    views = unaugmented(make(seed=3))
    for image in range(30):
        view = views.strong(pixels, epoch=1, image=image)
        box = strong_box(draw(3, 1, image, STRONG), *pixels.shape[:2], low=0.3)
        assert agrees(view, pixels, box) or agrees(view.flip(2), pixels, box)


def test_strong__is_mirrored_about_half_of_the_time() -> None:
    pixels, views = gradient(), unaugmented(make(size=8))
    mirrored = 0
    for image in range(400):
        view = views.strong(pixels, epoch=0, image=image).float()
        assert view[1, 0].mean() < view[1, -1].mean()  # never upside down
        mirrored += bool(view[0, :, 0].mean() > view[0, :, -1].mean())
    assert 150 < mirrored < 250  # five standard deviations


def test_strong__is_augmented() -> None:
    plain, augmented = unaugmented(make()), make()
    changed = [
        not torch.equal(plain.strong(photo, epoch=0, image=i), augmented.strong(photo, epoch=0, image=i))
        for i, photo in enumerate(PHOTOS)
    ]
    assert sum(changed) > len(PHOTOS) / 2


def test_strong__what_augmentation_uncovers_is_the_mean_colour() -> None:
    views = make(policy="rand-m10-n1-inc1")
    augment: Any = views._augment
    shift = next(op for op in augment.ops if op.name == "TranslateXRel")
    shift.prob, shift.magnitude, shift.magnitude_std = 1.0, 9, 0
    views._augment = shift
    view = views.strong(np.full((40, 40, 3), 255, dtype=np.uint8), epoch=0, image=0)
    colours = {tuple(colour) for colour in view.permute(1, 2, 0).reshape(-1, 3).tolist()}
    assert {(255, 255, 255), (128, 102, 76)} <= colours


# --- RandAugment at its full magnitude ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [POLICY, "rand-m10-inc1", "rand-m10-mstd5-inc1", "rand-m30-n4-inc1", "rand-m9-mstd0.5"]
)
def test_strong__never_raises(policy: str) -> None:
    views = make(policy=policy, size=8)
    for image in range(250):
        assert views.strong(PHOTOS[0], epoch=0, image=image).shape == (3, 8, 8)


@pytest.mark.parametrize("magnitude", [0, 5, 9, 9.99, 10, 11, 100])
def test_strong__every_operation_takes_every_magnitude(magnitude: float) -> None:
    views = make()
    augment: Any = views._augment
    assert "PosterizeIncreasing" in {op.name for op in augment.ops}
    for op in augment.ops:
        op.prob, op.magnitude, op.magnitude_std = 1.0, magnitude, 0
        views._augment = op
        assert views.strong(PHOTOS[0], epoch=0, image=0).shape == (3, SIZE, SIZE)


def test_strong__the_trap_of_posterize_is_real() -> None:
    """Why ``views.py`` bounds the magnitude: without a bound, timm asks Pillow to keep 0 bits of a colour."""
    from timm.data.auto_augment import rand_augment_transform

    image = Image.fromarray(PHOTOS[0])
    try:
        ImageOps.posterize(image, 0)
    except ValueError:
        pass
    else:
        pytest.skip("this Pillow keeps 0 bits without complaint")
    unbounded = rand_augment_transform("rand-m10-mstd0.5-inc1", {})
    posterize = next(op for op in unbounded.ops if op.name == "PosterizeIncreasing")
    posterize.prob, posterize.magnitude, posterize.magnitude_std = 1.0, 10, 0
    try:
        posterize(image)
    except ValueError:
        return
    pytest.skip("this timm keeps a bit at the full magnitude")


@pytest.mark.parametrize("policy", ["foo", "", "augmix-m3", "rand-x"])
def test_views__a_policy_that_is_none(policy: str) -> None:
    from finealign.config import make_config
    from finealign.errors import ConfigError

    with pytest.raises(ConfigError, match="randaugment"):
        make_config({"views": {"randaugment": policy}})


# --- where the crops lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(200, 250), (250, 200), (60, 60), (1, 40)])
def test_crop_boxes__are_what_the_crops_show(height: int, width: int) -> None:
    pixels = gradient(height, width)
    for epoch, image in ((0, 0), (2, 7), (PREDICTION_EPOCH, 0)):
        views = make(seed=5, crops=4)
        boxes = views.crop_boxes(height, width, epoch=epoch, image=image)
        assert boxes == [crop_box(draw(5, epoch, image, CROP + n), height, width, low=0.5, high=0.9) for n in range(4)]
        crops = views.crops(pixels, epoch=epoch, image=image)
        assert all(agrees(crop, pixels, box) for crop, box in zip(crops, boxes, strict=True))


def test_crop_boxes__draw_the_same_as_ever() -> None:
    """Boxes written down when ``crops`` drew its own: another draw would be another experiment."""
    boxes = make(seed=0, crops=3).crop_boxes(48, 64, epoch=1, image=2)
    assert boxes == [(13, 12, 48, 47), (18, 3, 60, 45), (26, 7, 62, 43)]


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 70), seed=st.integers(0, 9), data=st.data()
)
def test_cut_and_resize__is_the_cpu_s_crops(height: int, width: int, size: int, seed: int, data: st.DataObject) -> None:
    """PyTorch's own uint8 kernel, box by box, is the independent statement; its weights are rounded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    boxes = []
    for _ in range(data.draw(st.integers(1, 4))):
        left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        boxes.append((left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))))
    (stack,) = padded([(pixels, boxes)])
    (found,) = cut_and_resize(*stack, size)
    assert found.dtype == torch.uint8 and found.shape == (len(boxes), 3, size, size)
    for one, (left, top, right, bottom) in zip(found, boxes, strict=True):
        part = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
        expected = interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0]
        assert (one.int() - expected.int()).abs().max() <= 2


def test_cut_on__crops_of_many_images_are_those_of_each_whatever_their_sizes() -> None:
    views = make(crops=3)
    shapes = [(40, 56), (56, 40), (41, 300), (40, 40), (24, 25), (900, 30)]
    uncut = [
        (noise(number, *shape), views.crop_boxes(*shape, epoch=0, image=number)) for number, shape in enumerate(shapes)
    ]
    stacks = padded(uncut)
    assert 1 < len(stacks) < len(shapes)
    own = sum(height * width for height, width in shapes)
    assert sum(images[..., 0].numel() for images, _ in stacks) <= 2 * own
    found = cut_on(torch.device("cpu"), stacks, SIZE)
    assert found.shape == (18, 3, SIZE, SIZE)
    wanted = torch.cat([views.crops(pixels, epoch=0, image=number) for number, (pixels, _) in enumerate(uncut)])
    assert int((found.int() - wanted.int()).abs().max()) <= 2
    assert padded([]) == []
