"""A trainer's checkpoint, taken up by a fresh trainer: as if there had been no interruption.

Parameters, state and options of the groups, bit for bit; with torch's AdamW as a control.
"""

from functools import partial

import pytest
import torch
from snapshot import snapshot
from torch.nn import Linear, Module, Sequential, Tanh
from torch.optim.lr_scheduler import LinearLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from adamem_fused import AMSGD, AMAdamW

pytestmark = pytest.mark.integrations

# Steps before and after; as many batches of 4 are an epoch.
HALF = 3
# With these beta leaves its cap within a few steps.
OPTIMIZERS = {
    "AMAdamW-tensor": partial(AMAdamW, lr=0.1, memory_plane="anchored"),
    "AMAdamW-row": partial(AMAdamW, lr=0.1, memory_plane="anchored", beta_scope="row"),
    "AMSGD-global": partial(AMSGD, lr=10.0, memory_plane="anchored"),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
}


class Model(Module):
    """Gives the loss as its first result, as HF Trainer has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = Sequential(Linear(16, 20), Tanh(), Linear(20, 16), Tanh(), Linear(16, 3))

    def forward(self, x):
        return (self.layers(x).sub(x.sin()[:, :3]).square().mean(),)


def rows():
    return torch.randn(4 * HALF, 16, generator=torch.Generator().manual_seed(0))


def decay(optimizer):
    return LinearLR(optimizer, 1.0, 0.5, total_iters=2 * HALF)


def with_accelerate(make, folder, resume):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Model()
    optimizer = make(model.parameters())
    model, optimizer, scheduler, batches = accelerator.prepare(
        model, optimizer, decay(optimizer), DataLoader(rows(), batch_size=4)
    )
    if resume:
        accelerator.load_state(folder)
    for epoch in (1,) if resume else (0, 1):
        for batch in batches:
            accelerator.backward(model(batch)[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if epoch == 0:
            accelerator.save_state(folder)
    return optimizer.optimizer


def hf_arguments(folder):
    return {
        "output_dir": folder,
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 2 * HALF,
        "save_steps": HALF,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
    }


def with_hf_trainer(make, folder, resume):
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        Model(),
        TrainingArguments(**hf_arguments(folder)),
        # Two epochs' rows in one: the checkpoint is in the middle of them.
        train_dataset=[{"x": row} for row in (*rows(), *rows())],
        optimizer_cls_and_kwargs=(make.func, make.keywords),
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{HALF}" if resume else None)
    return trainer.optimizer.optimizer


def with_peft_and_trl(make, folder, resume):
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.2,
        )
    )
    words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    tokens = torch.randint(32, (8 * HALF, 16), generator=torch.Generator().manual_seed(0))
    trainer = SFTTrainer(
        model,
        SFTConfig(**hf_arguments(folder), bf16=False),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="0", pad_token="0"
        ),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        optimizer_cls_and_kwargs=(make.func, make.keywords),
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{HALF}" if resume else None)
    return trainer.optimizer.optimizer


def with_lightning(make, folder, resume, automatic):
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()
            self.automatic_optimization = automatic

        def configure_optimizers(self):
            optimizer = make(self.parameters())
            return [optimizer], [{"scheduler": decay(optimizer), "interval": "step"}]

        def training_step(self, batch, index):
            loss = self.model(batch)[0]
            if not automatic:
                self.manual_backward(loss)
                self.optimizers().step()
                self.optimizers().zero_grad()
                self.lr_schedulers().step()
            return loss

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = f"{folder}/epoch=0.ckpt" if resume else None
    trainer.fit(Lit(), DataLoader(rows(), batch_size=4), ckpt_path=checkpoint)
    return trainer.optimizers[0]


def with_timm(make, folder, resume):
    from timm.models import resume_checkpoint
    from timm.optim import OptimInfo, OptimizerRegistry
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver

    registry = OptimizerRegistry()
    registry.register(OptimInfo(name="made", opt_class=make, has_eps=False))
    model = Model()
    optimizer = registry.create_optimizer(model, "made", weight_decay=0.1)
    first = 0
    if resume:
        first = resume_checkpoint(model, f"{folder}/checkpoint-0.pth.tar", optimizer)
    scheduler = CosineLRScheduler(optimizer, t_initial=2)
    scheduler.step(first)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=folder, recovery_dir=folder)
    for epoch in range(first, 2):
        for batch in DataLoader(rows(), batch_size=4):
            model(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        if not resume:
            saver.save_checkpoint(epoch)
        scheduler.step(epoch + 1)
    return optimizer


TRAINERS = {
    "accelerate": with_accelerate,
    "HF Trainer": with_hf_trainer,
    "PEFT and TRL": with_peft_and_trl,
    "Lightning": partial(with_lightning, automatic=True),
    "Lightning, manual": partial(with_lightning, automatic=False),
    "timm": with_timm,
}


@pytest.fixture
def betas():
    """The smallest beta of each step, of optimizers that have one."""
    found = []

    def read(optimizer, args, kwargs):
        if isinstance(optimizer, (AMAdamW, AMSGD)):
            found.append(optimizer.metrics()["beta_min"].item())

    handle = register_optimizer_step_post_hook(read)
    yield found
    handle.remove()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_resumed_training_is_as_one_without_interruption(trainer, name, tmp_path, betas):
    train, make = TRAINERS[trainer], OPTIMIZERS[name]
    whole = train(make, str(tmp_path), resume=False)
    betas.clear()
    resumed = train(make, str(tmp_path), resume=True)
    assert snapshot(resumed) == snapshot(whole)
    assert {state["step"].item() for state in resumed.state.values()} == {2 * HALF}
    if make.func is not torch.optim.AdamW:
        assert len(betas) == HALF
        assert min(betas) < 0.85, f"beta says nothing here: {betas}"
