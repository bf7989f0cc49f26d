"""Make `fashion.npz`, the part of Fashion-MNIST that ships with the package, from Debian's `dataset-fashion-mnist`.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python tests/make_fashion.py unpacked/usr/share/datasets/fashion-mnist

Balanced over the ten classes: 6,000 pictures for training and 4,000 for choosing, both from the official training set
and
disjoint, and 5,000 for testing from the official test set. Which ones is fixed by one seeded permutation.
"""
import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

CLASSES = 10
OUT = Path(__file__).parents[1]/"repopt"/"assets"/"data"/"fashion.npz"
# of the arrays, in the order of their names
SHA256 = "441deab73a56ca666ef9b423f18b7f447d042208ad5088db9b40c79578c957d4"


def idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of bytes: two zero bytes, the type 8, the number of dimensions, their sizes, the
    data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of bytes: it begins with {raw[:4]!r}")
    shape = np.frombuffer(raw, ">u4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4*raw[3]).reshape(shape)


def balanced(labels: np.ndarray, *counts: int) -> list:
    """Disjoint sets of indices, `counts` pictures in each, the same number of every class, in shuffled order."""
    order = np.random.RandomState(0).permutation(len(labels))
    by_class = [order[labels[order] == c] for c in range(CLASSES)]
    edges = np.cumsum([0, *counts])//CLASSES
    chosen = [np.concatenate([c[a:b] for c in by_class]) for a, b in zip(edges, edges[1:])]
    return [order[np.isin(order, c)] for c in chosen]


def digest(arrays: dict) -> str:
    """sha256 of names, shapes and bytes."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        h.update(f"{name}{arrays[name].shape}".encode() + arrays[name].tobytes())
    return h.hexdigest()


def main(source: str) -> None:
    (x, y), (tx, ty) = ((idx(Path(source)/f"{part}-images-idx3-ubyte.gz"),
                         idx(Path(source)/f"{part}-labels-idx1-ubyte.gz"))
                        for part in ("train", "t10k"))
    train, choose = balanced(y, 6000, 4000)
    test, = balanced(ty, 5000)
    arrays = {}
    for name, images, labels, i in (("train", x, y, train), ("choose", x, y, choose), ("test", tx, ty, test)):
        arrays |= {f"{name}_images": images[i], f"{name}_labels": labels[i]}
    if digest(arrays) != SHA256:
        raise SystemExit(f"these pictures have the sha256 {digest(arrays)}, expected {SHA256}: another edition of the "
                         f"data set")
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
