"""The model card of a draft: what it was distilled from and how, the numbers, and commands that serve it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from logitstore.format.schemes import describe
from logitstore.storage.options import without_credentials

if TYPE_CHECKING:
    from collections.abc import Mapping

    from logitstore.format.spec import StoreSpec

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PACKAGES = ("logitstore", "torch", "transformers")
"""Whose versions the card states."""
TAGS = ("speculative-decoding", "draft-model", "distillation", "logitstore")
WORDS = {
    "steps": "optimizer steps",
    "train_runtime": "seconds of training since it last began or went on",
    "loss": "mean loss of a step",
    "rows_per_second": "rows per second in that time, kept or not",
    "alpha": "sampling acceptance of a drafted token in the last steps logged, estimate (1)",
    "kl": "KL(target‖draft) of the last steps logged, nats per row (1)",
    "label_nll": "negative logprob of the text itself in the last steps logged, nats per row (1)",
    "eval_alpha_lower": "sampling acceptance of a drafted token on held-out text, lower bound",
    "eval_alpha_upper": "the same, upper bound",
    "eval_alpha_estimate": "the same, estimate",
    "eval_argmax_agreement": "greedy acceptance on held-out text: the likeliest tokens agree",
    "eval_argmax_known": "share of rows whose likeliest token is sure to be stored",
    "eval_forward_kl": "KL(target‖draft) on held-out text, nats per row",
    "eval_label_nll": "negative logprob of held-out text itself, nats per row",
    "eval_documents": "documents held out and evaluated on",
    "eval_rows": "rows of them",
}
"""What figures are called; those without a word go by their own name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a draft was trained, for the card."""

    draft: str
    """What it began as: a Hugging Face id, a folder, or a few words where it was made anew."""
    objective: str
    selection: str
    """With its settings, such as "adaspec, keep 0.4"."""
    figures: Mapping[str, float]
    """Numbers by name, in the order to be shown."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Training arguments by name."""
    weights: str | None = None
    """Which they are, if not those of the last step."""
    vocab_sizes: tuple[int, int] | None = None
    """Rows of the embeddings of draft and target, if they differ."""
    command: str | None = None
    """What repeats it."""
    gamma: int = 5
    """Tokens that the commands draft per target call."""


def model_card(name: str, stores: Mapping[str, StoreSpec], training: Training) -> str:
    """Writes README.md of a draft.

    Args:
        name: What it is called where it will be served from: a folder or Hugging Face id.
        stores: What it was trained on, by how it is called: URLs, whose credentials are left out.
        training: How.

    Returns:
        Markdown with a YAML header, as the hub reads it.
    """
    spec = next(iter(stores.values()))
    target = spec.target.model if spec.target is not None else None
    served = "TARGET" if target is None else without_credentials(target.name)
    parts = [
        _header(training.draft, served),
        f"# A draft for {served}\n\nProposes tokens that {served} then checks, in speculative decoding: the text is "
        "the target's own, sooner. It is of no use on its own.",
        _origin(stores, served, training),
        _numbers(training.figures),
        _commands(name, served, training),
        "## Versions\n\n" + ", ".join(filter(None, map(_version, PACKAGES))),
    ]
    return "\n\n".join(parts) + "\n"


def _header(draft: str, target: str) -> str:
    # JSON strings are YAML strings, whatever is in them
    tags = "\n".join(f"- {tag}" for tag in TAGS)
    models = f"target_model: {json.dumps(target)}"
    if HUB_ID.fullmatch(draft) and not Path(draft).exists():  # the hub refuses a card that names another
        models = f"base_model: {draft}\n{models}"
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{models}\ntags:\n{tags}\n---"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""


def _origin(stores: Mapping[str, StoreSpec], target: str, training: Training) -> str:
    spec = next(iter(stores.values()))
    model = "" if spec.target is None else f", revision {spec.target.model.revision}, {spec.target.model.dtype}"
    rows = [
        ("began as", without_credentials(training.draft)),
        ("target", target + model),
        ("target's distributions", describe(spec.target.scheme) if spec.target else "none"),
        *(
            pair
            for name, each in stores.items()
            for pair in (
                ("store", without_credentials(name)),
                (
                    "its data",
                    f"{without_credentials(each.data.source)} ({each.data.columns}; loss on {each.data.mask_policy}; "
                    f"documents of at most {each.max_length} tokens)",
                ),
            )
        ),
        ("tokenizer", f"{without_credentials(spec.tokenizer.name)}, {spec.tokenizer.vocab_size} tokens"),
        ("objective", training.objective),
        ("selection of rows", training.selection),
        ("settings", ", ".join(f"{name} {value}" for name, value in training.settings.items())),
        ("weights", training.weights or ""),
    ]
    lines = "\n".join(f"| {what} | {_cell(said)} |" for what, said in rows if said)
    text = f"## How it was made\n\n| | |\n|---|---|\n{lines}"
    if training.command is not None:
        text += f"\n\n```\n{training.command}\n```"
    return text


def _numbers(figures: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {_cell(WORDS.get(name, name))} | {_number(value)} |" for name, value in figures.items())
    return (
        f"## Numbers\n\n| | |\n|---|---|\n{rows}\n\n"
        "(1) Of all rows where the selection looks at the draft, else of the rows that are kept.\n\n"
        "Acceptance here is after the documents' own text; after text that the target writes it is another: measure it "
        "with `jobs/evaluate_draft.py`."
    )


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _commands(name: str, target: str, training: Training) -> str:
    gamma, differ = training.gamma, ""
    if training.vocab_sizes is not None:
        differ = " (they are {:,} and {:,}: it will refuse this draft)".format(*training.vocab_sizes)
    speculative = json.dumps({"method": "draft_model", "model": name, "num_speculative_tokens": gamma})
    large, small, config = (shlex.quote(word) for word in (target, name, speculative))
    return f"""## Serving it

vLLM, where `vocab_size` of both configs must be equal{differ}:

```
vllm serve {large} \\
    --speculative-config {config}
```

SGLang:

```
python -m sglang.launch_server --model-path {large} \\
    --speculative-algorithm STANDALONE --speculative-draft-model-path {small} \\
    --speculative-num-steps {max(1, gamma - 1)} --speculative-eagle-topk 1 --speculative-num-draft-tokens {gamma}
```

transformers, at batch size 1:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({target!r})
target = AutoModelForCausalLM.from_pretrained({target!r}, device_map="auto")
draft = AutoModelForCausalLM.from_pretrained({name!r}, device_map="auto")
draft.generation_config.num_assistant_tokens = {gamma}
draft.generation_config.num_assistant_tokens_schedule = "constant"
draft.generation_config.assistant_confidence_threshold = 0.0
inputs = tokenizer("def fibonacci(n):", return_tensors="pt").to(target.device)
print(tokenizer.decode(target.generate(**inputs, assistant_model=draft, max_new_tokens=64)[0]))
```"""
