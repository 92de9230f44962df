"""Trainers whose schemes flatten or split parameters are refused; their DDP and FSDP2 are not."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import OPTIMIZERS, relative_error
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Linear, Module, Sequential, Tanh

from adamem_fused import AMSGD, AMAdamW

pytestmark = pytest.mark.integrations

STEPS = 6
# Beta leaves its cap with these within a few steps. No decay: HF Trainer gives biases none.
OPTIONS = {
    cls: {"memory_plane": "anchored", "weight_decay": 0.0, "lr": lr}
    for cls, lr in ((AMAdamW, 0.1), (AMSGD, 2.0))
}
CASES = [(cls, scope) for cls in OPTIMIZERS for scope in ("tensor", "row", "global")]


@pytest.fixture
def two_ranks():
    # New ones for each test: trainers keep what they have set up for a whole process.
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


class Model(Module):
    """Gives the loss as its first result, as HF Trainer has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = Sequential(Linear(16, 20), Tanh(), Linear(20, 16), Tanh(), Linear(16, 3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layers(x).sub(x.sin()[:, :3]).square().mean(),)


def rows() -> Tensor:
    """Two ranks take half of these each, in every step."""
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(rows(), batch_size=4)


def make(cls, params, scope):
    return cls(params, beta_scope=scope, **OPTIONS[cls])


def part() -> Tensor:
    return rows()[dist.get_rank() :: dist.get_world_size()]


def set_up(deepspeed: bool = False) -> None:
    """What torchrun tells trainers."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if deepspeed:
        os.environ.update(DS_ACCELERATOR="cpu")
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo, and nothing to compile


@contextlib.contextmanager
def nothing_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*(flat|betas?)\b")
        yield


def whole(model: Module) -> Iterator[Tensor]:
    for param in model.parameters():
        yield param.full_tensor() if isinstance(param, DTensor) else param.detach()


def assert_as_in_one_process(model: Module, cls, scope) -> None:
    expected = Model()
    optimizer = make(cls, expected.parameters(), scope)
    betas = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        expected(rows())[0].backward()
        optimizer.step()
        betas += [b for s in optimizer.state.values() for b in s["beta"].reshape(-1).tolist()]
    assert any(0 < beta < 0.88 for beta in betas), f"beta says nothing here: {betas}"
    pairs = zip(whole(model), expected.parameters(), strict=True)
    errors = [relative_error(ours, theirs.detach()) for ours, theirs in pairs]
    # The gradients' sums are in another order. Betas of flat pieces are 0.01 and more off.
    assert max(errors) <= 5e-5, f"{cls.__name__} {scope}: {errors}"


# ---- DeepSpeed --------------------------------------------------------------------


def deepspeed_config(stage, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def train_with_deepspeed(cls, scope, config):
    import deepspeed

    model = Model()
    optimizer = make(cls, model.parameters(), scope)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(STEPS):
        engine.backward(engine(part().to(next(engine.parameters()).dtype))[0])
        engine.step()
    return model


def refuses_deepspeed(config):
    set_up(deepspeed=True)
    for cls, scope in CASES:
        with pytest.raises(RuntimeError, match=r"^DeepSpeed's ZeRO .* Use FSDP2"):
            train_with_deepspeed(cls, scope, config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_zero_is_refused(two_ranks, stage):
    two_ranks.run(refuses_deepspeed, deepspeed_config(stage))


def test_deepspeeds_flat_master_parameters_are_refused(two_ranks):
    two_ranks.run(refuses_deepspeed, deepspeed_config(1, bf16={"enabled": True}))


def takes_deepspeed():
    set_up(deepspeed=True)
    for cls, scope in CASES:
        model = train_with_deepspeed(cls, scope, deepspeed_config(0))
        assert_as_in_one_process(model, cls, scope)


def test_deepspeed_without_zero_takes_the_steps_of_one_process(two_ranks):
    two_ranks.run(takes_deepspeed)


def takes_deepspeed_alone():
    set_up(deepspeed=True)
    for cls in OPTIMIZERS:
        config = deepspeed_config(2, train_micro_batch_size_per_gpu=8)
        with pytest.raises(RuntimeError, match=r"^DeepSpeed's ZeRO .* one beta"):
            train_with_deepspeed(cls, "tensor", config)
        with pytest.warns(UserWarning, match="only if each step has all of it"):
            model = train_with_deepspeed(cls, "global", config)
        assert_as_in_one_process(model, cls, "global")


def test_deepspeeds_zero_of_one_rank_is_right_for_one_beta_and_warns():
    ranks = Ranks(1)
    try:
        ranks.run(takes_deepspeed_alone)
    finally:
        ranks.stop()


# ---- accelerate -------------------------------------------------------------------


def train_with_accelerate(cls, scope, deepspeed=None, fsdp=None):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=deepspeed is None, deepspeed_plugin=deepspeed)
    if fsdp is not None:  # accelerate leaves it out on a CPU
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state._shared_state["fsdp_plugin"] = fsdp
        accelerator.state._shared_state["device"] = torch.device("cpu")
    model = Model()
    optimizer = make(cls, model.parameters(), scope)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for _ in range(STEPS):
        for batch in batches:
            accelerator.backward(model(batch)[0])
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def fsdp_plugin(version, **options):
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(fsdp_version=version, **options)


def refuses_accelerate(stage):
    set_up(deepspeed=True)
    from accelerate import DeepSpeedPlugin

    for cls, scope in CASES:
        with pytest.raises(RuntimeError, match=r"^DeepSpeed's ZeRO .* Use FSDP2"):
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(stage))
            train_with_accelerate(cls, scope, deepspeed=plugin)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_through_accelerate_is_refused(two_ranks, stage):
    two_ranks.run(refuses_accelerate, stage)


def refuses_fsdp1_of_accelerate():
    set_up()
    for cls, scope in CASES:
        with pytest.raises(RuntimeError, match=r"^FSDP1 .* Use FSDP2"):
            train_with_accelerate(cls, scope, fsdp=fsdp_plugin(1, use_orig_params=True))


def test_fsdp1_through_accelerate_is_refused(two_ranks):
    two_ranks.run(refuses_fsdp1_of_accelerate)


def takes_accelerate(version):
    set_up()
    for cls, scope in CASES:
        with nothing_said():
            fsdp = fsdp_plugin(version) if version else None
            model = train_with_accelerate(cls, scope, fsdp=fsdp)
        assert_as_in_one_process(model, cls, scope)


@pytest.mark.parametrize("version", [None, 2], ids=["ddp", "fsdp2"])
def test_accelerate_takes_the_steps_of_one_process(two_ranks, version):
    two_ranks.run(takes_accelerate, version)


# ---- HF Trainer -------------------------------------------------------------------


def train_with_trainer(cls, scope, folder, **arguments):
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    model = Model()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            use_cpu="deepspeed" not in arguments,
            per_device_train_batch_size=4,
            max_steps=STEPS,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=[{"x": row} for row in rows()],
        optimizer_cls_and_kwargs=(cls, {**OPTIONS[cls], "beta_scope": scope}),
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model_wrapped)


def refuses_trainer(folder, arguments, match):
    set_up("deepspeed" in arguments)
    for cls, scope in CASES:
        with pytest.raises(RuntimeError, match=match):
            train_with_trainer(cls, scope, folder, **arguments)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_through_hf_trainer_is_refused(two_ranks, tmp_path, stage):
    config = deepspeed_config(stage)
    two_ranks.run(
        refuses_trainer, str(tmp_path), {"deepspeed": config}, "^DeepSpeed's ZeRO .* Use FSDP2"
    )


def takes_trainer(folder):
    set_up()
    for cls, scope in CASES:
        with nothing_said():
            model = train_with_trainer(cls, scope, folder)
        assert_as_in_one_process(model, cls, scope)


def test_hf_trainer_takes_the_steps_of_one_process(two_ranks, tmp_path):
    two_ranks.run(takes_trainer, str(tmp_path))


# ---- Lightning --------------------------------------------------------------------


def train_with_lightning(make_optimizer, **options):
    from lightning import LightningModule, Trainer

    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def training_step(self, batch, index):
            return self.model(batch)[0]

        def configure_optimizers(self):
            return make_optimizer(self.parameters())

    model = Lit()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, loader())
    return model.model


def takes_lightning():
    set_up()
    for cls, scope in CASES:
        with nothing_said():
            model = train_with_lightning(partial(make, cls, scope=scope), devices=2, strategy="ddp")
        assert_as_in_one_process(model, cls, scope)


def test_lightning_takes_the_steps_of_one_process(two_ranks):
    two_ranks.run(takes_lightning)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_clips_under_mixed_precision_unless_the_step_is_to_unscale(cls, precision):
    """As with torch's AdamW: fused=True asks for a step that unscales, which rules it out."""
    options = {"precision": precision, "gradient_clip_val": 0.5}
    model = train_with_lightning(partial(cls, lr=0.01), **options)
    assert all(param.isfinite().all() for param in model.parameters())
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        train_with_lightning(partial(cls, lr=0.01, fused=True), **options)


# ---- torchao ----------------------------------------------------------------------


@pytest.fixture
def offload(monkeypatch):
    """torchao's CPUOffloadOptimizer, with a CPU in the place of the GPU that it needs."""
    from torchao.optim import cpu_offload

    class Stream:
        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

        def record_event(self):
            return self

    empty_like = torch.empty_like
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, pin_memory=False, **more: empty_like(*args, **more)
    )
    return cpu_offload.CPUOffloadOptimizer


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_torchaos_cpu_offload_is_refused_one_beta_for_the_model(offload, cls):
    options = {**OPTIONS[cls], "minimal_size": 0}
    with pytest.raises(RuntimeError, match=r"^torchao's CPUOffloadOptimizer .*\"tensor\""):
        offload(Model().parameters(), cls, beta_scope="global", **options)
    model = Model()
    optimizer = offload(model.parameters(), cls, beta_scope="tensor", **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(rows())[0].backward()
        optimizer.step()
    assert_as_in_one_process(model, cls, "tensor")
