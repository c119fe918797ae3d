"""Measures how often a target accepts a draft's tokens.

    logitstore evaluate --target MODEL --draft MODEL --data DATA [--gamma 5]      real speculative decoding
    logitstore evaluate --store URL --draft MODEL             from the cache, without the target
    logitstore evaluate --target MODEL --draft MODEL --data DATA --store URL      both

Each record of DATA gives one prompt: its `messages` before the last assistant turn, its `prompt`, or the first half of
its `text` or `input_ids`, but at most 64 tokens. With a `loss_mask`, the prompt is the `input_ids` before the first one
whose mask is 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import logitstore
from logitstore.commands import shared_options as shared
from logitstore.commands.shared_options import Parser
from logitstore.commands.user_errors import command, leave, refusals, user_errors
from logitstore.format.schemes import Scheme, describe
from logitstore.models.identity import check_model, tokenizer_spec
from logitstore.models.loading import ModelSource, load_config, load_model, load_tokenizer, loading_bars
from logitstore.storage.options import options_for, storage_options
from trainer.data.compatible import check_complete
from trainer.evaluation.from_cache import CachedAcceptance, cached_acceptance, expected_tokens_per_call
from trainer.evaluation.speculative import MODES, Mode, SpeculativeResult, check_settings, measure_acceptance

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from logitstore import Store

RULES = (
    "alpha: accepted / (accepted + target calls with a rejection); tokens after a rejection are not counted",
    "acc/drafted: accepted / drafted, tokens after a rejection included (vLLM's draft acceptance rate)",
    "tau: emitted tokens per target call, at most gamma + 1",
)
CACHE_RULES = (
    "alpha (cache): mean of sum_v min(p_v, q_v) over the stored rows, on the documents' text, not on the target's text",
    "tokens/call (modelled): (1 - alpha^(gamma + 1)) / (1 - alpha), as if every token were accepted independently",
)


def parser() -> Parser:
    """Returns the parser of the command line."""
    p = Parser(prog="logitstore evaluate", description=__doc__)
    p.add_argument("--draft", required=True, metavar="MODEL", help="Hugging Face id or folder of the draft")
    p.add_argument("--draft_revision", metavar="REV", help="branch, tag or commit of the draft on the hub")
    p.add_argument("--gamma", type=int, default=5, metavar="N",
                   help="number of tokens drafted per target call. Default: %(default)s")  # fmt: skip
    shared.add_loading(p)
    shared.add_no_progress(p)
    shared.add_json(p)

    measured = p.add_argument_group("measured by speculative decoding")
    shared.add_target(measured, "Hugging Face id or folder of the target")
    measured.add_argument("--data", metavar="DATA", help=shared.DATA)
    measured.add_argument("--num_prompts", type=int, default=32, metavar="N",
                          help="number of prompts, from the start of the data. Default: %(default)s")  # fmt: skip
    measured.add_argument("--max_new_tokens", type=int, default=64, metavar="N",
                          help="maximum number of tokens generated per prompt. Default: %(default)s")  # fmt: skip
    measured.add_argument("--mode", default="both", choices=(*MODES, "both"),
                          help="greedy (argmax), sampled (temperature 1, whole vocabulary), or both. "
                          "Default: %(default)s")  # fmt: skip
    measured.add_argument("--seed", type=int, default=0, help="seed of the sampling. Default: %(default)s")

    cache = p.add_argument_group("from the cache")
    shared.add_store(cache, required=False, text="folder or fsspec URL of a store whose target layer is finished")
    shared.add_storage_options(cache)
    cache.add_argument("--k", type=int, metavar="N", help="read the store as if it were dumped with this --k")
    cache.add_argument("--mass", type=float, metavar="P",
                       help="read the store as if it were dumped with --scheme nucleus and this --mass")  # fmt: skip
    cache.add_argument("--max_documents", type=int, metavar="N",
                       help="number of documents to read, from the start of the store. Default: all")  # fmt: skip
    shared.add_batch_tokens(cache)
    return p


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the evaluation, prints its tables (or its figures as JSON), and returns the figures."""
    with user_errors():
        args = parser().parse_args(argv)
        plan = _check(args)
    with refusals():
        figures, lines = _evaluate(args, plan)
    print(json.dumps(figures, indent=1) if args.json else "\n".join(lines))
    return figures


