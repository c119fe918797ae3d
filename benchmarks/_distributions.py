"""Real distributions for measuring formats: small Llamas, trained here in minutes on text of this machine.

    python -m benchmarks._distributions demo mid large [--share 0.5 --threads 2]

makes the ones that are not in build/bench yet. Each has a tokenizer, a target, and a draft: the target at an earlier
point of its training, which is worse in the same ways as a smaller model. All three are trained on the demo's text,
functions of the standard library. A few MB of it are seen several times, so that entropies are as low as those of large
models on responses. The tokenizer with 128,256 tokens is trained on a hundred times as much text; most of its tokens
never occur in the functions. Its full head would cost 150 MFLOP per token. So during most of the training the
partition function is estimated without bias from a few thousand tokens drawn with known probabilities; the last steps
are exact. Only rows of responses count.

N rows, V vocabulary, H hidden size, T tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

# Must be set before torch is loaded. Threads that spin while they wait are many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "jobs"))

import numpy as np
import torch
from _demo.corpus import Pair, is_held_out, read_pairs, standard_library, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, logging

FOLDER = Path(__file__).parents[1] / "build" / "bench"
MAX_LENGTH = 256
BATCH = 2
"""Packed sequences per step. In a few minutes, many small steps reach a lower loss than few large ones."""
LEARNING_RATE = 2e-3
DRAFT_AT = 0.35
"""Fraction of the training time after which the target is saved as the draft."""
EXACT_FROM = 0.9
"""Fraction of the training time after which the loss uses the whole vocabulary."""
TEXT_SUFFIXES = (".py", ".md", ".rst", ".txt", ".pyi", ".html")
TEXT_ROOTS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share")
TEXT_BYTES = 150_000_000
BETAS, EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings for training a target."""

    vocab_size: int
    minutes: float
    negatives: int
    """Number of drawn tokens in the loss; 0 always uses the whole vocabulary."""
    num_functions: int
    """Number of functions to train on. With fewer, each is seen more often in the same time."""
    hidden_size: int = 192
    num_layers: int = 4


