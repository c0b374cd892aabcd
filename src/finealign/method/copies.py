"""Find near-copies among images by their features, so that a folder of copies is not taken for many images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

# Distances here are half of squared ones, which is 1 - cosine for unit vectors, and shares of the ``_reach`` of the
# images. Measured on real photos: of the same file less than SAME; of photos at least as large as the backbone's input,
# scaled or saved anew as a fine JPEG, 0.002; of smaller ones or coarse JPEGs, 0.01 to 0.3, where no rule can tell
# copies from similar photos, which lie beyond 0.02. Photos without features, as of open water, are as near to one
# another as copies are, from 0.0002 on, but among them distances of all sizes occur; hence GAP.
SAME = 1e-6
LEVELS = (1e-4, 1e-3, 1e-2)
GAP = 5.0  # how many times further the next image must be. At least 4, see ``_label``
WINDOW = 20_000
CELLS = 1 << 22  # most distances held at a time, which bounds the memory
SAMPLE = 1000  # images by which the reach is measured
NO_REACH = 1e-9  # a reach that is rounding alone


def copies(weak: Floats) -> Ints:
    """The group of each image, (n,): images that are copies of one another share a group, all others are alone.

    Groups are numbered from 0 in the order of their first image, so ``np.bincount(groups)[groups]`` is how many copies
    there are of each image, itself included. ``weak`` is (n, D), the L2-normalised features of the whole images.

    Images with the same features are copies. So are images that are much nearer to each other than to any other image:
    all those within one of LEVELS, if no other is within GAP times that. Crops, mirrored and much compressed copies are
    mostly further apart and do not count, nor does a cloud of similar images with no gap around it, such as the frames
    of a film. The rule would rather miss copies than take different images for copies.

    Images are sorted along the direction in which they differ most, where copies lie close together, and each is
    compared with the WINDOW next ones. Up to WINDOW images, these are all pairs. Beyond, time grows with n and not with
    its square, so that it stays small beside the time of encoding the images on the same processor. Memory is a few
    times that of the features, and some ten times CELLS numbers.

    Raises ValueError where ``weak`` is not (n, D) or not finite.
    """
    if weak.ndim != 2:
        raise ValueError(f"features of shape {weak.shape}, not (n, D)")
    count = len(weak)
    if count < 2:
        return np.zeros(count, dtype=np.int64)
    # Less their mean, because rounding is then small beside the differences, however narrow the cone of the features.
    points: Floats32 = weak.astype(np.float32) - weak.mean(axis=0, dtype=np.float64).astype(np.float32)
    if not np.isfinite(points).all():
        raise ValueError("features must be finite")
    reach = _reach(points)
    if reach < NO_REACH:
        return np.zeros(count, dtype=np.int64)
    _, directions = np.linalg.eigh((points.T @ points).astype(np.float64))
    order = np.argsort(points @ directions[:, -1].astype(np.float32), kind="stable")
    label = np.empty(count, dtype=np.int64)
    label[order] = _label(points[order], reach)
    _, first, groups = np.unique(label, return_index=True, return_inverse=True)
    by_first: Ints = np.argsort(np.argsort(first))
    return by_first[groups]


def _reach(points: Floats32) -> float:
    """The 0.99 quantile of half the squared distances between images, by an even sample of them.

    Copies hardly change it while they are less than nine in ten images.
    """
    sample = points[np.linspace(0, len(points) - 1, min(len(points), SAMPLE)).astype(int)]
    return float(np.quantile(_distances(sample, sample)[np.triu_indices(len(sample), 1)], 0.99))


def _label(points: Floats32, reach: float) -> Ints:
    """A number for each image, (n,), which copies share. ``points`` (n, D) are in an order that keeps copies together.

    An image has copies at a level if as many images are within GAP times the level as are within the level. Two such
    images that are within the level of each other have the same neighbours, hence the same first one: what is within
    the level of one is within 4 times the level of the other, by the triangle inequality.
    """
    count = len(points)
    levels = [reach * level for level in (SAME, *LEVELS)]
    within = np.zeros((2, len(levels), count), dtype=np.int64)  # images within each level, and within GAP times it
    first = np.tile(np.arange(count), (len(levels), 1))  # the first image within each level
    rows = max(1, CELLS // min(count, WINDOW))
    for start in range(0, count, rows):
        stop, end = min(start + rows, count), min(start + rows + WINDOW, count)
        distances = _distances(points[start:stop], points[start:end])
        distances[np.tril_indices(stop - start)] = np.inf  # each pair once
        row, column = np.nonzero(distances <= GAP * max(levels))
        distance = distances[row, column]
        for index, level in enumerate(levels):
            for which, limit in enumerate((level, GAP * level)):
                close = distance <= limit
                for ends in (row[close], column[close]):
                    within[which, index, start:end] += np.bincount(ends, minlength=end - start)
            close = distance <= level
            np.minimum.at(first[index], start + column[close], start + row[close])
    label: Ints = first[0][first[0]]
    for index in range(1, len(levels)):  # a wider level includes a narrower one
        apart = (within[0, index] > 0) & (within[0, index] == within[1, index])
        label[apart] = index * count + first[index, apart]
    return label


def _distances(some: Floats32, others: Floats32) -> Floats32:
    """Half the squared distances between rows: (n, D) and (m, D) to (n, m)."""
    halves = [np.einsum("nd,nd->n", rows, rows) / 2 for rows in (some, others)]
    distances = some @ others.T
    np.subtract(halves[0][:, None] + halves[1], distances, out=distances)
    return distances
