"""Images that are not files: in memory, rows of a Hugging Face dataset, items of a PyTorch dataset.

Each is handed on as the bytes of an image file, so that one way of decoding, caching and setting aside serves all. What
is a file's bytes already, as in most datasets, stays as it is; pixels become an uncompressed TIFF when they are read.
"""

import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Dataset

from finealign.errors import ImageInputError, first_few, one_line
from finealign.images.channels import UPRIGHT, orientation, with_directory
from finealign.images.files import ImageReadError, open_regular, reason_of
from finealign.types import HeldImage, ImagePath

# What stands for images: a folder, a list file, a CSV or one image by its path; images in memory; several of these.
Images = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | torch.Tensor | Dataset[Any] | Iterable[Any]

TAKEN = (
    "paths, PIL images, uint8 arrays (H, W, 3), tensors (3, H, W), a batch of those, a list or generator of any of "
    "these, a Hugging Face dataset, or a PyTorch dataset"
)
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with transparency
SLACK = 1e-3  # by which rounding may lead out of [0, 1]
IMAGE_KEYS = ("image", "img")  # what datasets call the image of a row


class Items(Protocol):
    """What can be asked for its length and its items."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class HeldImages(Sequence[ImagePath]):
    """A sequence of images whose items are fetched when they are read. Items that are paths are given as paths.

    Items are fetched one at a time, because datasets need not allow for threads; decoding is not.
    """

    def __init__(self, items: Items, *, called: str = "image ", lists: bool = False) -> None:
        """Item 3 is called ``image 3``. With ``lists`` an item that is a list has the image first, as a tuple has."""
        self._items, self._called, self._lists = items, called, lists
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        position = range(len(self))[index]
        item = self._items[position] if isinstance(self._items, list | tuple) else None
        if isinstance(item, HeldImage):
            return item
        return Path(item) if isinstance(item, str | os.PathLike) else HeldImage(self, position)

    def name(self, index: int) -> str:
        """What the image at this index is called."""
        return f"{self._called}{index}"

    def open(self, index: int) -> BinaryIO:
        """Open the image at this index, as the bytes of an image file. Raises ImageReadError."""
        with self._lock:
            try:
                item = self._items[index]
            except Exception as error:  # a dataset may raise anything, and one item must not end a run
                raise ImageReadError(f"its dataset raises {type(error).__name__}: {one_line(error)}") from error
            if self._lists and isinstance(item, list) and item:
                item = item[0]
            return _opened(item)

    def __getstate__(self) -> dict[str, Any]:  # for worker processes
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


def held_images(images: Any) -> Sequence[ImagePath]:
    """The images that anything but a path stands for, in its order. An item that is no image is found when it is read.

    A generator is consumed, and its items are kept; a list, an array or a dataset is not copied.

    Raises ImageInputError for what holds no images, or whose order or shape leaves open which they are.
    """
    if isinstance(images, HeldImages):
        return images
    if isinstance(images, HeldImage | Image.Image | bytes | bytearray):
        return HeldImages([images])
    if isinstance(images, np.ndarray | torch.Tensor):
        return _of_array(images)
    if hasattr(images, "cast_column"):
        return images_of_rows(images)
    if isinstance(images, Mapping):
        names = first_few(map(str, images), len(images), 5)
        raise ImageInputError(f"Found a mapping of {names}, wanted images. Give one of its values, as images['train'].")
    _refuse_unclear(images)
    dataset = isinstance(images, Dataset)
    by_index = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if not by_index and not isinstance(images, Iterable):
        raise ImageInputError(f"Found {_article(images)}, wanted {TAKEN}.")
    # A column of a table also has an index, of labels and not of places.
    if not by_index or (isinstance(images, Iterable) and not isinstance(images, Sequence) and not dataset):
        images = _consumed(images)
    if not len(images):
        raise ImageInputError("The list of images is empty. Give at least one image or path.")
    return HeldImages(images, lists=dataset)


def stream(images: Iterable[Any]) -> Iterator[ImagePath]:
    """What ``held_images`` gives, one at a time as they come, for images without end or without room for all."""
    for index, item in enumerate(images):
        if isinstance(item, HeldImage):
            yield item
        else:
            yield Path(item) if isinstance(item, str | os.PathLike) else HeldImage(_One(item, index), index)


class _One:
    """The collection of one image of a stream."""

    def __init__(self, item: Any, index: int) -> None:
        self._item, self._index = item, index
        self._lock = threading.Lock()

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> BinaryIO:
        with self._lock:
            return _opened(self._item)


def _consumed(images: Iterable[Any]) -> list[Any]:
    try:
        return list(images)
    except TypeError as error:  # a PyTorch dataset without a length, whose class says that it can be iterated
        raise ImageInputError(f"Found {_article(images)}, which cannot be iterated: {one_line(error)}.") from error


def _refuse_unclear(images: Any) -> None:
    """Raise ImageInputError for what can be iterated, but not as images."""
    if isinstance(images, set | frozenset):
        raise ImageInputError("Found a set, whose order is not fixed. Give a list of images, as sorted(images).")
    if isinstance(images, DataLoader):
        raise ImageInputError("Found a DataLoader, which gives batches. Give its dataset: loader.dataset.")
    if hasattr(images, "columns") and not isinstance(images, Dataset):
        names = first_few((repr(str(name)) for name in images.columns), len(images.columns), 5)
        raise ImageInputError(
            f"Found a table with the columns {names}. Give the one with the images, as table['path']."
        )
    if isinstance(images, io.IOBase):
        raise ImageInputError("Found an open file. Give its path, or what it holds: file.read().")


# --- arrays and tensors ---------------------------------------------------------------------------------------------


def _of_array(images: "NDArray[Any] | torch.Tensor") -> Sequence[ImagePath]:
    """An image, or a batch of images of one shape. Raises ImageInputError where it is neither."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":
        if images.ndim != 1:
            raise ImageInputError(f"Found an array of {images.dtype} of shape {images.shape}. Give a list of images.")
        return held_images(images.tolist())
    shape, batch = tuple(images.shape), images.ndim == 4
    try:
        _check_shape(shape[1:] if batch else shape, first=isinstance(images, torch.Tensor))
    except ImageReadError as error:
        raise ImageInputError(f"Found {error}.") from error
    return held_images(list(images) if batch else [images])


