"""The demo's models: small Llamas. The target is trained with next-token cross entropy; drafts have random weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

if TYPE_CHECKING:
    from pathlib import Path

    from _demo.corpus import Pair
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore import Store
    from logitstore.rows.shard import Shard

MAX_LENGTH = 256
"""Maximum number of tokens of a document in the store, and the length of the packed sequences that train the target."""
CONTEXT = 512
TARGET_BATCH = 2
"""Number of packed sequences per step. Within minutes on two cores, many small steps reach a lower loss than few large
steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The shape of a model."""

    name: str
    hidden_size: int
    num_layers: int
    intermediate_size: int


TARGET = Size(name="target", hidden_size=192, num_layers=4, intermediate_size=512)
DRAFTS = (
    Size(name="small", hidden_size=96, num_layers=2, intermediate_size=256),
    Size(name="tiny", hidden_size=48, num_layers=1, intermediate_size=96),
)


def save_new_model(size: Size, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> int:
    """Saves a model with random weights and the tokenizer, as an ordinary Hugging Face folder.

    Returns:
        Number of parameters of the model.
    """
    model = _new_model(size, tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def _new_model(size: Size, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            # The usual 0.02 suits models that are ten times as wide; with it these small models learn more slowly.
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_target(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, folder: Path, num_steps: int, logs: Path
) -> int:
    """Trains the target on whole functions, prompts included, and saves it with the tokenizer.

    Args:
        pairs: The functions.
        tokenizer: Tokenizer of the target and all drafts.
        folder: Folder for the model, in the Hugging Face format.
        num_steps: Number of steps, each with TARGET_BATCH packed sequences.
        logs: Folder for the output of Trainer, without its progress bar.

    Returns:
        Number of parameters of the target.
    """
    blocks = _packed(pairs, tokenizer)
    model = _new_model(TARGET, tokenizer, seed=0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=TARGET_BATCH,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, num_steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        processing_class=tokenizer,
    )
    with (logs / "target.txt").open("w") as log, contextlib.redirect_stdout(log):
        trainer.train()
    trainer.save_model()
    return model.num_parameters()


def _packed(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns the concatenated documents of the store, cut into blocks of equal length; int64 [blocks, MAX_LENGTH]."""
    prompts = tokenizer([pair.prompt for pair in pairs])["input_ids"]
    responses = tokenizer([pair.response for pair in pairs], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    documents = [prompt + response + end for prompt, response in zip(prompts, responses, strict=True)]
    tokens = np.concatenate([np.array(document, dtype=np.int64) for document in documents])
    num_blocks = len(tokens) // MAX_LENGTH
    return torch.from_numpy(tokens[: num_blocks * MAX_LENGTH].reshape(num_blocks, MAX_LENGTH))


def held_out_losses(train: Store, held_out: Store) -> dict[str, float]:
    """Compares the target with the unigram distribution of the training text, on held-out responses.

    Args:
        train: Store of the training text.
        held_out: Store of the held-out text.

    Returns:
        target_nll and unigram_nll: mean negative logprob of a response token, in nats, under the target and under the
        unigram distribution.
    """
    counts = np.ones(train.spec.tokenizer.vocab_size)
    for shard in train.shards(layers=("tokens",)):
        np.add.at(counts, _labels(shard), 1)
    unigram = -np.log(counts / counts.sum())
    target_nll, unigram_nll = [], []
    for shard in held_out.shards(layers=("tokens", "target")):
        if shard.rows is not None:
            target_nll.append(-shard.rows.label_logprob[shard.loss_mask])
            unigram_nll.append(unigram[_labels(shard)])
    return {
        "target_nll": float(np.concatenate(target_nll).mean()),
        "unigram_nll": float(np.concatenate(unigram_nll).mean()),
    }


def _labels(shard: Shard) -> NDArray[np.uint32]:
    return shard.ids[np.flatnonzero(shard.loss_mask) + 1]
