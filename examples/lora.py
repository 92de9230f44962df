"""LoRA: PEFT's adapters, trained by TRL's SFTTrainer.

    python examples/lora.py

A small Llama with random weights stands for a trained one, and a file of Python's standard library
for what it is tuned on; its tokenizer, in which a token is a byte, is made here.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from adamem_fused import AMAdamW

CONTEXT = 64

# In place of AutoTokenizer.from_pretrained and AutoModelForCausalLM.from_pretrained.
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>"])}
bytes_as_tokens = Tokenizer(models.BPE(vocabulary, merges=[]))
bytes_as_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bytes_as_tokens, eos_token="<end>", pad_token="<end>"
)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,  # the frozen head then has something to say
    )
)

text = Path(argparse.__file__).read_text()
texts = [text[i : i + CONTEXT - 1] for i in range(0, len(text), CONTEXT - 1)]


class BetaTrainer(SFTTrainer):
    """Logs the optimizer's numbers beside the loss, as in hf_trainer.py."""

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            metrics = self.optimizer.optimizer.metrics()
            logs.update({name: number.item() for name, number in metrics.items()})
        super().log(logs, *args, **kwargs)


with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=16,
        max_length=CONTEXT,
        max_steps=60,
        logging_steps=20,
        learning_rate=1e-2,
        max_grad_norm=0.0,  # the optimizer clips
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),  # TRL's default is True
    )
    trainer = BetaTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        optimizer_cls_and_kwargs=(AMAdamW, {"lr": arguments.learning_rate, "max_grad_norm": 1.0}),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
