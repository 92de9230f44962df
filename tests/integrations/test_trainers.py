"""Trainers whose schemes flatten or split parameters are refused; their DDP and FSDP2 are not.

What they clip the optimizer clips by max_grad_norm, and docs/trainers.md has how a scheduler
sees a skipped step.
"""

import contextlib
import itertools
import math
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
from torch.optim.lr_scheduler import LambdaLR

from adamem_fused import AMSGD, AMAdamW

pytestmark = pytest.mark.integrations

STEPS = 6
# The gradients' sums, or the norm's, are in another order; these steps enlarge what comes of it.
TOLERANCE = 5e-5
# Beta leaves its cap with these within a few steps. No decay: HF Trainer gives biases none.
OPTIONS = {
    cls: {"memory_plane": "anchored", "weight_decay": 0.0, "lr": lr}
    for cls, lr in ((AMAdamW, 0.1), (AMSGD, 2.0))
}
CASES = [(cls, scope) for cls in OPTIMIZERS for scope in ("tensor", "row", "global")]
FLAT_CASES = [(cls, scope) for cls in OPTIMIZERS for scope in ("tensor", "row")]


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


def loader(batch_size: int = 4) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(rows(), batch_size=batch_size)


def make(cls, params, scope, **options):
    return cls(params, beta_scope=scope, **OPTIONS[cls], **options)


class OfTakenSteps:
    """As in docs/trainers.md: a scheduler stands still where a step was skipped."""

    def step(self, *args):
        norm = self.optimizer.grad_norm
        is_first = not hasattr(self, "_last_lr")
        if is_first or norm is None or norm.isfinite():
            super().step(*args)


class Decay(LambdaLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, lambda step: 0.9**step)


class DecayOfTakenSteps(OfTakenSteps, Decay):
    pass


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
    # Betas of flat pieces are 0.01 and more off.
    assert max(errors) <= TOLERANCE, f"{cls.__name__} {scope}: {errors}"


# Below the gradients' norm in the first steps, above it in later ones.
MAX_NORM = 0.3


def assert_clipped_alike(actual: Module, expected: Module) -> None:
    pairs = zip(whole(actual), whole(expected), strict=True)
    errors = [relative_error(ours, theirs) for ours, theirs in pairs]
    assert max(errors) <= TOLERANCE, errors


# ---- DeepSpeed --------------------------------------------------------------------


