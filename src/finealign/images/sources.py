"""What can be given as images, wherever images are wanted: files by any name, images in memory, datasets."""

import os
from collections.abc import Sequence
from pathlib import Path

from finealign.errors import ImageInputError, display_path
from finealign.images.datasets_by_name import is_dataset, open_dataset
from finealign.images.held import Images, held_images, images_of_rows
from finealign.images.listing import list_images
from finealign.images.paths import PathList
from finealign.types import HeldImage, ImagePath


def find_images(source: Images, *, exclude: Sequence[str] = ()) -> Sequence[ImagePath]:
    """The images that ``source`` names or holds, in its order. Each may still turn out to be unreadable.

    ``source`` is one of:

    - what ``list_images`` lists: a folder, an image file, a shard, a ``.txt`` or ``.csv`` list, or a sequence of paths;
    - ``hf:NAME:SPLIT`` or a folder that ``Dataset.save_to_disk`` has written: the image column of a Hugging Face
      dataset, whose images are called ``train/0`` and so on. It needs the extra ``datasets``;
    - an image in memory: a PIL image, an array (H, W, 3), (H, W, 1), (H, W, 4) or (H, W), a tensor with channels first,
      or the bytes of a file; arrays and tensors of one dimension more are a batch;
    - several of these or of paths, in order: a list, a generator, a Hugging Face or a PyTorch dataset. Of a tuple, as
      ``(image, label)``, the first is the image, and nothing else is looked at. A generator is consumed and its items
      are kept; a dataset is asked for an image when it is read. What is no path is called ``image 0`` and so on.

    Arrays and tensors are uint8, whole numbers of more bits, which ``data.white_value`` scales as those of files, or
    floats in [0, 1]. Others are set aside, and so is what is no image. ``exclude`` is as for ``list_images``.

    Raises:
        ImageInputError: ``source`` does not exist, holds no image, or is not one of the above.
    """
    if isinstance(source, PathList):
        return list_images(source)
    if isinstance(source, HeldImage) or not isinstance(source, str | os.PathLike):
        images = held_images(source)
        return list(images) if all(isinstance(image, Path) for image in images) else images
    named = source if isinstance(source, str) else Path(source)
    if not is_dataset(named):
        return list_images(named, exclude=exclude)
    if exclude:
        raise ImageInputError(
            f"'{display_path(source)}' is a dataset, of which no file can be excluded by name. Filter it, or leave out "
            "--exclude (data.exclude)."
        )
    rows, split = open_dataset(named)
    return images_of_rows(rows, called=f"{split}/")
