"""Rows of a distribution as logitstore stores them: arrays of the dump, whole shards, and rectangles of the reader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from logitstore.dump.scoring.truncation import truncate, uniforms
from logitstore.format import layout, zarr_objects
from logitstore.format.layout import ENTRY_CHUNK
from logitstore.format.schemes import make_scheme
from logitstore.format.spec import ROW_CHUNK, ModelSpec, TargetSpec
from logitstore.rows import codec
from logitstore.rows.tokens import encode_tokens

BATCH_ROWS = 2048
"""Number of rows in one rectangle."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Rows of one scheme, as the dump makes them and a reader sees them."""

    name: str
    spec: TargetSpec
    uniform: np.ndarray
    parts: list[dict[str, np.ndarray]]

    @staticmethod
    def of(scheme, options, vocab_size, num_rows):
        """Prepares for `num_rows` rows, which `keep` adds."""
        model = ModelSpec(name="bench", revision="0", dtype="float32", padded_vocab_size=vocab_size)
        spec = TargetSpec(model=model, scheme=make_scheme(scheme, options))
        name = f"{scheme} {' / '.join(f'{value:g}' for value in options.values())}"
        return Ours(name=name, spec=spec, uniform=uniforms(spec, 0, num_rows), parts=[])

    def keep(self, chunk, start):
        """Truncates a chunk, stores its arrays and returns them."""
        boundaries = torch.from_numpy(self.spec.codebook.boundaries)
        uniform = torch.from_numpy(self.uniform[start : start + len(chunk.labels)])
        kept = truncate(chunk.logprobs, chunk.labels, self.spec, boundaries, uniform)
        counts = kept.counts.numpy()
        used = np.arange(kept.token_ids.shape[1]) < counts[:, None]
        floats = {name: getattr(kept, name).numpy() for name in ("tail", "label_logprob", "entropy")}
        entries = {name: getattr(kept, name).numpy()[used] for name in ("token_ids", "codes", "draws")}
        arrays = codec.pack(counts=counts, **entries, **floats)
        exact = chunk.logprobs.gather(1, kept.token_ids.long().clamp_max(chunk.logprobs.shape[1] - 1))
        self.parts.append(arrays | {"exact_logprobs": exact.numpy()[used], "exact_tail": floats["tail"]})
        return arrays

    def arrays(self):
        """Returns the arrays of all rows."""
        return {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}

    def encode(self, arrays):
        """Returns the objects of a shard."""
        sizes = self._sizes(len(arrays["counts"]))
        return {array.name: zarr_objects.encode(arrays[array.name], array, **sizes) for array in layout.TARGET}

    def _sizes(self, num_rows):
        return {"shard_rows": -(-num_rows // ENTRY_CHUNK) * ENTRY_CHUNK, "k": self.spec.room}

    def decode(self, held, counts):
        """Decodes objects and pads all rows to rectangles, in batches."""
        sizes = self._sizes(len(counts))
        lengths = {"row": len(counts), "entry": int(counts.sum(dtype=np.int64))}
        arrays = {a.name: zarr_objects.decode(held[a.name], lengths[a.per], a, **sizes) for a in layout.TARGET}
        rows = codec.decode(arrays, self.spec)
        for start in range(0, len(counts), BATCH_ROWS):
            rows.padded(np.arange(start, min(start + BATCH_ROWS, len(counts))))
        return rows


def token_bytes(source, num_rows):
    """Returns the bytes of the tokens layer, and the number of tokens, per row that counts."""
    documents, counted = [], 0
    for ids, mask in source.documents:
        documents.append((ids, mask))
        if (counted := counted + int(mask.sum())) >= num_rows:
            break
    ids, masks = zip(*documents, strict=True)
    values = encode_tokens(np.concatenate(ids), np.concatenate(masks), np.array([len(part) for part in ids]))
    room = -(-len(values["ids"]) // ROW_CHUNK) * ROW_CHUNK
    held = [zarr_objects.encode(values[array.name], array, shard_rows=room, k=1) for array in layout.TOKENS]
    return sum(len(data or b"") for data in held) / counted, len(values["ids"]) / counted
