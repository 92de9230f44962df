"""Lightning: automatic and manual optimization in mixed precision, with clipping in the step.

    python examples/lightning_module.py

A small network learns the classes that another one with random weights gives to random points.
"""

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adamem_fused import AMAdamW, param_groups

EPOCHS = 4


def network(width):
    return nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 10))


class Automatic(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network(128)

    def configure_optimizers(self):
        # fused=True: under 16-mixed the step unscales by itself, and clips what it has unscaled.
        # Lightning's own gradient_clip_val refuses that, so it stays None.
        groups = param_groups(self, weight_decay=0.01)
        optimizer = AMAdamW(groups, lr=1e-2, fused=True, max_grad_norm=1.0, skip_nonfinite=True)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * 64)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, index):
        x, target = batch
        loss = nn.functional.cross_entropy(self.model(x), target)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        # The wrapper that self.optimizers() gives does not know the gradients' norm.
        metrics = self.optimizers(use_pl_optimizer=False).metrics()
        self.log("beta_mean", metrics["beta_mean"])
        self.print(
            f"{type(self).__name__}, epoch {self.current_epoch}: "
            f"loss {self.trainer.callback_metrics['loss']:.3f}, "
            f"mean beta {metrics['beta_mean']:.3f}, at the cap {metrics['at_cap']:.0%}"
        )


class Manual(Automatic):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        optimizer = self.optimizers()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()


torch.manual_seed(0)
points = torch.randn(4096, 32)
with torch.no_grad():
    classes = network(16)(5 * points).argmax(1)
batches = DataLoader(TensorDataset(points, classes), batch_size=64, shuffle=True)

for module in (Automatic(), Manual()):
    trainer = Trainer(
        max_epochs=EPOCHS,
        devices=1,
        # float16 needs a GPU; on a CPU Lightning would take bfloat16 in its place.
        precision="16-mixed" if torch.cuda.is_available() else "bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
