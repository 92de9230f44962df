"""The corpus as tokens of a byte-level BPE as GPT-2's, which is trained on the training part."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bench.experiments.corpus import corpus

FOLDER = Path("build/tokens")
PIECE = 2**18  # bytes, up to the end of a line, that become tokens at a time


@dataclass(frozen=True)
class Tokens:
    """Text as tokens.

    Attributes:
        vocabulary: how many there are.
        training, choosing, comparing: the corpus's parts, [tokens] uint16.
        bytes_per_token: of `comparing`. A loss a token divided by it is one a byte.
        corpus: the corpus's digest.
        digest: SHA-256 of the three parts.
    """

    vocabulary: int
    training: Tensor
    choosing: Tensor
    comparing: Tensor
    bytes_per_token: float
    corpus: str
    digest: str

    @staticmethod
    def load(path: Path) -> Tokens:
        """Of a file that `save` wrote: the tokens stay there, and are read where they are used."""
        return Tokens(**torch.load(path, mmap=True, weights_only=True))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # another process may be at it too
        torch.save(vars(self), unfinished)
        unfinished.replace(path)


def digest(*parts: Tensor) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.numpy().tobytes())
    return found.hexdigest()


def tokenised(vocabulary: int) -> Tokens:
    """The corpus in tokens of so many kinds, at most 2**16, the same ones every time.

    They are kept on disk, by all that they depend on, and made where they are not there yet, which
    takes tokenizers and two minutes.
    """
    text = corpus()
    key = f"{text.digest()} {vocabulary} {version('tokenizers')}"
    path = FOLDER / f"{vocabulary}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        training, choosing, comparing = _tokenise(
            vocabulary, text.training, text.choosing, text.comparing
        )
        tokens = Tokens(
            vocabulary,
            training,
            choosing,
            comparing,
            bytes_per_token=len(text.comparing) / len(comparing),
            corpus=text.digest(),
            digest=digest(training, choosing, comparing),
        )
        tokens.save(path)
    return Tokens.load(path)


def _pieces(content: bytes) -> Iterator[str]:
    """The text, piece by piece. The few bytes that are not UTF-8 become U+FFFD."""
    start = 0
    while start < len(content):
        end = content.find(b"\n", start + PIECE) + 1 or len(content)
        yield content[start:end].decode(errors="replace")
        start = end


def _tokenise(vocabulary: int, *parts: bytes) -> list[Tensor]:
    """The parts in tokens that the first of them gives."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_pieces(parts[0]), trainer)
    return [
        torch.cat([torch.tensor(tokenizer.encode(piece).ids) for piece in _pieces(part)]).to(
            torch.uint16
        )
        for part in parts
    ]
