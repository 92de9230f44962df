"""The data: all of it comes with Python or with packages, and nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from bench.demo_text import HELD_OUT_FILES, TRAINING_FILES, read_text, standard_library

HELD_OUT_EVERY = 5  # one example, or topic of the documentation, in five is held out
SPLIT_SEED = 0  # one split for all seeds of a run


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits: [1797, 1, 8, 8] float32 in [0, 1], and labels of 10 classes."""
    # Not above: tasks of text are to run without scikit-learn.
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)
    return images.unsqueeze(1), torch.tensor(data.target)


@cache
def breast_cancer() -> tuple[Tensor, Tensor]:
    """Cell measurements: [569, 30] float64, standardised, and labels of 2 classes."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    features = torch.tensor(data.data, dtype=torch.float64)
    return (features - features.mean(0)) / features.std(0), torch.tensor(data.target)


# Where Debian's package dataset-fashion-mnist has it, 60,000 and 10,000 images of clothes.
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"


def fashion_mnist_folder() -> Path:
    """Where the files are.

    Raises:
        RuntimeError: they are neither in Debian's folder nor in that of the environment variable
            FASHION_MNIST.
    """
    folder = Path(os.environ.get("FASHION_MNIST", FASHION_MNIST))
    if not folder.is_dir():
        raise RuntimeError(
            "Fashion-MNIST is not here: install Debian's package dataset-fashion-mnist, or name "
            "the folder that has its four files in the environment variable FASHION_MNIST"
        )
    return folder


@cache
def fashion_mnist() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test part, each [images, 1, 28, 28] float32 in [0, 1], and their labels.

    Raises:
        RuntimeError: the files are not there, as `fashion_mnist_folder` has it.
    """
    folder = fashion_mnist_folder()
    training, tests = (
        (
            _idx(folder / f"{part}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28) / 255.0,
            _idx(folder / f"{part}-labels-idx1-ubyte.gz", 8).long(),
        )
        for part in ("train", "t10k")
    )
    return training, tests


def _idx(path: Path, header: int) -> Tensor:
    """The bytes of a file in MNIST's format, after a header of so many, uint8."""
    return torch.frombuffer(
        bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8
    )


def split(count: int) -> tuple[Tensor, Tensor]:
    """Indices of the training examples and of the held-out ones, the same at every call."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = count // HELD_OUT_EVERY
    return order[held_out:], order[:held_out]


@cache
def python_source() -> tuple[bytes, bytes]:
    """Training and held-out text: source files of the standard library, as in the demo."""
    folder = standard_library()
    return read_text(TRAINING_FILES, folder).content, read_text(HELD_OUT_FILES, folder).content


@cache
def documentation() -> tuple[bytes, bytes]:
    """Training and held-out text: the topics of Python's own help(), English prose mostly.

    Many paragraphs stand under several topics. Those of the held-out topics are left out of
    the training text.
    """
    names = sorted(topics)
    held_out = _paragraphs(names[::HELD_OUT_EVERY])
    others = _paragraphs(name for i, name in enumerate(names) if i % HELD_OUT_EVERY)
    training = [text for words, text in others.items() if words not in held_out]
    return "\n\n".join(training).encode(), "\n\n".join(held_out.values()).encode()


def _paragraphs(names: Iterable[str]) -> dict[str, str]:
    """The topics' paragraphs, each once, by their words: indentation differs by topic."""
    texts = (text for name in names for text in topics[name].split("\n\n"))
    return {" ".join(text.split()): text for text in texts}


def text_digests() -> dict[str, str]:
    """SHA-256 of each text: another Python version has others, and so other numbers."""
    return {
        name: hashlib.sha256(b"".join(parts)).hexdigest()
        for name, parts in (
            ("python_source", python_source()),
            ("documentation", documentation()),
        )
    }
