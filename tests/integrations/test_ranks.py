"""The examples for many ranks, memory and compiled steps, and resuming of DDP and FSDP2."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import OPTIMIZERS, bits
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn import GELU, Linear, Sequential
from torch.nn.parallel import DistributedDataParallel

from adamem_fused import AMSGD, AMAdamW

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(*command):
    """What an example of this folder prints, run as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- FSDP2: a checkpoint on another number of ranks ----------------------------------------


def fsdp2(ranks, *arguments):
    """The losses that it prints, by step."""
    printed = run(*TORCHRUN, ranks, "examples/fsdp2.py", *arguments)
    return {int(k): float(v) for k, v in re.findall(r"step (\d+)  loss ([\d.]+)", printed)}


def content(checkpoint, path):
    """All that a distributed checkpoint holds, whole."""
    dcp_to_torch_save(checkpoint, path)
    return torch.load(path, weights_only=True)


def assert_same(ours, theirs, where=()):
    """Bit for bit, and value for value what is no tensor."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name, value in ours.items():
            assert_same(value, theirs[name], (*where, name))
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(bits(ours), bits(theirs)), where
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def after_20_steps(tmp_path_factory):
    """A checkpoint of two ranks."""
    path = tmp_path_factory.mktemp("fsdp2") / "checkpoint"
    fsdp2(2, "--steps", 20, "--save", path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The losses of 40 steps on two ranks, and a checkpoint after them."""
    path = tmp_path_factory.mktemp("fsdp2") / "checkpoint"
    return fsdp2(2, "--save", path), path


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_what_another_number_of_ranks_loads_is_what_was_saved(state_dtype, tmp_path):
    """Bit for bit: no step is taken between loading and saving."""
    options = ["--steps", 20, *(["--state-dtype", state_dtype] if state_dtype else [])]
    fsdp2(2, *options, "--save", tmp_path / "2")
    saved = content(tmp_path / "2", tmp_path / "2.pt")
    names = {name for state in saved["optimizer"]["state"].values() for name in state}
    assert ("exp_avg_codes" in names) == (state_dtype is not None)
    for ranks in ("1", "3"):
        losses = fsdp2(ranks, *options, "--resume", tmp_path / "2", "--save", tmp_path / ranks)
        assert losses == {}
        assert_same(content(tmp_path / ranks, tmp_path / f"{ranks}.pt"), saved)


def test_as_many_ranks_go_on_with_the_bits_of_an_uninterrupted_run(
    after_20_steps, uninterrupted, tmp_path
):
    losses, checkpoint = uninterrupted
    resumed = fsdp2(2, "--resume", after_20_steps, "--save", tmp_path / "resumed")
    assert resumed == {step: losses[step] for step in (25, 30, 35, 40)}
    ours = content(tmp_path / "resumed", tmp_path / "ours.pt")
    assert_same(ours, content(checkpoint, tmp_path / "theirs.pt"))


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_numbers_of_ranks_go_on_with_the_same_losses(after_20_steps, uninterrupted, ranks):
    """Their gradients are sums of other parts of a batch, and so differ in their last bits."""
    losses, _ = uninterrupted
    resumed = fsdp2(ranks, "--resume", after_20_steps)
    expected = {step: losses[step] for step in (25, 30, 35, 40)}
    assert resumed == pytest.approx(expected, rel=0, abs=2e-5)


# ---- DDP -----------------------------------------------------------------------------------


def ddp(cls, scope):
    torch.manual_seed(0)
    model = DistributedDataParallel(Sequential(Linear(16, 64), GELU(), Linear(64, 64)))
    options = {"beta_scope": scope, "max_grad_norm": 1.0, "state_dtype": "int8"}
    # With these learning rates beta leaves its cap within a few steps.
    lr = {AMAdamW: 0.1, AMSGD: 2.0}[cls]
    optimizer = cls(model.parameters(), lr=lr, memory_plane="anchored", **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        x = torch.randn(8, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.sin().repeat(1, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def content_of(run):
    return copy.deepcopy({type(part).__name__: part.state_dict() for part in run})


def ddp_resumes(cls, scope, path):
    uninterrupted = ddp(cls, scope)
    train(*uninterrupted, range(4))
    if dist.get_rank() == 0:
        torch.save(content_of(uninterrupted), path)
    dist.barrier()
    train(*uninterrupted, range(4, 8))

    resumed = ddp(cls, scope)
    saved = torch.load(path, weights_only=True)
    for part in resumed:
        part.load_state_dict(saved[type(part).__name__])
    train(*resumed, range(4, 8))
    ours, theirs = content_of(resumed), content_of(uninterrupted)
    assert_same(ours, theirs)
    others = [None, None]
    dist.all_gather_object(others, ours)
    assert_same(others[0], others[1])
    states = ours[cls.__name__]["state"].values()
    assert any(f"{cls.memories[0]}_codes" in state for state in states)
    betas = torch.cat([state["beta"].reshape(-1) for state in states])
    assert ((betas > 0) & (betas < 0.88)).any()


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_ddp_resumes_bit_for_bit(two_ranks, cls, scope, tmp_path):
    """What rank 0 has saved, loaded on each; state in few bits, a scheduler and clipping too."""
    two_ranks.run(ddp_resumes, cls, scope, tmp_path / "checkpoint.pt")


# ---- the examples of one process -----------------------------------------------------------


def test_gradient_release():
    printed = run(sys.executable, "examples/gradient_release.py")
    rows = re.findall(r"([\d,]+) bytes of gradients, ([\d,]+) without .*the same bits", printed)
    one, two = ([int(number.replace(",", "")) for number in row] for row in rows)
    assert 20 * one[0] < one[1]
    assert two[0] == two[1] == one[1]


def test_cpu_offload():
    printed = run(sys.executable, "examples/cpu_offload.py")
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < first / 5
    assert "parameters on cpu, gradients on cpu, state on cpu" in printed


def test_a_compiled_step_is_the_ordinary_one():
    printed = run(sys.executable, "examples/compiled.py")
    assert "compiled step: loss" in printed
    assert set(re.findall(r"differ by at most (\S+)", printed)) == {"0.0e+00"}
