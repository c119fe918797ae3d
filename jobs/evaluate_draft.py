"""Measures how often a target accepts a draft's tokens.

    python jobs/evaluate_draft.py --target MODEL --draft MODEL --data DATA [--gamma 5]      real speculative decoding
    python jobs/evaluate_draft.py --store URL --draft MODEL             from the cache, without the target
    python jobs/evaluate_draft.py --target MODEL --draft MODEL --data DATA --store URL      both

Records of DATA give prompts: `messages` up to their last assistant turn, or `prompt`, or the first half of the tokens
of a `text` or of `input_ids` (at most 64 of them; with a `loss_mask`, those before the first one that counts).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _errors import user_errors
from tqdm import tqdm

import logitstore
from logitstore.arguments import Parser
from logitstore.format.schemes import Scheme, describe
from logitstore.models.identity import check_model, tokenizer_spec
from logitstore.models.loading import ModelSource, load_config, load_model, load_tokenizer, loading_bars
from logitstore.storage.options import options_for, storage_options
from trainer.data.compatible import check_complete
from trainer.evaluation.from_cache import CachedAcceptance, cached_acceptance, expected_tokens_per_call
from trainer.evaluation.speculative import MODES, Mode, SpeculativeResult, check_settings, measure_acceptance

if TYPE_CHECKING:
    from logitstore import Store

RULES = (
    "alpha: accepted / (accepted + target calls with a rejection); tokens after a rejection are not counted",
    "acc/drafted: accepted / drafted, tokens after a rejection included (vLLM's draft acceptance rate)",
    "tau: emitted tokens per target call, of at most gamma + 1",
)
CACHE_RULES = (
    "alpha (cache): mean of sum_v min(p_v, q_v) over the stored rows, on the documents' text, not on the target's own",
    "tokens/call (modelled): (1 - alpha^(gamma + 1)) / (1 - alpha), as if every token were accepted independently",
)


def parser() -> Parser:
    """Returns the command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--draft", required=True, metavar="MODEL", help="Hugging Face id or folder of the draft")
    p.add_argument("--draft_revision", help="the draft's branch, tag or commit")
    p.add_argument("--gamma", type=int, default=5, help="tokens drafted per target call (default %(default)s)")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                   help="of the weights; auto takes each checkpoint's")  # fmt: skip
    p.add_argument("--attn_implementation", help="of transformers: sdpa, eager, flash_attention_2, ...")
    p.add_argument("--trust_remote_code", action="store_true", help="run code from the models' repositories")
    p.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    p.add_argument("--no_progress", action="store_true", help="no progress bars")

    measured = p.add_argument_group("measured by speculative decoding")
    measured.add_argument("--target", metavar="MODEL", help="Hugging Face id or folder of the target")
    measured.add_argument("--revision", help="the target's branch, tag or commit")
    measured.add_argument("--data", metavar="DATA", help="path or URL of JSONL, Parquet or text, or hf:name[:split]")
    measured.add_argument("--num_prompts", type=int, default=32, help="the first so many (default %(default)s)")
    measured.add_argument("--max_new_tokens", type=int, default=64, help="per prompt (default %(default)s)")
    measured.add_argument("--mode", default="both", choices=(*MODES, "both"),
                          help="argmax, or sampled at temperature 1 from the whole vocabulary")  # fmt: skip
    measured.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")

    cache = p.add_argument_group("from the cache")
    cache.add_argument("--store", metavar="URL", help="a store whose target layer is finished")
    cache.add_argument("--storage_options", metavar="FILE", help="JSON file of fsspec options for the store's files, "
                       "and for those of --data on the same kind of file system")  # fmt: skip
    cache.add_argument("--k", type=int, help="read the store as if it had been dumped with this --k")
    cache.add_argument("--mass", type=float, help="likewise, with --scheme nucleus and this --mass")
    cache.add_argument("--max_documents", type=int, help="only the first so many documents of the store")
    cache.add_argument("--batch_tokens", type=int, default=8192,
                       help="most tokens of a forward, padding included (default %(default)s)")  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the job, prints its table and returns its figures."""
    with user_errors():
        args = parser().parse_args(argv)
        plan = _check(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Both before anything is computed: weights that cannot be read are a mistake in what was asked for.
    with user_errors(), loading_bars(not args.no_progress):
        draft = load_model(_draft(args), what="draft", device=device)
        target = load_model(_target(args), what="target", device=device) if plan.prompts else None
    figures: dict[str, Any] = {"draft": args.draft, "target": args.target, "gamma": args.gamma, "device": device}
    lines: list[str] = []
    if plan.store is not None:
        total = min(plan.store.num_documents, args.max_documents or plan.store.num_documents)
        with tqdm(total=total, desc="From the cache", unit="doc", disable=args.no_progress) as bar:
            cached = cached_acceptance(
                draft,
                plan.store,
                batch_tokens=args.batch_tokens,
                max_documents=args.max_documents,
                progress=bar.update,
            )
        figures |= {"store": plan.store.url, "cached": _cached_json(cached, args.gamma)}
        if plan.store.spec.target is not None:  # else cached_acceptance has raised
            figures["cached"]["scheme"] = describe(plan.store.spec.target.scheme)
            lines += _cached_table(cached, args.gamma, plan.store.spec.target.scheme)
    if target is not None:
        figures |= {"prompts_left_out": plan.left_out, "measured": {}}
        results = []
        for mode in plan.modes:
            total = len(plan.prompts)
            with tqdm(total=total, desc=f"Decoding, {mode}", unit="prompt", disable=args.no_progress) as bar:
                result = measure_acceptance(
                    target,
                    draft,
                    plan.prompts,
                    mode=mode,
                    vocab_size=plan.vocab_size,
                    gamma=args.gamma,
                    max_new_tokens=args.max_new_tokens,
                    seed=args.seed,
                    progress=bar.update,
                )
            results.append(result)
            figures["measured"][mode] = result.to_json()
        lines += _measured_table(results, plan.left_out)
    print("\n".join(lines + plan.notes))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What was found before any weights are loaded."""

    vocab_size: int
    """The true vocabulary of both models."""
    store: Store | None
    modes: tuple[Mode, ...]
    prompts: list[list[int]]
    """Empty where nothing is to be decoded."""
    left_out: int
    """Records passed over because their prompt is empty or too long for a model."""
    notes: list[str]