RECIPES = {
    "demo": Recipe(vocab_size=2048, minutes=3, negatives=0, num_functions=10_000),
    "mid": Recipe(vocab_size=32768, minutes=6, negatives=4096, num_functions=1200),
    "large": Recipe(vocab_size=128256, minutes=15, negatives=6144, num_functions=1200),
}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk of N rows that count."""

    labels: torch.Tensor
    """Int64 [N]."""
    logprobs: torch.Tensor
    """Float32 [N, V]: exact logprobs of the target."""
    draft: torch.Tensor
    """Float32 [N, V]: logprobs of the draft."""


@dataclass(kw_only=True)
class Distribution:
    """A target and a draft at a temperature. Below 1, the entropies are those of a larger target."""

    name: str
    temperature: float = 1.0
    text: Literal["held_out", "seen"] = "held_out"
    """Whether the functions were held out from the target's training or seen in it. Seen ones have lower entropy."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return RECIPES[self.name].vocab_size

    @functools.cached_property
    def made(self) -> dict[str, float]:
        """Settings and results of the training."""
        return json.loads((FOLDER / self.name / "made.json").read_text())

    @functools.cached_property
    def documents(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids [T] and loss mask [T] of each document of the text."""
        tokenizer = AutoTokenizer.from_pretrained(FOLDER / self.name / "target")
        seen = functions(held_out=False)[: RECIPES[self.name].num_functions]
        return list(encode(tokenizer, functions(held_out=True) if self.text == "held_out" else seen))

    @torch.no_grad()
    def chunks(self, num_rows: int, rows_per_chunk: int = 256):
        """Yields chunks of the first num_rows rows that count."""
        models = [load(FOLDER / self.name / which) for which in ("target", "draft")]
        waiting, left = [], num_rows
        for ids, mask in self.documents:
            places = torch.from_numpy(np.flatnonzero(mask))
            inputs = torch.from_numpy(ids)
            hidden = [model.model(input_ids=inputs[None]).last_hidden_state[0, places] for model in models]
            waiting.append((inputs[places + 1], *hidden))
            if sum(len(labels) for labels, *_ in waiting) < min(rows_per_chunk, left):
                continue
            labels, *hidden = (torch.cat(parts) for parts in zip(*waiting, strict=True))
            here = min(rows_per_chunk, left)
            logprobs = [
                (model.lm_head(part[:here]) / self.temperature).log_softmax(-1)
                for model, part in zip(models, hidden, strict=True)
            ]
            yield Chunk(labels=labels[:here], logprobs=logprobs[0], draft=logprobs[1])
            waiting = [(labels[here:], *(part[here:] for part in hidden))]
            if not (left := left - here):
                return


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Artificial distributions over a vocabulary of any size, only for the sizes of ids and not for fidelity."""

    vocab_size: int
    name: str = "synthetic"
    temperature: float = 1.0

    def chunks(self, num_rows: int, rows_per_chunk: int = 256):
        """Yields chunks of num_rows rows."""
        generator = torch.Generator().manual_seed(0)
        frequency = -1.1 * torch.log(torch.arange(1, self.vocab_size + 1, dtype=torch.float32))
        for start in range(0, num_rows, rows_per_chunk):
            shape = (min(rows_per_chunk, num_rows - start), self.vocab_size)
            logprobs = (frequency + 2 * torch.randn(shape, generator=generator)).log_softmax(-1)
            labels = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
            draft = (frequency + 2 * torch.randn(shape, generator=generator)).log_softmax(-1)
            yield Chunk(labels=labels, logprobs=logprobs, draft=draft)


@functools.cache
def functions(*, held_out):
    return [pair for pair in read_pairs(standard_library()) if is_held_out(pair) == held_out]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def encode(tokenizer, pairs):
    """Yields ids and loss mask of each document as `dump_logits.py` makes them, cut at MAX_LENGTH."""
    for pair in pairs:
        prompt = tokenizer(pair.prompt)["input_ids"]
        response = tokenizer(pair.response, add_special_tokens=False)["input_ids"]
        ids = np.array([*prompt, *response, tokenizer.eos_token_id], dtype=np.int64)[:MAX_LENGTH]
        mask = np.zeros(len(ids), dtype=bool)
        mask[len(prompt) - 1 : -1] = True
        if mask.any():
            yield ids, mask


def texts(limit=TEXT_BYTES, roots=TEXT_ROOTS):
    """Yields the text files installed on this machine, each once, in a fixed random order."""
    paths = {path for root in roots for path in Path(root).rglob("*") if path.suffix in TEXT_SUFFIXES}
    seen, total = set(), 0
    for path in random.Random(0).sample(sorted(paths), len(paths)):
        try:
            text = path.read_text()
        except (UnicodeDecodeError, OSError):  # other encodings and broken links
            continue
        if 500 <= len(text) <= 300_000 and text[:2000] not in seen:
            seen.add(text[:2000])
            total += len(text)
            yield text
        if total > limit:
            return


def make(name, recipe):
    """Trains a target by its recipe, unless it exists."""
    folder = FOLDER / name
    if (folder / "made.json").exists():
        return
    pairs = functions(held_out=False)
    if (folder / "tokenizer").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    else:
        source = pairs if recipe.vocab_size < 2**13 else [Pair(prompt=text, response="") for text in texts()]
        tokenizer = train_tokenizer(source, recipe.vocab_size)
        tokenizer.save_pretrained(folder / "tokenizer")
    documents = list(encode(tokenizer, pairs[: recipe.num_functions]))
    tokens = np.concatenate([ids for ids, _ in documents])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size, hidden_size=recipe.hidden_size, intermediate_size=recipe.hidden_size * 8 // 3,
        num_hidden_layers=recipe.num_layers, num_attention_heads=4, max_position_embeddings=2 * MAX_LENGTH,
        initializer_range=0.05, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def save(part):
        model.save_pretrained(folder / part)
        tokenizer.save_pretrained(folder / part)

    steps, loss = train(model, torch.from_numpy(tokens), recipe, save)
    save("target")
    made = asdict(recipe) | {"steps": steps, "training_loss": loss, "tokens": len(tokens)}
    made |= {"epochs": steps * BATCH * MAX_LENGTH / len(tokens), "torch": torch.__version__}
    (folder / "made.json").write_text(json.dumps(made, indent=1))
    print(name, json.dumps(made), flush=True)
    for text in ("held_out", "seen"):
        print(name, text, json.dumps(summary(Distribution(name=name, text=text), 512)), flush=True)


def train(model, tokens, recipe, save):
    """Trains for some minutes and calls `save` for the draft on the way.

    AdamW updates the body. The embedding, which is also the head, is updated only at the rows that a step used.
    """
    body = [parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name]
    optimizer = torch.optim.AdamW(body, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.1)
    embedding = RowwiseAdam(model.model.embed_tokens.weight.data)
    chances = inclusion(torch.bincount(tokens, minlength=recipe.vocab_size), recipe.negatives)
    generator = torch.Generator().manual_seed(0)
    started, steps, mean, is_kept = time.monotonic(), 0, math.nan, False
    model.train()
    while (part := (time.monotonic() - started) / 60 / recipe.minutes) < 1:
        if part >= DRAFT_AT and not is_kept:
            save("draft")
            is_kept = True
        rate = LEARNING_RATE * min(1, (steps + 1) / 50) * (0.03 + 0.97 * math.cos(math.pi / 2 * part) ** 2)
        starts = torch.randint(len(tokens) - MAX_LENGTH, (BATCH, 1), generator=generator)
        window = tokens[starts + torch.arange(MAX_LENGTH + 1)]
        is_exact = not recipe.negatives or part >= EXACT_FROM
        drawn = torch.rand(len(chances), generator=generator) < (torch.ones(()) if is_exact else chances)
        touched = drawn.clone()
        touched[window] = True
        rows = touched.nonzero()[:, 0]
        place = touched.long().cumsum(0) - 1
        weights = embedding.weights[rows].requires_grad_()
        hidden = model.model(inputs_embeds=weights[place[window[:, :-1]]]).last_hidden_state.flatten(0, 1)
        labels = place[window[:, 1:].flatten()]
        if is_exact:
            loss = torch.nn.functional.cross_entropy(hidden @ weights.T, labels)
        else:
            loss = sampled_loss(hidden, labels, weights, drawn[rows], chances[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(body, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        embedding.step(rows, weights.grad, rate)
        steps += 1
        mean = loss.item() if steps == 1 else 0.98 * mean + 0.02 * loss.item()
        if steps % 100 == 0:
            print(f"{steps} steps, {time.monotonic() - started:.0f} s, loss {mean:.3f}", flush=True)
    return steps, round(mean, 3)


def inclusion(counts, num):
    """Returns the probability of drawing each token, which grows with its frequency and sums to `num`."""
    weights = (counts + 0.5).pow(0.75)
    scale = num / weights.sum()
    for _ in range(20 if num else 0):  # tokens limited to probability 1 raise those of the others
        chances = (scale * weights).clamp_max(1.0)
        scale *= num / chances.sum()
    return (scale * weights).clamp_max(1.0)


def sampled_loss(hidden, labels, weights, is_drawn, chances):
    """Returns the cross entropy. sum_v exp(z_v) is estimated from the label and the drawn tokens over their chances."""
    drawn = is_drawn.nonzero()[:, 0]
    others = hidden @ weights[drawn].T - chances[drawn].log()
    own = (hidden * weights[labels]).sum(-1)
    others = others.masked_fill(drawn[None, :] == labels[:, None], -torch.inf)
    return (torch.logaddexp(own, others.logsumexp(-1)) - own).mean()


class RowwiseAdam:
    """Adam for some rows of a matrix at a time. Each row has its own step count."""

    def __init__(self, weights):
        self.weights = weights
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.steps = torch.zeros(len(weights), 1)

    @torch.no_grad()
    def step(self, rows, gradient, rate):
        self.steps[rows] += 1
        steps = self.steps[rows]
        mean = self.mean[rows].lerp_(gradient, 1 - BETAS[0])
        square = self.square[rows].lerp_(gradient.square(), 1 - BETAS[1])
        self.mean[rows], self.square[rows] = mean, square
        change = mean / (1 - BETAS[0] ** steps) / ((square / (1 - BETAS[1] ** steps)).sqrt() + EPSILON)
        self.weights[rows] -= rate * change


def summary(distribution, num_rows):
    """Returns figures of a distribution: entropy and loss in nats, and the mass of its likeliest tokens."""
    sums, rows = {}, 0
    for chunk in distribution.chunks(num_rows, 128):
        probs = chunk.logprobs.exp()
        top = probs.topk(64, dim=-1).values
        values = {
            "entropy": -torch.linalg.vecdot(probs, chunk.logprobs),
            "loss": -chunk.logprobs.gather(1, chunk.labels[:, None]),
            "draft_loss": -chunk.draft.gather(1, chunk.labels[:, None]),
            "alpha": torch.minimum(probs, chunk.draft.exp()).sum(-1),
            "top_1": top[:, 0],
            "top_20": top[:, :20].sum(-1),
            "top_64": top.sum(-1),
        }
        rows += len(top)
        sums = {name: sums.get(name, 0.0) + value.double().sum().item() for name, value in values.items()}
    return {name: round(value / rows, 4) for name, value in sums.items()}


def sharpen(model: Path, folder: Path, temperature: float) -> Path:
    """Makes a model with the distributions of another at a temperature. Below 1 they become more peaked."""
    made = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        made.model.norm.weight.div_(temperature)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=RECIPES)
    parser.add_argument("--share", type=float, default=1.0, help="of the minutes that are usual")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    for name in args.names:
        make(name, replace(RECIPES[name], minutes=RECIPES[name].minutes * args.share))


if __name__ == "__main__":
    main()