def _evaluate(args: argparse.Namespace, plan: _Plan) -> tuple[dict[str, Any], list[str]]:
    """Loads the models and measures them; returns the figures, and the lines of the tables."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Both models are loaded before anything is computed, so that unreadable weights end the command at once.
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
        if plan.store.spec.target is not None:  # Always true: cached_acceptance needs a target layer.
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
    return figures, lines + plan.notes


@command("nothing was written; run the same command again", extra="dump,train")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    run(argv)
    return 0


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Result of the checks that need no weights."""

    vocab_size: int
    """Size of the true vocabulary, which is the same for both models."""
    store: Store | None
    """The store to evaluate on; None if the draft is only measured by speculative decoding."""
    modes: tuple[Mode, ...]
    prompts: list[list[int]]
    """Token ids of each prompt; empty if nothing is to be decoded."""
    left_out: int
    """Number of records that were skipped, because their prompt is empty or too long for a model."""
    notes: list[str]
    """Lines to print after the tables."""


def _check(args: argparse.Namespace) -> _Plan:
    if (args.target is None) != (args.data is None):
        missing = "target" if args.target is None else "data"
        raise ValueError(f"target and data must be given together, got no {missing}; add --{missing}, or omit both")
    if args.target is None and args.store is None:
        raise ValueError(
            "target and data, or store, must be given, got none of them; add --target and --data, or --store"
        )
    modes = MODES if args.mode == "both" else (args.mode,)
    for mode in modes:
        check_settings(mode=mode, gamma=args.gamma, max_new_tokens=args.max_new_tokens)
    for name in ("num_prompts", "max_documents", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")

    options = storage_options(args.storage_options)
    if args.store is None and (args.k, args.mass) != (None, None):
        raise ValueError("k and mass need --store, got one of them without it; add --store, or omit --k and --mass")
    store = None if args.store is None else _open_store(args.store, options).read_smaller(k=args.k, mass=args.mass)
    if store is None:
        # Without a store, the draft's tokenizer is compared with that of the target.
        target_tokenizer = load_tokenizer(_target(args), what="target")
        made, max_length = tokenizer_spec(target_tokenizer, uses_chat_template=False), None
    else:
        made, max_length = store.spec.tokenizer, store.spec.max_length

    draft, _ = check_model(_draft(args), what="draft", made=made, max_length=max_length)
    if args.target is None:
        return _Plan(vocab_size=made.vocab_size, store=store, modes=modes, prompts=[], left_out=0, notes=[])

    # This import is late, because an evaluation on a store alone does not need the packages that read prompts.
    from logitstore.documents.prompts import read_prompts

    # max_length is None, because the target does not run on the store's documents.
    target, target_tokenizer = check_model(_target(args), what="target", made=made, max_length=None)
    contexts = [
        getattr(config.get_text_config(), "max_position_embeddings", None)
        for config in (load_config(_draft(args), what="draft"), load_config(_target(args), what="target"))
    ]
    # A prompt and the tokens generated after it must fit into the context of both models.
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
            f"note: vocab_size is {draft.padded_vocab_size} in the draft's config and {target.padded_vocab_size} in "
            f"the target's. They were decoded over the {made.vocab_size} tokens that both have, but some servers (such "
            "as vLLM) need equal sizes"
        )
    return _Plan(vocab_size=made.vocab_size, store=store, modes=modes, prompts=prompts, left_out=left_out, notes=notes)


def _draft(args: argparse.Namespace) -> ModelSource:
    return shared.source_of(args, args.draft, args.draft_revision)


def _target(args: argparse.Namespace) -> ModelSource:
    return shared.source_of(args, args.target, args.target_revision)


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
    missed = f"; in {unknown:.1f}% of rows the draws may have missed the target's likeliest token" if unknown else ""
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
    passed_over = f" ({left_out} records skipped)" if left_out else ""
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
        "tok/s: with the draft; alone: tok/s without it; same: prompts with the same greedy text with and without it",
    ]


if __name__ == "__main__":
    leave(main())