def _check(args: argparse.Namespace) -> _Plan:
    if (args.target is None) != (args.data is None):
        missing = "target" if args.target is None else "data"
        raise ValueError(f"target and data must be given together, got no {missing}; add --{missing} or drop both")
    if args.target is None and args.store is None:
        raise ValueError("target with data, or store, must be given, got none; add --target and --data, or --store")
    modes = MODES if args.mode == "both" else (args.mode,)
    for mode in modes:
        check_settings(mode=mode, gamma=args.gamma, max_new_tokens=args.max_new_tokens)
    for name in ("num_prompts", "max_documents", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"json must be a file in a folder that is there, got json={args.json}; make the folder first")

    options = storage_options(args.storage_options)
    if args.store is None and (args.k, args.mass) != (None, None):
        raise ValueError("store must be given with --k or --mass, got none; add --store, or leave them out")
    store = None if args.store is None else _open_store(args.store, options).read_smaller(k=args.k, mass=args.mass)
    if store is None:
        target_tokenizer = load_tokenizer(_target(args), what="target")
        made, max_length = tokenizer_spec(target_tokenizer, uses_chat_template=False), None
    else:
        made, max_length = store.spec.tokenizer, store.spec.max_length

    draft, _ = check_model(_draft(args), what="draft", made=made, max_length=max_length)
    if args.target is None:
        return _Plan(vocab_size=made.vocab_size, store=store, modes=modes, prompts=[], left_out=0, notes=[])

    # Not needed for a store alone, and neither is what it imports.
    from _prompts import read_prompts

    # no length: the target does not run on the store's documents, only the draft does
    target, target_tokenizer = check_model(_target(args), what="target", made=made, max_length=None)
    contexts = [
        getattr(config.get_text_config(), "max_position_embeddings", None)
        for config in (load_config(_draft(args), what="draft"), load_config(_target(args), what="target"))
    ]
    room = min((context for context in contexts if context), default=math.inf) - args.max_new_tokens
    prompts, left_out = read_prompts(
        args.data,
        target_tokenizer,
        vocab_size=made.vocab_size,
        num_prompts=args.num_prompts,
        room=room,
        storage_options=options_for(args.data, args.store, options),
    )
    notes = []
    if draft.padded_vocab_size != target.padded_vocab_size:
        notes.append(
            f"note: the draft's config has vocab_size={draft.padded_vocab_size}, the target's "
            f"{target.padded_vocab_size}: they were decoded over the {made.vocab_size} tokens that both have, but some "
            "servers, vLLM among them, ask for equal sizes"
        )
    return _Plan(vocab_size=made.vocab_size, store=store, modes=modes, prompts=prompts, left_out=left_out, notes=notes)


