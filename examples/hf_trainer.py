"""Hugging Face's Trainer: the optimizer by its class, and beta in the trainer's own log.

    python examples/hf_trainer.py

A small Llama with random weights learns to predict the next byte of a file of Python's standard
library; a token is a byte, so there is no tokenizer.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from adamem_fused import AMAdamW

CONTEXT = 64


class BetaTrainer(Trainer):
    """Logs the optimizer's numbers beside the loss.

    Not a callback: by `on_log` the history and the loggers have what they log.
    """

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:  # a step's, not the summary at the end
            optimizer = self.optimizer.optimizer  # within accelerate's wrapper
            logs.update({name: number.item() for name, number in optimizer.metrics().items()})
        super().log(logs, *args, **kwargs)


text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
dataset = [{"input_ids": window, "labels": window} for window in text.split(CONTEXT)[:-1]]

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        max_steps=100,
        logging_steps=20,
        learning_rate=3e-3,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=0.0,  # the optimizer clips
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = BetaTrainer(
        model,
        arguments,
        train_dataset=dataset,
        # Of its arguments the Trainer passes on weight_decay alone, which biases and norms are
        # spared.
        optimizer_cls_and_kwargs=(AMAdamW, {"lr": arguments.learning_rate, "max_grad_norm": 1.0}),
    )
    trainer.train()