def _check_shape(shape: tuple[int, ...], *, first: bool) -> None:
    """Raise ImageReadError for what is not the shape of an image; ``first``: channels come first, as in PyTorch."""
    what = f"{'a tensor' if first else 'an array'} of shape {shape}"
    channels = 1 if len(shape) == 2 else 0 if len(shape) != 3 else shape[0] if first else shape[2]
    wanted = "(3, H, W), (1, H, W), (4, H, W) or (H, W)" if first else "(H, W, 3), (H, W, 1), (H, W, 4) or (H, W)"
    if channels not in CHANNELS:
        turned = len(shape) == 3 and shape[2 if first else 0] in CHANNELS
        turn = "permute(2, 0, 1)" if first else "transpose(1, 2, 0)"
        raise ImageReadError(f"{what}; wanted {wanted}{f': give image.{turn}' if turned else ''}")
    if 0 in shape:
        raise ImageReadError(f"{what}, which holds no pixel")


def _of_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    """The pixels of a tensor with channels first as an array with channels last. Raises ImageReadError."""
    _check_shape(tuple(tensor.shape), first=True)
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy has no bfloat16
    pixels: NDArray[Any] = tensor.numpy(force=True)
    return pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)


def _in_range(pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels of a kind that a TIFF can hold; floats in [0, 1]. Raises ImageReadError."""
    kind = pixels.dtype.kind
    if kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if kind not in "uif":
        raise ImageReadError(f"an array of {pixels.dtype}; wanted uint8, uint16 or floats in [0, 1]")
    low, high = pixels.min(), pixels.max()
    if kind == "f":
        if not np.isfinite(low) or not np.isfinite(high):
            raise ImageReadError("pixel values that are not finite")
        if low < -SLACK or high > 1 + SLACK:
            raise ImageReadError(
                f"floats from {low:.4g} to {high:.4g}; wanted [0, 1], before any normalisation by mean and deviation, "
                "or uint8"
            )
        return pixels.clip(0, 1).astype(np.float32)
    if pixels.dtype == np.uint8:
        return pixels
    for dtype in (np.uint16, np.int32, np.uint32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return pixels.astype(dtype)
    raise ImageReadError(f"whole numbers from {low} to {high}; wanted at most 32 bits")


def _as_tiff(pixels: NDArray[Any]) -> bytes:
    """An uncompressed TIFF of grey (H, W), grey, RGB or RGB with transparency (H, W, N), of a whole or float type."""
    height, width = pixels.shape[:2]
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    data = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")).tobytes()
    head = b"II*\0\0\0\0\0"
    entries = {
        256: [width],
        257: [height],
        258: [8 * pixels.dtype.itemsize] * samples,
        259: [1],  # not compressed
        262: [2 if samples > 1 else 1],  # RGB, or grey with black at 0
        273: [len(head)],  # where the one strip begins
        277: [samples],
        278: [height],
        279: [len(data)],
        339: [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * samples,
    }
    if samples == 4:
        entries[338] = [2]  # transparency that colours are not multiplied by
    return with_directory(io.BytesIO(head + data), b"II", entries)


# --- items ----------------------------------------------------------------------------------------------------------


def _opened(item: Any) -> BinaryIO:
    """An image in memory, or where one is named, as the bytes of an image file. Raises ImageReadError."""
    if isinstance(item, tuple) and item:  # an image and its label, which is not looked at
        item = item[0]
    if isinstance(item, Mapping):
        if {"bytes", "path"} >= set(item):  # how Hugging Face stores an image
            item = item.get("bytes") or item.get("path")
        else:
            item = next((item[key] for key in IMAGE_KEYS if key in item), item)
    if isinstance(item, HeldImage):
        return open_regular(item)
    if isinstance(item, str | os.PathLike):
        return open_regular(Path(item))
    if isinstance(item, bytes | bytearray):
        if not item:
            raise ImageReadError("empty file")
        return io.BytesIO(item)
    if isinstance(item, Image.Image):
        return io.BytesIO(_bytes_of(item))
    if isinstance(item, torch.Tensor):
        return io.BytesIO(_as_tiff(_in_range(_of_tensor(item))))
    if isinstance(item, np.ndarray) or hasattr(item, "__array__"):
        pixels = np.asarray(item)
        _check_shape(pixels.shape, first=False)
        return io.BytesIO(_as_tiff(_in_range(pixels)))
    raise ImageReadError(f"{_article(item)}, which is no image")


def _bytes_of(image: Image.Image) -> bytes:
    """The bytes of a file with the same pixels: its own where it is not loaded yet. Raises ImageReadError."""
    # Its own file, because loading would leave the pixels of every image in the caller's memory.
    if isinstance(image, ImageFile.ImageFile) and image.tile:
        if image.fp is None or image.fp.closed:
            raise ImageReadError("an image of Pillow that was closed before its pixels were read")
        try:
            if image.tell() == 0:
                place = image.fp.tell()
                image.fp.seek(0)
                data: bytes = image.fp.read()
                image.fp.seek(place)
                return data
        except (OSError, ValueError) as error:
            raise ImageReadError(reason_of(error)) from error
    try:
        image.load()
        if not image.mode.startswith(("I", "F")):
            image_of_eight_bits = image.convert("RGBA" if image.has_transparency_data else "RGB")
            turn = UPRIGHT.get(orientation(image))
            return _as_tiff(np.asarray(image_of_eight_bits if turn is None else image_of_eight_bits.transpose(turn)))
        turn = UPRIGHT.get(orientation(image))
        return _as_tiff(np.asarray(image if turn is None else image.transpose(turn)))
    except ImageReadError:
        raise
    except Exception as error:  # Pillow raises nearly anything
        raise ImageReadError(reason_of(error)) from error


def _article(thing: object) -> str:
    name = type(thing).__name__
    return "None" if thing is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


# --- Hugging Face datasets ------------------------------------------------------------------------------------------


def images_of_rows(rows: Any, *, called: str = "") -> Sequence[ImagePath]:
    """The image column of a Hugging Face dataset, as the bytes of its files. Raises ImageInputError.

    Row 3 of the split train is called ``train/3``, or with another prefix if ``called`` is given. A streamed dataset is
    consumed, and its files are kept.
    """
    if isinstance(rows, Mapping):
        raise ImageInputError(
            f"Found a dataset with the splits {', '.join(rows)}. Give one of them, as images['train']."
        )
    called = called or (f"{rows.split}/" if getattr(rows, "split", None) else "image ")
    if rows.features is None:  # a streamed dataset that does not know its columns
        return HeldImages(_consumed(rows), called=called)
    name = _image_column(rows.features)
    files = rows.with_format(None).select_columns([name])
    files = files.cast_column(name, replace(rows.features[name], decode=False))
    if hasattr(files, "__len__"):
        if not len(files):
            raise ImageInputError("The dataset has no rows. Give one that has.")
        return HeldImages(_Column(files, name), called=called)
    return HeldImages([row[name] for row in files], called=called)


def _image_column(features: Mapping[str, Any]) -> str:
    """The column of images. Raises ImageInputError where there is none, or several and none is called as usual."""
    names = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    usual = [name for name in IMAGE_KEYS if name in names]
    if len(names) == 1 or usual:
        return (usual or names)[0]
    if names:
        raise ImageInputError(
            f"The dataset has {len(names)} columns of images: {', '.join(names)}. Give it with one of them, as "
            f"dataset.select_columns(['{names[0]}'])."
        )
    listed = first_few(features, len(features), 10)
    raise ImageInputError(
        f"The dataset has no column of images; its columns are {listed}. Say which one holds them: "
        "dataset.cast_column(NAME, datasets.Image())."
    )


class _Column:
    """One column of a dataset, a row at a time."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index][self._name]
