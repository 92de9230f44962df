"""What `make wheel-test` runs with each environment's own Python, far from the sources.

    python -I steps.py --save FOLDER --load FOLDER ...

Prints what it has found, and on its last line, as JSON, a digest of all bits of the cpu backend.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

import adamem_fused
from adamem_fused import backends
from adamem_fused.backends import ops

SHAPES = [(33, 40), (7,), (5, 3, 16), (), (300, 70), (20_001,)]
CASES = {
    f"{cls}-{dtype}-{scope}": (cls, dtype, {"beta_scope": scope})
    for cls, dtype, scope in itertools.product(
        ("AMAdamW", "AMSGD"), ("float32", "bfloat16"), ("tensor", "row")
    )
}
CASES["AMAdamW-int8"] = (
    "AMAdamW",
    "bfloat16",
    {"state_dtype": "int8", "stochastic_rounding": True},
)
STEPS, MORE = 3, 3


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Alike in all torches, as random ones need not be."""
    size = torch.Size(shape).numel()
    whole = torch.arange(size, dtype=torch.int64) * (2 * seed + 7919) % 4093 - 2046
    return (whole.to(torch.float64) / 2048).reshape(shape).to(dtype)


class Run:
    """Parameters and their optimizer."""

    def __init__(self, case: str, backend: str | None):
        cls, dtype, options = CASES[case]
        self.dtype = getattr(torch, dtype)
        self.params = [
            torch.nn.Parameter(numbers(shape, i, self.dtype)) for i, shape in enumerate(SHAPES)
        ]
        self.optimizer = getattr(adamem_fused, cls)(
            self.params, lr=0.01, backend=backend, weight_decay=0.1, **options
        )
        self.step = 0

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            for i, param in enumerate(self.params):
                param.grad = numbers(SHAPES[i], 100 * self.step + i, self.dtype)
            self.optimizer.step()

    def digest(self) -> str:
        tensors = [param.detach() for param in self.params]
        for param in self.params:
            state = self.optimizer.state[param]
            tensors += [state[key] for key in sorted(state) if isinstance(state[key], Tensor)]
        everything = hashlib.sha256()
        for tensor in tensors:
            everything.update(bytes(tensor.reshape(-1).contiguous().view(torch.uint8).tolist()))
        return everything.hexdigest()[:16]

    def save(self, path: Path) -> None:
        params = [param.detach() for param in self.params]
        torch.save(
            {"params": params, "optimizer": self.optimizer.state_dict(), "step": self.step}, path
        )

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for param, value in zip(self.params, saved["params"], strict=True):
            param.data.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]


def check_others(case: str, cpu: Run, names: list[str]) -> None:
    """The other backends round in other places, and so have other bits."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[cpu.dtype]
    for name in names:
        if not backends.BACKENDS[name].packs and "state_dtype" in CASES[case][2]:
            continue
        run = Run(case, name)
        run.go_on(STEPS)
        for mine, others in zip(run.params, cpu.params, strict=True):
            torch.testing.assert_close(mine, others, rtol=tolerance, atol=tolerance)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path, nargs="*", default=[])
    parser.add_argument("--backends", nargs="*", default=[])
    options = parser.parse_args()
    assert "site-packages" in adamem_fused.__file__, adamem_fused.__file__
    digests = {}
    for case in CASES:
        run = Run(case, "cpu")
        run.go_on(STEPS)
        check_others(case, run, options.backends)
        if options.save is not None:
            run.save(options.save / f"{case}.pt")
        run.go_on(MORE)
        digests[case] = run.digest()
        for folder in options.load:
            other = Run(case, "cpu")
            other.load(folder / f"{case}.pt")
            assert other.step == STEPS
            other.go_on(MORE)
            assert other.digest() == digests[case], f"{case}, saved in {folder.name}, goes on other"
    chosen = backends.choose(run.optimizer.param_groups[0], torch.device("cpu")).name
    print(json.dumps({"glue": ops.extension is not None, "chosen": chosen, "digests": digests}))


if __name__ == "__main__":
    main()
