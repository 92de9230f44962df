"""A few small steps of the cuda backend, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m bench.gpu_sanitize

All of its kernels and dtypes, aligned and not, tensors of one chunk and of several.
"""

from __future__ import annotations

import torch

from adamem_fused import AMSGD, AMAdamW


def main() -> None:
    for cls in (AMAdamW, AMSGD):
        for scope in ("tensor", "global"):
            base = [
                torch.randn(5000, device="cuda").to(dtype)
                for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            ]
            params = [
                part.clone() if aligned else part
                for whole in base
                for part, aligned in ((whole, True), (whole[1:3000], False), (whole[:7], True))
            ]
            for param in params:
                param.requires_grad_()
            optimizer = cls(params, lr=0.01, backend="cuda", beta_scope=scope)
            for _ in range(2):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
