"""The operators through torch's dispatch: instruction sets, compile, export, opcheck."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    LOW_PRECISION,
    OPTIMIZERS,
    Group,
    assert_lockstep,
    assert_same_bits,
    copy_state,
    make_optimizer,
    parameters,
    set_gradients,
    ulp,
)

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason=str(cpu.ops.unavailable)
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ---- instruction sets: each in a process of its own, which runs the check_* below ---


def machine_has(capability):
    if capability == "avx2":
        return torch.cpu._is_avx2_supported()
    return capability == "default" or torch.cpu._is_avx512_supported()


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_an_instruction_set_agrees(capability):
    if not machine_has(capability):
        pytest.skip(f"this machine has no {capability}")
    child = subprocess.run(
        [sys.executable, "-c", f"import test_dispatch; test_dispatch.check_all({capability!r})"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]


def check_all(capability):
    assert torch.backends.cpu.get_cpu_capability().lower() == capability
    check_agreement()
    check_special_values()
    check_rounding()


def check_agreement():
    for cls in OPTIMIZERS:
        for dtype in DTYPES:
            groups = [Group([(), (0,), (9,), (17,), (1041,), (40_000,)], dtype)]
            twins = [
                make_optimizer(cls, groups, backend, weight_decay=0.1)
                for backend in ("reference", "cpu")
            ]
            assert_lockstep(*twins, steps=8)


def check_special_values():
    """Denormals, the largest float16, infinities and NaN go where they go in the reference."""
    special = [0.0, -0.0, 1e-40, 6e-8, -6e-8, 65504.0, float("inf"), -float("inf"), float("nan")]
    for cls in OPTIMIZERS:
        for dtype in DTYPES:
            # Each value in a tensor of its own, among others that it must not touch at first.
            groups = [Group([(21,)] * len(special), dtype)]
            reference, ours = (
                make_optimizer(cls, groups, backend, beta_scope="tensor")
                for backend in ("reference", "cpu")
            )
            for step in range(3):
                set_gradients(reference, ours, step=step)
                if step == 1:
                    for param, value in zip(parameters(reference), special, strict=True):
                        param.grad[[3, 20]] = value  # in a whole pack, and in the rest
                copy_state(reference, ours)
                reference.step()
                ours.step()
                for param, expected in zip(parameters(ours), parameters(reference), strict=True):
                    assert_same_special_values(param, expected)
                    for name, value in reference.state[expected].items():
                        assert_same_special_values(ours.state[param][name], value)


def assert_same_special_values(actual, expected):
    assert torch.equal(actual.isnan(), expected.isnan()), (actual, expected)
    assert torch.equal(actual.isposinf(), expected.isposinf()), (actual, expected)
    assert torch.equal(actual.isneginf(), expected.isneginf()), (actual, expected)
    finite = expected.isfinite()
    actual, expected = actual[finite].detach(), expected[finite].detach()
    if expected.numel():
        allowed = 1e-5 * expected.double().abs().max()
        if expected.dtype in LOW_PRECISION:
            allowed = allowed + ulp(expected)
        assert ((actual.double() - expected.double()).abs() <= allowed).all(), (actual, expected)


def check_rounding():
    """A first step of AM-SGD from x = 0 stores -lr g: every 16-bit g, rounded as torch rounds.

    The factors make ties to even in both directions (0.5 for subnormals, one and a half of an
    ulp's neighbours for the others), overflow at the largest float16, and the general case.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in LOW_PRECISION:
        half_ulp = torch.finfo(dtype).eps / 2
        limits = (65519 / 65504, 65520 / 65504, 2.0)
        for lr in (1.0, 0.5, 0.25, 0.3, 1e-3, 1 + half_ulp, 1 + 3 * half_ulp, *limits):
            param = torch.zeros(every.numel(), dtype=dtype, requires_grad=True)
            param.grad = every.view(dtype).clone()
            AMSGD([param], lr=lr, backend="cpu").step()
            exact = 0.0 - torch.tensor(lr, dtype=torch.float32) * param.grad.float()
            expected = exact.to(dtype)
            same = (param == expected) | (param.isnan() & expected.isnan())
            assert same.all(), (dtype, lr, param.grad[~same], param[~same], expected[~same])


def test_avx2_and_avx512_give_the_same_bits(tmp_path):
    if not machine_has("avx512"):
        pytest.skip("this machine has no avx512")
    results = []
    for capability in ("avx2", "avx512"):
        path = tmp_path / f"{capability}.pt"
        code = f"import test_dispatch; test_dispatch.save_a_run({str(path)!r})"
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parent, check=True
        )
        results.append(torch.load(path))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def save_a_run(path):
    tensors = []
    for cls in OPTIMIZERS:
        for dtype in DTYPES:
            groups = [Group([(9,), (1041,), (40_000,)], dtype)]
            optimizer = make_optimizer(cls, groups, "cpu", weight_decay=0.1)
            for step in range(8):
                set_gradients(optimizer, step=step)
                optimizer.step()
            tensors += [param.detach() for param in parameters(optimizer)]
    torch.save(tensors, path)


