"""Tiny inputs: text of the standard library, a tokenizer, random models, and a store written by an oracle."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import time
from pathlib import Path

import numpy as np

from tests.helpers.encoding import encode_rows

VOCAB_SIZE = 512
PADDED_VOCAB_SIZE = 520


def functions(limit):
    """Returns prompt and response pairs from the standard library: signature and docstring, then the body."""
    return all_functions()[:limit]


@functools.cache
def all_functions():
    pairs = []
    for module in (inspect, ast, json, dataclasses):
        source = Path(inspect.getsourcefile(module)).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                text = ast.get_source_segment(source, node)
                lines = text.split("\n")
                split = node.body[0].end_lineno - node.lineno + 1
                pairs.append({"prompt": "\n".join(lines[:split]) + "\n", "response": "\n".join(lines[split:])})
    return pairs


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def make_tokenizer(folder, vocab_size=VOCAB_SIZE):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([pair["prompt"] + pair["response"] for pair in functions(200)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return str(folder)


def make_model(folder, tokenizer, *, hidden=32, layers=2, seed=0, vocab_size=PADDED_VOCAB_SIZE, scale=0.3):
    """Saves a random Llama with the tokenizer. Weights with a large `scale` make its distributions peaked."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=scale,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def dense_logprobs(model, ids, vocab_size=VOCAB_SIZE):
    """Returns the oracle's log-softmax of one document, float64 [T, V], without batching, over the true vocabulary."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(np.asarray(ids, dtype=np.int64))[None]).logits[0, :, :vocab_size]
    return logits.double().log_softmax(-1).numpy()


def topk_rows(logprobs, ids, mask, k):
    """Returns the rows of one document from its dense logprobs, directly from the definition."""
    from logitstore import Rows

    counts, token_ids, kept = [], [], []
    tail, label, entropy = (np.full(len(ids), np.nan) for _ in range(3))
    for i in range(len(ids)):
        if not mask[i]:
            counts.append(0)
            continue
        order = np.sort(np.argsort(-logprobs[i], kind="stable")[:k])
        counts.append(k)
        token_ids.extend(order)
        kept.extend(logprobs[i, order])
        tail[i] = np.delete(np.exp(logprobs[i]), order).sum()
        label[i] = logprobs[i, ids[i + 1]]
        entropy[i] = -(np.exp(logprobs[i]) * logprobs[i]).sum()
    return Rows(
        counts=np.array(counts), token_ids=np.array(token_ids, np.uint32), logprobs=np.array(kept, np.float32),
        weights=None, tail_mass=tail.astype(np.float32), label_logprob=label.astype(np.float32),
        entropy=entropy.astype(np.float32),
    )  # fmt: skip


def write_store(url, documents, model, tokenizer, *, k=16, shard_rows=1024, losses=None):
    """Writes a whole store with the oracle, without any code of the dump.

    Args:
        documents: List of (ids, mask). The mask marks rows whose prediction counts; it is 0 at the last row.
        model: The target, a causal LM in float32.
        tokenizer: The target's tokenizer.
        losses: {name: model}. Each adds losses/name, computed in float64 on the decoded entries.
    """
    from logitstore import Rows
    from logitstore.format.schemes import Scheme
    from logitstore.format.spec import DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec
    from logitstore.models.identity import tokenizer_spec
    from logitstore.rows import codec
    from logitstore.rows.tokens import encode_tokens
    from logitstore.storage.storage import Storage
    from logitstore.store import writer

    shards, room = [[]], shard_rows
    for ids, mask in documents:
        if len(ids) > room:
            shards.append([])
            room = shard_rows
        shards[-1].append((np.asarray(ids), np.asarray(mask)))
        room -= len(ids)
    storage = Storage(url)
    name = ModelSpec(name="oracle", revision="0", dtype="float32", padded_vocab_size=PADDED_VOCAB_SIZE)
    target = TargetSpec(model=name, scheme=Scheme(k=k))
    tokens_spec = tokenizer_spec(tokenizer, uses_chat_template=False)
    spec = StoreSpec(
        tokenizer=tokens_spec, max_length=512, shard_rows=shard_rows, num_shards=len(shards), target=target,
        data=DataSpec(source="test", digest=None, columns="input_ids", mask_policy="given"),
    )  # fmt: skip
    writer.create_store(storage, spec)
    writer.add_layer(storage, spec, "target", target)
    spec = dataclasses.replace(spec, losses={loss: LossSpec(model=name) for loss in losses or {}})
    for loss, layer_spec in spec.losses.items():
        writer.add_layer(storage, spec, f"losses/{loss}", layer_spec)
    for shard, members in enumerate(shards):
        ids, mask = (np.concatenate([member[j] for member in members]) for j in (0, 1))
        started = time.monotonic()
        size = {"documents": len(members), "rows": len(ids), "counted": int(mask.sum()), "started": started}
        tokens = encode_tokens(ids, mask, np.array([len(member[0]) for member in members]))
        commit = writer.LayerWriter(storage, spec, "tokens").write(shard, tokens, computed_from=None, **size)
        rows = Rows.concatenate([topk_rows(dense_logprobs(model, i), i, m, k) for i, m in members])
        arrays = encode_rows(rows, target)
        commit = writer.LayerWriter(storage, spec, "target").write(shard, arrays, computed_from=commit.digest, **size)
        stored = codec.decode(arrays, target)
        for loss, other in (losses or {}).items():
            q = np.concatenate([dense_logprobs(other, i) for i, _ in members])
            ce, label = oracle_losses(stored, q, ids)
            values = {"ce": ce.astype(np.float32), "label_logprob": label.astype(np.float32)}
            writer.LayerWriter(storage, spec, f"losses/{loss}").write(
                shard, values, computed_from=commit.digest, **size
            )
    return url


def oracle_losses(rows, logprobs, ids):
    """Returns the soft cross entropy on the stored entries and the label logprobs, float64, NaN at masked rows."""
    ce, label = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for i in range(len(rows)):
        if rows.counts[i]:
            row = rows.slice(i, i + 1)
            kept = logprobs[i, row.token_ids]
            left = max(1.0 - np.exp(kept).sum(), 1e-6)
            ce[i] = -(np.exp(row.logprobs.astype(float)) * kept).sum() - float(row.tail_mass[0]) * np.log(left)
            label[i] = logprobs[i, ids[i + 1]]
    return ce, label