def deepspeed_config(stage, zero=None, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def initialize_deepspeed(cls, scope, config):
    import deepspeed

    model = Model()
    groups = [list(model.parameters())]
    if scope != "global":  # stages 1 and 2 step one after the other
        groups = [[p for p in groups[0] if p.dim() == dim] for dim in (2, 1)]
    optimizer = make(cls, [{"params": params} for params in groups], scope)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train_deepspeed(engine, steps=STEPS, x=None):
    x = part() if x is None else x
    for _ in range(steps):
        engine.backward(engine(x.to(next(engine.parameters()).dtype))[0])
        engine.step()


def train_with_deepspeed(cls, scope, config):
    engine = initialize_deepspeed(cls, scope, config)
    train_deepspeed(engine)
    return engine.module


def refuses_zero3(train):
    """Its stage 3 for every scope, and all for one beta a model."""
    set_up(deepspeed=True)
    for cls, scope in CASES:
        with pytest.raises(RuntimeError, match=r"^DeepSpeed's ZeRO .* Use FSDP2"):
            train(cls, scope, deepspeed_config(3))
    for cls in OPTIMIZERS:
        for stage in (1, 2):
            with pytest.raises(RuntimeError, match=r'^beta_scope="global" .*"tensor" or "row"'):
                train(cls, "global", deepspeed_config(stage))


def test_deepspeeds_zero3_is_refused(two_ranks):
    two_ranks.run(refuses_zero3, train_with_deepspeed)


def takes_deepspeed(config, cases):
    set_up(deepspeed=True)
    for cls, scope in cases:
        with nothing_said():
            model = train_with_deepspeed(cls, scope, config)
        assert_as_in_one_process(model, cls, scope)


def test_deepspeed_without_zero_takes_the_steps_of_one_process(two_ranks):
    two_ranks.run(takes_deepspeed, deepspeed_config(0), CASES)


@pytest.mark.parametrize("more", [{}, {"round_robin_gradients": True}], ids=["", "round-robin"])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_zero_takes_the_steps_of_one_process(two_ranks, stage, more):
    two_ranks.run(takes_deepspeed, deepspeed_config(stage, zero=more), FLAT_CASES)


def takes_deepspeeds_masters(config, wrapper):
    """All ranks have the same batch: nothing is rounded but what one process rounds."""
    set_up(deepspeed=True)
    for cls, scope in FLAT_CASES:
        engine = initialize_deepspeed(cls, scope, config)
        assert type(engine.optimizer).__name__ == wrapper
        train_deepspeed(engine, x=rows())
        model = Model().to(torch.bfloat16)
        masters = [param.detach().float() for param in model.parameters()]
        optimizer = make(cls, masters, scope)
        for _ in range(STEPS):
            model.zero_grad()
            model(rows().to(torch.bfloat16))[0].backward()
            for master, param in zip(masters, model.parameters(), strict=True):
                master.grad = param.grad.float()
            optimizer.step()
            for master, param in zip(masters, model.parameters(), strict=True):
                param.data.copy_(master)
        for ours, theirs in zip(engine.module.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("stage", "more", "wrapper"),
    [
        (1, {}, "DeepSpeedZeroOptimizer"),
        (2, {}, "DeepSpeedZeroOptimizer"),
        (1, {"data_types": {"grad_accum_dtype": "fp32"}}, "BF16_Optimizer"),
    ],
    ids=["1", "2", "bf16_optimizer"],
)
def test_deepspeeds_float32_masters_take_the_steps_of_one_process(two_ranks, stage, more, wrapper):
    config = deepspeed_config(stage, bf16={"enabled": True}, **more)
    two_ranks.run(takes_deepspeeds_masters, config, wrapper)


def resumes_deepspeed(folder, stage):
    set_up(deepspeed=True)
    for cls, scope in FLAT_CASES:
        config = deepspeed_config(stage)
        engine = initialize_deepspeed(cls, scope, config)
        train_deepspeed(engine, 3)
        engine.save_checkpoint(folder, tag=f"{cls.__name__}-{scope}")
        train_deepspeed(engine, 3)
        resumed = initialize_deepspeed(cls, scope, config)
        resumed.load_checkpoint(folder, tag=f"{cls.__name__}-{scope}")
        train_deepspeed(resumed, 3)
        pairs = zip(resumed.module.parameters(), engine.module.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        states = (e.optimizer.optimizer.state_dict()["state"] for e in (resumed, engine))
        torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_of_deepspeeds_zero_goes_on_with_the_same_bits(two_ranks, tmp_path, stage):
    two_ranks.run(resumes_deepspeed, str(tmp_path), stage)


def takes_deepspeed_alone():
    set_up(deepspeed=True)
    for cls in OPTIMIZERS:
        config = deepspeed_config(2, train_micro_batch_size_per_gpu=8)
        for scope in ("tensor", "row"):
            assert_as_in_one_process(train_with_deepspeed(cls, scope, config), cls, scope)
        with pytest.warns(UserWarning, match="only if each step has all of it"):
            model = train_with_deepspeed(cls, "global", config)
        assert_as_in_one_process(model, cls, "global")


def test_deepspeeds_zero_of_one_rank_is_right_and_warns_of_one_beta():
    ranks = Ranks(1)
    try:
        ranks.run(takes_deepspeed_alone)
    finally:
        ranks.stop()


# ---- accelerate -------------------------------------------------------------------


def train_with_accelerate(cls, scope, deepspeed=None, fsdp=None, clip=None, scaler=None, **options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=deepspeed is None, deepspeed_plugin=deepspeed)
    if fsdp is not None:  # accelerate leaves it out on a CPU
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state._shared_state["fsdp_plugin"] = fsdp
        accelerator.state._shared_state["device"] = torch.device("cpu")
    accelerator.scaler = scaler  # accelerate makes one for GPUs alone
    model = Model()
    optimizer = make(cls, model.parameters(), scope, **options)
    # With DeepSpeed on a CPU accelerate takes each rank for the only one, so each has all rows.
    data = loader(8 if deepspeed else 4)
    model, optimizer, batches = accelerator.prepare(model, optimizer, data)
    for _ in range(STEPS):
        for batch in batches:
            accelerator.backward(model(batch)[0])
            if clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def fsdp_plugin(version, **options):
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(fsdp_version=version, **options)


def train_with_accelerates_deepspeed(cls, scope, config):
    from accelerate import DeepSpeedPlugin

    return train_with_accelerate(cls, scope, deepspeed=DeepSpeedPlugin(hf_ds_config=config))


def test_zero3_through_accelerate_is_refused(two_ranks):
    two_ranks.run(refuses_zero3, train_with_accelerates_deepspeed)


def takes_accelerates_deepspeed(stage):
    set_up(deepspeed=True)
    for cls, scope in FLAT_CASES:
        with nothing_said():
            config = deepspeed_config(stage, train_micro_batch_size_per_gpu=8)
            model = train_with_accelerates_deepspeed(cls, scope, config)
        assert_as_in_one_process(model, cls, scope)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_through_accelerate_takes_the_steps_of_one_process(two_ranks, stage):
    two_ranks.run(takes_accelerates_deepspeed, stage)


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


def clips_as_accelerate(version):
    set_up()

    def train(cls, scope, **options):
        fsdp = fsdp_plugin(version) if version else None
        return train_with_accelerate(cls, scope, fsdp=fsdp, **options)

    for cls, scope in CASES:
        theirs = train(cls, scope, clip=MAX_NORM)
        assert_clipped_alike(train(cls, scope, max_grad_norm=MAX_NORM), theirs)
        # The step unscales, where accelerate's clipping lets the scaler do it.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        ours = train(cls, scope, scaler=scaler, fused=True, max_grad_norm=MAX_NORM)
        assert_clipped_alike(ours, theirs)


@pytest.mark.parametrize("version", [None, 2], ids=["ddp", "fsdp2"])
def test_max_grad_norm_clips_as_accelerate_does(two_ranks, version):
    two_ranks.run(clips_as_accelerate, version)


def skipped_step_with_accelerate(schedule, scaler, **options):
    """Whether accelerate has seen that a step was skipped; and how often the lr has gone down."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    model = Model()
    optimizer = AMAdamW(model.parameters(), **options)
    scheduler = schedule(optimizer)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    seen = []
    for bad in (False, True, False):
        accelerator.backward(model(rows())[0])
        if bad:
            next(model.parameters()).grad.fill_(math.inf)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seen.append(accelerator.optimizer_step_was_skipped)
    # A scheduler has a step for each rank.
    return seen, scheduler.scheduler.last_epoch // accelerator.num_processes


def shows_skipped_steps():
    set_up()
    new_scaler = partial(torch.amp.GradScaler, "cpu")
    # The scaler decides, and accelerate sees that.
    seen, decays = skipped_step_with_accelerate(Decay, new_scaler())
    assert seen == [False, True, False] and decays == 2
    # The step decides, as torch's fused ones do.
    seen, decays = skipped_step_with_accelerate(Decay, new_scaler(), fused=True)
    assert seen == [False] * 3 and decays == 3
    for options in (
        {"scaler": new_scaler(), "fused": True, "max_grad_norm": 1.0},
        {"scaler": new_scaler(), "fused": True, "skip_nonfinite": True},
        {"scaler": new_scaler(), "max_grad_norm": 1.0},
        {"scaler": None, "skip_nonfinite": True},
    ):
        _, decays = skipped_step_with_accelerate(DecayOfTakenSteps, **options)
        assert decays == 2, options


def test_a_scheduler_of_accelerate_can_see_a_skipped_step(two_ranks):
    two_ranks.run(shows_skipped_steps)


# ---- HF Trainer -------------------------------------------------------------------


def training_arguments(folder, **arguments):
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    return TrainingArguments(
        **{
            "output_dir": folder,
            "use_cpu": "deepspeed" not in arguments,
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **arguments,
        }
    )


def train_with_trainer(cls, scope, folder, options=None, **arguments):
    from transformers import Trainer

    trainer = Trainer(
        Model(),
        training_arguments(folder, **arguments),
        train_dataset=[{"x": row} for row in rows()],
        optimizer_cls_and_kwargs=(cls, {**OPTIONS[cls], "beta_scope": scope, **(options or {})}),
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model_wrapped)


def train_with_trainers_deepspeed(cls, scope, config, folder):
    return train_with_trainer(cls, scope, folder, deepspeed=config)


def test_zero3_through_hf_trainer_is_refused(two_ranks, tmp_path):
    two_ranks.run(refuses_zero3, partial(train_with_trainers_deepspeed, folder=str(tmp_path)))


def takes_trainer(folder, cases, **arguments):
    set_up("deepspeed" in arguments)
    for cls, scope in cases:
        with nothing_said():
            model = train_with_trainer(cls, scope, folder, **arguments)
        assert_as_in_one_process(model, cls, scope)


def test_hf_trainer_takes_the_steps_of_one_process(two_ranks, tmp_path):
    two_ranks.run(takes_trainer, str(tmp_path), CASES)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_through_hf_trainer_takes_the_steps_of_one_process(two_ranks, tmp_path, stage):
    # As through accelerate: each rank has all rows.
    config = deepspeed_config(stage, train_micro_batch_size_per_gpu=8)
    train = partial(takes_trainer, deepspeed=config, per_device_train_batch_size=8)
    two_ranks.run(train, str(tmp_path), FLAT_CASES)


def clips_as_trainer(folder):
    set_up()
    for cls, scope in CASES:
        theirs = train_with_trainer(cls, scope, folder, max_grad_norm=MAX_NORM)
        ours = train_with_trainer(cls, scope, folder, {"max_grad_norm": MAX_NORM})
        assert_clipped_alike(ours, theirs)


def test_max_grad_norm_clips_as_hf_trainer_does(two_ranks, tmp_path):
    two_ranks.run(clips_as_trainer, str(tmp_path))


def logs_the_norm_of_the_step(folder):
    """As in docs/trainers.md: without a reading of all gradients for the log."""
    from transformers import Trainer

    set_up()

    class TrainerOfItsNorm(Trainer):
        def _get_grad_norm(self, model, grad_norm=None):
            return self.optimizer.optimizer.grad_norm

    logged = []
    for trainer_class in (Trainer, TrainerOfItsNorm):
        model = Model()
        optimizer = AMAdamW(model.parameters(), max_grad_norm=MAX_NORM)
        arguments = training_arguments(folder, logging_steps=1)
        dataset = [{"x": row} for row in rows()]
        trainer = trainer_class(
            model, arguments, train_dataset=dataset, optimizers=(optimizer, None)
        )
        trainer.train()
        logged.append([entry.get("grad_norm") for entry in trainer.state.log_history[:-1]])
    theirs, ours = logged
    assert math.isnan(ours[0])  # it is the last step's
    assert ours[1:] == pytest.approx(theirs[:-1], rel=1e-5)


def test_hf_trainer_can_log_the_norm_that_the_step_took(two_ranks, tmp_path):
    two_ranks.run(logs_the_norm_of_the_step, str(tmp_path))


def decays_with_trainer(folder, schedule, scaler=None, **options):
    from transformers import Trainer

    model = Model()
    backward = itertools.count()
    next(model.parameters()).register_hook(
        lambda grad: torch.full_like(grad, math.inf) if next(backward) == 1 else grad
    )
    optimizer = AMAdamW(model.parameters(), **options)
    trainer = Trainer(
        model,
        training_arguments(folder, max_steps=3),
        train_dataset=[{"x": row} for row in rows()],
        optimizers=(optimizer, schedule(optimizer)),
    )
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert all(param.isfinite().all() for param in whole(model))
    return trainer.lr_scheduler.last_epoch


def shows_trainers_schedulers_skipped_steps(folder):
    set_up()
    decays = partial(decays_with_trainer, folder)
    new_scaler = partial(torch.amp.GradScaler, "cpu")
    assert decays(Decay, new_scaler()) == 2
    assert decays(Decay, new_scaler(), fused=True) == 3
    assert decays(DecayOfTakenSteps, new_scaler(), fused=True, skip_nonfinite=True) == 2
    assert decays(DecayOfTakenSteps, skip_nonfinite=True) == 2


def test_a_scheduler_of_hf_trainer_can_see_a_skipped_step(two_ranks, tmp_path):
    two_ranks.run(shows_trainers_schedulers_skipped_steps, str(tmp_path))


# ---- Lightning --------------------------------------------------------------------


def train_with_lightning(make_optimizer, schedule=None, bad_batch=None, **options):
    from lightning import LightningModule, Trainer

    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def training_step(self, batch, index):
            return self.model(batch)[0]

        def on_after_backward(self):
            if self.global_step == bad_batch:
                next(self.parameters()).grad.fill_(math.inf)

        def configure_optimizers(self):
            optimizer = make_optimizer(self.parameters())
            if schedule is None:
                return optimizer
            self.schedule = schedule(optimizer)
            return [optimizer], [{"scheduler": self.schedule, "interval": "step"}]

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
    model.model.decays = None if schedule is None else model.schedule.last_epoch
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


def with_a_scaler():
    """Lightning's 16-mixed, which it makes bf16-mixed on a CPU, but for the rounding of float16."""
    from lightning.pytorch.plugins import MixedPrecision

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return contextlib.nullcontext()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [Scaled("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("precision", [dict, with_a_scaler], ids=["32", "16-mixed"])
def test_max_grad_norm_clips_as_lightning_does(cls, scope, precision):
    options = partial(make, cls, scope=scope)
    theirs = train_with_lightning(options, gradient_clip_val=MAX_NORM, **precision())
    for fused in (None, True):
        ours = train_with_lightning(
            partial(options, fused=fused, max_grad_norm=MAX_NORM), **precision()
        )
        assert_clipped_alike(ours, theirs)


@pytest.mark.parametrize(
    ("schedule", "precision", "options", "decays"),
    [
        # Lightning's schedulers see no skipped step, whoever decides.
        (Decay, with_a_scaler, {}, 12),
        (Decay, with_a_scaler, {"fused": True}, 12),
        (DecayOfTakenSteps, with_a_scaler, {"fused": True, "skip_nonfinite": True}, 11),
        (DecayOfTakenSteps, dict, {"skip_nonfinite": True}, 11),
    ],
    ids=["scaler", "fused", "fused-seen", "seen"],
)
def test_a_scheduler_of_lightning_can_see_a_skipped_step(schedule, precision, options, decays):
    model = train_with_lightning(partial(AMAdamW, **options), schedule, bad_batch=3, **precision())
    assert all(param.isfinite().all() for param in model.parameters())
    assert model.decays == decays


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
@pytest.mark.parametrize("minimal_size", [0, 100], ids=["all", "large"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_torchaos_cpu_offload_takes_the_steps_of_one_optimizer(offload, cls, minimal_size, scope):
    model, plain = Model(), Model()
    options = {**OPTIONS[cls], "beta_scope": scope}
    optimizer = offload(model.parameters(), cls, minimal_size=minimal_size, **options)
    expected = cls(plain.parameters(), **options)
    for _ in range(STEPS):
        for trained, stepped in ((model, optimizer), (plain, expected)):
            stepped.zero_grad()
            trained(rows())[0].backward()
            stepped.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_torchaos_cpu_offload_is_refused_what_is_of_the_model(offload, cls):
    options = {**OPTIONS[cls], "minimal_size": 0}
    with pytest.raises(RuntimeError, match=r"^torchao's CPUOffloadOptimizer .*\"tensor\""):
        offload(Model().parameters(), cls, beta_scope="global", **options)
    options["beta_scope"] = "tensor"
    for more in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(RuntimeError, match=r"^torchao's CPUOffloadOptimizer .* norm of that"):
            offload(Model().parameters(), cls, **more, **options)
    model = Model()
    optimizer = offload(model.parameters(), cls, **options)
    for part in optimizer.optim_dict.values():
        part.max_grad_norm = 1.0
    model(rows())[0].backward()
    with pytest.raises(RuntimeError, match=r"^torchao's CPUOffloadOptimizer .* norm of that"):
        optimizer.step()
