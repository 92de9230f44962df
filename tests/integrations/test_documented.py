"""What docs/trainers.md says of trainers, by the code that it has."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import Linear

from adamem_fused import AMSGD, AMAdamW

pytestmark = pytest.mark.integrations

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()


def of_the_page(name):
    """What the Python block that has this name calls by it."""
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if name in b]
    names = {}
    exec(block, names)
    return names[name]


class Model(Linear):
    def forward(self, x):
        return (super().forward(x).square().mean(),)


def hf_trainer(trainer_class, optimizer, folder, callbacks=None):
    from transformers import TrainingArguments

    torch.manual_seed(0)
    return trainer_class(
        Model(16, 4),
        TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=4,
            logging_steps=1,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"x": row} for row in torch.randn(32, 16)],
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )


def test_hf_trainers_log_takes_beta_and_a_callback_comes_too_late(tmp_path):
    from transformers import TrainerCallback

    class TooLate(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logs["late"] = 1.0

    options = {"lr": 0.1, "memory_plane": "anchored", "max_grad_norm": 1.0}
    trainer = hf_trainer(of_the_page("BetaTrainer"), (AMAdamW, options), tmp_path, [TooLate()])
    trainer.train()
    *steps, summary = trainer.state.log_history
    assert len(steps) == 4
    assert all(0 <= entry["beta_min"] <= 0.89 for entry in steps)
    assert len({entry["beta_mean"] for entry in steps}) > 1
    assert "beta_mean" not in summary
    assert not any("late" in entry for entry in trainer.state.log_history)


def test_hf_trainer_takes_a_checkpoint_of_adamw_with_a_new_cap(tmp_path):
    from transformers import Trainer

    hf_trainer(Trainer, (torch.optim.AdamW, {"lr": 0.1}), tmp_path).train()
    for callbacks, betas in (None, (0.9, 0.999)), ([of_the_page("NewCap")()], (0.89, 0.999)):
        trainer = hf_trainer(Trainer, (AMAdamW, {"lr": 0.1}), tmp_path, callbacks)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        optimizer = trainer.optimizer.optimizer
        assert all(group["betas"] == betas for group in optimizer.param_groups)
        for state in optimizer.state.values():
            assert state["step"] == 4
            # Two steps of AdamW, and two of its own.
            assert 0 < state["beta_prod"] <= 0.81 * betas[0] ** 2 + 1e-6


def test_hf_trainer_takes_what_is_no_class_for_a_factory(tmp_path):
    from transformers import Trainer

    trainer = hf_trainer(Trainer, (partial(AMAdamW, lr=0.1), {}), tmp_path)
    with pytest.raises(TypeError, match="params"):
        trainer.train()


def test_lightnings_wrapper_lacks_the_norm():
    from lightning import LightningModule, Trainer

    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model(16, 4)

        def configure_optimizers(self):
            return AMAdamW(self.parameters(), max_grad_norm=1.0)

        def training_step(self, batch, index):
            return self.model(batch)[0]

        def on_train_epoch_end(self):
            wrapper, optimizer = self.optimizers(), self.optimizers(use_pl_optimizer=False)
            assert wrapper.grad_norm is None and "grad_norm" not in wrapper.metrics()
            assert optimizer.grad_norm > 0 and "grad_norm" in optimizer.metrics()
            self.was_here = True

    module = Lit()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4))
    assert module.was_here


def test_timm_takes_registered_names():
    from timm.optim import create_optimizer_v2

    of_the_page("default_registry")
    for name, cls in (("amadamw", AMAdamW), ("amsgd", AMSGD)):
        optimizer = create_optimizer_v2(Linear(4, 2), name, lr=0.1, max_grad_norm=1.0)
        assert type(optimizer) is cls and optimizer.max_grad_norm == 1.0