# ---- compile, export, opcheck -----------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_step(cls, scope, compiler):
    torch._dynamo.reset()
    compiled, plain = (
        make_optimizer(cls, [Group([(4, 5), (3,)])], "cpu", beta_scope=scope) for _ in range(2)
    )

    @torch.compile(fullgraph=True, backend=compiler)
    def step():
        compiled.step()

    for i in range(4):
        set_gradients(compiled, plain, step=i)
        step()
        plain.step()
        assert_same_bits(compiled, plain)


@pytest.mark.parametrize("cls", [AMAdamW, pytest.param(AMSGD, marks=pytest.mark.thorough)])
def test_a_compiled_foreach_step_follows_the_learning_rate(cls):
    """torch 2.13's default compiler keeps a number of an earlier step where it divides."""
    torch._dynamo.reset()
    compiled, plain = (make_optimizer(cls, [Group([(4, 5), (3,)])], "foreach") for _ in range(2))
    step = torch.compile(compiled.step, fullgraph=True)
    for i, lr in enumerate((1e-3, 0.95e-3, 0.9e-3, 0.85e-3)):
        set_gradients(compiled, plain, step=i)
        for optimizer in (compiled, plain):
            optimizer.param_groups[0]["lr"] = lr
        step()
        plain.step()
        for ours, expected in zip(parameters(compiled), parameters(plain), strict=True):
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(compiled.state[ours], plain.state[expected])
            assert compiled.state[ours]["prev_lr"].item() == pytest.approx(lr)


def operator_arguments(cls):
    """Of begin, as the optimizer gives them in its third step; copies."""
    optimizer = make_optimizer(cls, [Group([(4, 5), ()]), Group([(3,)])], "cpu")
    for step in range(2):
        set_gradients(optimizer, step=step)
        optimizer.step()
    (work,) = optimizer._collect()
    lists = [[t.detach().clone() for t in tensors] for tensors in work.batch.lists()]
    return (*lists, *cpu._arguments(work.batch, None, None)[len(lists) :])


OPERATORS = [(AMAdamW, "adamw", "adamw_begin_"), (AMSGD, "sgd", "sgd_begin")]


@pytest.mark.parametrize("cls, kind, begin", OPERATORS)
def test_the_operators_pass_opcheck(cls, kind, begin):
    operators = torch.ops.adamem_fused
    arguments = operator_arguments(cls)
    torch.library.opcheck(getattr(operators, begin).default, arguments)
    for rows in (None, getattr(operators, begin)(*operator_arguments(cls))):
        torch.library.opcheck(getattr(operators, f"{kind}_finish_").default, (*arguments, rows))


@pytest.mark.parametrize("cls, kind, begin", OPERATORS)
def test_the_operators_export(cls, kind, begin):
    arguments = operator_arguments(cls)
    operator = getattr(torch.ops.adamem_fused, begin)
    tensors, options = arguments[:-7], arguments[-7:]

    class Begin(torch.nn.Module):
        def forward(self, *tensors):
            return operator(*tensors, *options)

    program = torch.export.export(Begin(), tensors)
    rows = program.module()(*(list(map(torch.clone, ts)) for ts in tensors))
    assert torch.equal(rows, operator(*arguments))
