"""Acceptance rate of a draft in real speculative decoding, measured with transformers' assisted generation.

Both models generate without truncation or penalties, and sampling is at temperature 1. The generation configs of their
checkpoints are ignored, except for the target's end-of-text tokens. The output embeddings may have padding rows beyond
the true vocabulary. The logits of these rows are cut off, so that both models generate only tokens of the true
vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

Mode = Literal["greedy", "sampled"]
MODES: tuple[Mode, ...] = ("greedy", "sampled")
"""Decoding modes: greedy (argmax), or sampled (temperature 1, whole vocabulary)."""


@dataclass(frozen=True, kw_only=True)
class SpeculativeResult:
    """Counts of one decoding mode, summed over all prompts. The prompts are decoded one at a time.

    In `transformers`, one target call verifies up to gamma drafted tokens and adds one token of the target. The draft
    stops early at an end-of-text token, and one token before `max_new_tokens`. Fewer than gamma tokens are then
    drafted, and the tokens that were not drafted count neither as drafted nor as rejected.
    """

    mode: Mode
    gamma: int
    """Maximum number of tokens drafted per target call."""
    max_new_tokens: int
    """Maximum number of tokens generated per prompt."""
    seed: int
    """Prompt i is sampled with seed + i, both with and without the draft. Greedy decoding ignores the seed."""
    prompts: int
    """Number of prompts."""
    emitted: int
    """Number of tokens generated with the draft."""
    target_calls: int
    """Number of forward passes of the target when the draft is used, including the pass that reads the prompt."""
    drafted: int
    """Number of tokens that the draft proposed, including those after a rejected token."""
    accepted: int
    """Number of drafted tokens that are part of the generated text."""
    rejections: int
    """Number of target calls that rejected a drafted token. Each such call counts once, however many drafted tokens
    follow the rejected one."""
    seconds: float
    """Generation time with the draft, in seconds."""
    plain_emitted: int
    """Number of tokens that the target generated without the draft. Sampled texts differ from those generated with
    the draft, but they have the same distribution."""
    plain_seconds: float
    """Generation time without the draft, in seconds."""
    greedy_text_identical: int | None
    """Number of prompts whose greedy text is the same with and without the draft; None in mode "sampled". Two texts
    differ only if two logits of the target are so close that rounding decides which one is larger."""

    @property
    def alpha(self) -> float:
        """Acceptance rate: accepted / (accepted + rejections), in [0, 1].

        Tokens after the first rejection of a call are not counted. In the mode "sampled", the rate estimates the mean
        of sum_v min(p_v, q_v) on text that the target wrote, where p is the target and q the draft. In the mode
        "greedy", the rate estimates how often the likeliest tokens of both models are equal on such text.
        """
        return self.accepted / (self.accepted + self.rejections)

    @property
    def accepted_per_drafted(self) -> float:
        """Accepted tokens divided by all drafted tokens. Tokens that were drafted after a rejected one are included.

        vLLM calls this the draft acceptance rate.
        """
        return self.accepted / self.drafted

    @property
    def tau(self) -> float:
        """Block efficiency: emitted tokens per target call, in [1, gamma + 1]."""
        return self.emitted / self.target_calls

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens per second with the draft."""
        return self.emitted / self.seconds

    @property
    def plain_tokens_per_s(self) -> float:
        """Emitted tokens per second without the draft."""
        return self.plain_emitted / self.plain_seconds

    def to_json(self) -> dict[str, Any]:
        """Returns all fields and rates as JSON values."""
        rates = ("alpha", "accepted_per_drafted", "tau", "tokens_per_s", "plain_tokens_per_s")
        return asdict(self) | {name: getattr(self, name) for name in rates}