def _draft(args: argparse.Namespace) -> ModelSource:
    return _source(args, args.draft, args.draft_revision)


def _target(args: argparse.Namespace) -> ModelSource:
    return _source(args, args.target, args.revision)


def _source(args: argparse.Namespace, name: str, revision: str | None) -> ModelSource:
    return ModelSource(
        name=name,
        revision=revision,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def _open_store(url: str, options: dict[str, Any] | None) -> Store:
    store = logitstore.open(url, options)
    for layer in ("tokens", "target"):
        check_complete(store, layer)
    return store


def _cached_json(cached: CachedAcceptance, gamma: int) -> dict[str, Any]:
    modelled = {"sampled": cached.alpha_estimate, "greedy": cached.argmax_agreement}
    return dataclasses.asdict(cached) | {
        "modelled_tokens_per_call": {mode: expected_tokens_per_call(a, gamma) for mode, a in modelled.items()}
    }


def _cached_table(cached: CachedAcceptance, gamma: int, scheme: Scheme) -> list[str]:
    sampled, greedy = (expected_tokens_per_call(a, gamma) for a in (cached.alpha_estimate, cached.argmax_agreement))
    of = "estimated without bias from draws" if scheme.draws else "kept entries and tail"
    unknown = 100 * (1 - cached.argmax_known)
    missed = f"; of {unknown:.1f}% of rows the target's likeliest token may not have been drawn" if unknown else ""
    return [
        "",
        f"From the cache, teacher-forced: {cached.rows:,} rows of {cached.documents:,} documents, read as "
        f"{describe(scheme)}",
        f"  alpha (cache), sampled    {cached.alpha_estimate:.4f}, between {cached.alpha_lower:.4f} and "
        f"{cached.alpha_upper:.4f}    tokens/call at gamma {gamma} (modelled) {sampled:.2f}",
        f"  argmax agreement, greedy  {cached.argmax_agreement:.4f}    "
        f"tokens/call at gamma {gamma} (modelled) {greedy:.2f}{missed}",
        f"  KL(target‖draft)          {cached.forward_kl:.4f} nats, {of}",
        *CACHE_RULES,
    ]


def _measured_table(results: list[SpeculativeResult], left_out: int) -> list[str]:
    first = results[0]
    passed_over = f" ({left_out} passed over)" if left_out else ""
    head = ("mode", "alpha", "acc/drafted", "tau", "calls", "drafted", "accepted", "emitted", "tok/s", "alone", "same")
    rows = [
        (
            r.mode,
            f"{r.alpha:.4f}",
            f"{r.accepted_per_drafted:.4f}",
            f"{r.tau:.2f}",
            f"{r.target_calls}",
            f"{r.drafted}",
            f"{r.accepted}",
            f"{r.emitted}",
            f"{r.tokens_per_s:.1f}",
            f"{r.plain_tokens_per_s:.1f}",
            "-" if r.greedy_text_identical is None else f"{r.greedy_text_identical}/{r.prompts}",
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    table = ["  " + "  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in (head, *rows)]
    return [
        "",
        f"Measured by speculative decoding: {first.prompts} prompts{passed_over}, gamma {first.gamma}, "
        f"at most {first.max_new_tokens} new tokens, batch size 1",
        *table,
        *RULES,
        "tok/s: with the draft; alone: the target by itself; same: prompts whose greedy text is the target's own",
    ]


if __name__ == "__main__":
    main()
