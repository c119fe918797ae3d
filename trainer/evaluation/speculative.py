"""Acceptance rate of a draft as it is: real speculative decoding with transformers' assisted generation, counted.

Both models answer from their true vocabulary (padding rows of the output embedding never do, however many each has),
at temperature 1 without any truncation or penalty, whatever their checkpoints' generation configs say.
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


@dataclass(frozen=True, kw_only=True)
class SpeculativeResult:
    """One decoding mode over some prompts, one at a time. Sums over all prompts.

    The target's calls, drafted and accepted tokens are those of `transformers`: a call verifies up to gamma drafted
    tokens and adds one of its own. The draft stops early at an end-of-text token and one token before
    `max_new_tokens`; what it did not draft counts nowhere.
    """

    mode: Mode
    gamma: int
    """Most tokens drafted per target call."""
    max_new_tokens: int
    seed: int
    """Prompt i is sampled with seed + i, with the draft and without it; of no effect when greedy."""
    prompts: int
    emitted: int
    """Tokens generated with the draft."""
    target_calls: int
    """Target forwards with the draft, the one that reads the prompt among them."""
    drafted: int
    """Tokens that the draft proposed, those after a rejected one included."""
    accepted: int
    """Drafted tokens that are part of the text."""
    rejections: int
    """Target calls in which a drafted token was rejected: one token each, those after it were not looked at."""
    seconds: float
    """With the draft."""
    plain_emitted: int
    """Tokens that the target generated alone; when sampled it is another text of the same distribution."""
    plain_seconds: float
    """Without the draft."""
    greedy_text_identical: int | None
    """Prompts whose text with the draft is exactly the target's own; None when sampled. Below `prompts` only where
    two logits of the target are so close that rounding decides."""

    @property
    def alpha(self) -> float:
        """The share accepted of the drafted tokens that were looked at: accepted / (accepted + rejections).

        Tokens after the first rejection of a call are not counted. Estimates E[sum_v min(p, q)] when sampled and the
        argmax agreement when greedy, on text that the target wrote.
        """
        return self.accepted / (self.accepted + self.rejections)

    @property
    def accepted_per_drafted(self) -> float:
        """The share accepted of all drafted tokens, those after a rejection too: vLLM's draft acceptance rate."""
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
        """Emitted tokens per second of the target alone."""
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
    """Generates from each prompt with the draft and without it, and counts.

    Args:
        target: A causal LM. Its generation config says which tokens end a text, and nothing else.
        draft: A smaller one with the same tokenizer.
        prompts: Token ids of each, at least one id in each.
        mode: greedy (argmax) or sampled (temperature 1, whole vocabulary).
        vocab_size: The tokenizer's true vocabulary; both models may pad theirs beyond it, each by its own number.
        gamma: Tokens drafted per target call.
        max_new_tokens: Most tokens generated per prompt, at least 2: a last token is never drafted.
        seed: Of the sampling.
        progress: Called with 1 after each prompt.

    Raises:
        ValueError: An argument is out of its range, or a model's vocabulary is smaller than the tokenizer's.
    """
    check_settings(mode=mode, gamma=gamma, max_new_tokens=max_new_tokens)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"prompts must be at least one of at least one token, got prompts={len(prompts)}")
    for name, model in (("target", target), ("draft", draft)):
        if (size := model.config.get_text_config().vocab_size) < vocab_size:
            raise ValueError(
                f"{name} must have a vocabulary of at least {vocab_size} as the tokenizer, got vocab_size={size}; "
                "give a model of the same family"
            )
    decoder = _Decoder(target, draft, mode=mode, gamma=gamma)
    texts: list[tuple[list[int], list[int]]] = []
    seconds = [0.0, 0.0]
    devices = [target.device] if target.device.type == "cuda" else []
    with decoder.neutral(vocab_size), torch.random.fork_rng(devices=devices):
        for assisted in (False, True):  # what a first call sets up is not timed
            decoder.generate(prompts[0], 2, assisted=assisted)
        decoder.counts = _Counts()
        for i, prompt in enumerate(prompts):
            pair = []
            for assisted in (False, True):
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
            f"max_new_tokens must be at least 2 because a last token is never drafted, got "
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
    """Stands between the target's decoding loop and the generator of candidates, and counts each round."""

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
        """`input_ids` holds the round's tokens by now.

        `num_matches` is one short where the last accepted token ends the text: then there is no token of the target's
        own after it. A token in place of a rejected one always differs from it, so that comparing gives the number.
        """
        emitted = input_ids[0, self._length :].tolist()
        accepted = 0
        while accepted < min(len(emitted), len(self._drafted)) and emitted[accepted] == self._drafted[accepted]:
            accepted += 1
        self.counts.target_calls += 1
        self.counts.drafted += len(self._drafted)
        self.counts.accepted += accepted
        self.counts.rejections += accepted < len(self._drafted)
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)


class _Decoder:
    """A target and a draft, set up for one mode."""

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel, *, mode: Mode, gamma: int) -> None:
        self._target: Any = target  # with generate(), which PreTrainedModel's type does not have
        self._draft = draft
        self._gamma = gamma
        self.counts = _Counts()
        eos = target.generation_config.eos_token_id
        first = eos[0] if isinstance(eos, list) else eos
        self._ends = {"eos_token_id": eos, "pad_token_id": 0 if first is None else first}
        # top_k is 50 where nothing else is said
        self._sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if mode == "sampled" else {}

    @contextlib.contextmanager
    def neutral(self, vocab_size: int) -> Iterator[None]:
        """Takes all but the weights out of the result, and puts it back afterwards."""
        # The draft's own generation config is where its part in assisted generation is read from.
        drafting = GenerationConfig(
            num_assistant_tokens=self._gamma,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            **self._ends,
        )
        with contextlib.ExitStack() as stack:
            # generate() warns of settings that its own assisted generation makes
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            stack.enter_context(_prepared(self._target, GenerationConfig(**self._ends), vocab_size))
            stack.enter_context(_prepared(self._draft, drafting, vocab_size))
            yield

    def generate(self, prompt: Sequence[int], max_new_tokens: int, *, assisted: bool) -> list[int]:
        """Returns the new tokens, an end-of-text token among them."""
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
        make = self._target._get_candidate_generator

        def make_counting(**arguments: Any) -> _CountingCandidates:  # noqa: ANN401
            return _CountingCandidates(inner=make(**arguments), counts=self.counts)

        self._target._get_candidate_generator = make_counting
        try:
            yield
        finally:
            del self._target._get_candidate_generator


@contextlib.contextmanager
def _prepared(model: PreTrainedModel, generation_config: GenerationConfig, vocab_size: int) -> Iterator[None]:
    """Gives a model another generation config and logits of the true vocabulary alone, for a while."""
    config = model.config.get_text_config()
    before = model.generation_config, config.vocab_size, model.training
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, _inputs, logits: logits[..., :vocab_size])
    # generate() refuses two models whose configs state different sizes
    model.generation_config, config.vocab_size = generation_config, vocab_size
    model.eval()
    try:
        yield
    finally:
        hook.remove()
        model.generation_config, config.vocab_size = before[:2]
        model.train(before[2])