def measure_acceptance(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    mode: Mode,
    vocab_size: int,
    gamma: int,
    max_new_tokens: int,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> SpeculativeResult:
    """Generates a text from each prompt, once with and once without the draft; counts tokens and time.

    Args:
        target: A causal LM. Its generation config is ignored except for the end-of-text tokens.
        draft: A smaller causal LM with the same tokenizer.
        prompts: Token ids of each prompt; at least one prompt, and at least one id in each.
        mode: "greedy" (argmax) or "sampled" (temperature 1, whole vocabulary).
        vocab_size: The tokenizer's true vocabulary size. Either model may pad its embeddings beyond it.
        gamma: Maximum number of tokens drafted per target call; at least 1.
        max_new_tokens: Maximum number of tokens generated per prompt; at least 2: the last token is never drafted.
        seed: Seed of the sampling. Prompt i uses seed + i.
        progress: Called with 1 after each prompt.

    Raises:
        ValueError: An argument is out of its range, or a model's vocabulary is smaller than the tokenizer's.
    """
    check_settings(mode=mode, gamma=gamma, max_new_tokens=max_new_tokens)
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none; give at least one")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"every prompt must have at least one token, got prompts[{empty[0]}] without any; remove it")
    for name, model in (("target", target), ("draft", draft)):
        if (size := model.config.get_text_config().vocab_size) < vocab_size:
            raise ValueError(
                f"{name} must have a vocabulary of at least the tokenizer's {vocab_size}, got vocab_size={size}; "
                "give a model of the same family"
            )
    decoder = _Decoder(target, draft, mode=mode, gamma=gamma)
    texts: list[tuple[list[int], list[int]]] = []
    seconds = [0.0, 0.0]
    # fork_rng always restores the random state of the CPU, but that of a GPU only if the GPU is named.
    devices = [target.device] if target.device.type == "cuda" else []
    with decoder.neutral(vocab_size), torch.random.fork_rng(devices=devices):
        for assisted in (False, True):  # The first calls include set-up work and are not timed.
            decoder.generate(prompts[0], 2, assisted=assisted)
        decoder.counts = _Counts()
        for i, prompt in enumerate(prompts):
            pair = []
            for assisted in (False, True):
                # Each prompt has a seed of its own, so its sampled text does not depend on the prompts before it.
                torch.manual_seed(seed + i)
                started = time.perf_counter()
                pair.append(decoder.generate(prompt, max_new_tokens, assisted=assisted))
                seconds[assisted] += time.perf_counter() - started
            texts.append((pair[0], pair[1]))
            if progress is not None:
                progress(1)
    return SpeculativeResult(
        mode=mode,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        seed=seed,
        prompts=len(prompts),
        emitted=sum(len(with_draft) for _, with_draft in texts),
        seconds=seconds[True],
        plain_emitted=sum(len(plain) for plain, _ in texts),
        plain_seconds=seconds[False],
        greedy_text_identical=sum(plain == with_draft for plain, with_draft in texts) if mode == "greedy" else None,
        **asdict(decoder.counts),
    )


def check_settings(*, mode: str, gamma: int, max_new_tokens: int) -> None:
    """Raises ValueError if an argument of `measure_acceptance` is out of its range."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got mode={mode}")
    if gamma < 1:
        raise ValueError(f"gamma must be at least 1, got gamma={gamma}; 5 is usual")
    if max_new_tokens < 2:
        raise ValueError(
            f"max_new_tokens must be at least 2 because the last token is never drafted, got "
            f"max_new_tokens={max_new_tokens}; 64 is usual"
        )


@dataclass(slots=True, kw_only=True)
class _Counts:
    target_calls: int = 0
    drafted: int = 0
    accepted: int = 0
    rejections: int = 0


@dataclass(kw_only=True)
class _CountingCandidates:
    """Wraps transformers' generator of candidate tokens, and counts the tokens of every round of the decoding loop."""

    inner: Any
    counts: _Counts
    requires_model_outputs: bool = False
    _drafted: list[int] = field(default_factory=list)
    _length: int = 0

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        candidates, logits = self.inner.get_candidates(input_ids)
        self._length = input_ids.shape[1]
        self._drafted = candidates[0, self._length :].tolist()
        return candidates, logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Counts the drafted and accepted tokens of a round. `input_ids` already holds the tokens of this round.

        The number of accepted tokens is found by comparing the drafted tokens with `input_ids`. This is exact, because
        the target never replaces a rejected token with the same token. `num_matches` is not used: if the last accepted
        token ends the text, no token of the target follows it, and `num_matches` is one too low.
        """
        emitted = input_ids[0, self._length :].tolist()
        accepted = 0
        # The accepted tokens are the longest common prefix of the drafted and the emitted tokens.
        while accepted < min(len(emitted), len(self._drafted)) and emitted[accepted] == self._drafted[accepted]:
            accepted += 1
        self.counts.target_calls += 1
        self.counts.drafted += len(self._drafted)
        self.counts.accepted += accepted
        self.counts.rejections += accepted < len(self._drafted)
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)


class _Decoder:
    """A target and a draft, prepared for one decoding mode."""

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel, *, mode: Mode, gamma: int) -> None:
        self._target: Any = target  # The type PreTrainedModel does not declare generate().
        self._draft = draft
        self._gamma = gamma
        self.counts = _Counts()
        eos = target.generation_config.eos_token_id
        first = eos[0] if isinstance(eos, list) else eos
        self._ends = {"eos_token_id": eos, "pad_token_id": 0 if first is None else first}
        # These settings must be explicit: transformers' default is top_k=50.
        self._sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if mode == "sampled" else {}

    @contextlib.contextmanager
    def neutral(self, vocab_size: int) -> Iterator[None]:
        """Context manager in which both models ignore the generation configs of their checkpoints."""
        # Assisted generation reads its settings for drafting from the draft's generation config.
        drafting = GenerationConfig(
            num_assistant_tokens=self._gamma,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            **self._ends,
        )
        with contextlib.ExitStack() as stack:
            # Assisted generation sets options that make generate() print warnings, so these warnings are hidden.
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            stack.enter_context(_prepared(self._target, GenerationConfig(**self._ends), vocab_size))
            stack.enter_context(_prepared(self._draft, drafting, vocab_size))
            yield

    def generate(self, prompt: Sequence[int], max_new_tokens: int, *, assisted: bool) -> list[int]:
        """Returns the new tokens, including the end-of-text token if one was generated."""
        input_ids = torch.tensor([list(prompt)], device=self._target.device)
        config = GenerationConfig(max_new_tokens=max_new_tokens, **self._sampling, **self._ends)
        with self._counted():
            text: Tensor = self._target.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                assistant_model=self._draft if assisted else None,
            )
        return text[0, len(prompt) :].tolist()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Context manager in which every round of `generate` is counted."""
        make = self._target._get_candidate_generator

        def make_counting(**arguments: Any) -> _CountingCandidates:  # noqa: ANN401
            return _CountingCandidates(inner=make(**arguments), counts=self.counts)

        self._target._get_candidate_generator = make_counting
        try:
            yield
        finally:
            # Without the attribute of the instance, the method of the class is used again.
            del self._target._get_candidate_generator


@contextlib.contextmanager
def _prepared(model: PreTrainedModel, generation_config: GenerationConfig, vocab_size: int) -> Iterator[None]:
    """Context manager that gives a model another generation config, and limits its logits to the true vocabulary.

    The model is also switched to evaluation mode. All three changes are undone at the end.
    """
    config = model.config.get_text_config()
    before = model.generation_config, config.vocab_size, model.training
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, _inputs, logits: logits[..., :vocab_size])
    # generate() refuses two models whose configs have different vocabulary sizes.
    model.generation_config, config.vocab_size = generation_config, vocab_size
    model.eval()
    try:
        yield
    finally:
        hook.remove()
        model.generation_config, config.vocab_size = before[:2]
        model.train(before[2])
