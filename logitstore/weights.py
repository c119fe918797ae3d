"""Loading a model's weights for a person: one line where they are no good, and no bars where none are wanted."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from transformers.utils import logging

from logitstore.causal_lm import load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def load_weights(
    name: str,
    *,
    what: str,
    revision: str | None,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    device: str,
) -> PreTrainedModel:
    """Loads a causal LM that has been checked by `logitstore.causal_lm.check_model`.

    Args:
        name: Hugging Face id or folder.
        what: Its part, for the message: target, draft.
        revision: Branch, tag or commit of the hub.
        dtype: Of the weights; "auto" takes the configuration's.
        attn_implementation: As transformers names them; None takes its own choice.
        trust_remote_code: Whether code from its repository may run.
        device: Where it goes.

    Raises:
        ValueError: Its weights cannot be read, or the implementation of attention is none that it can have here.
    """
    try:
        return load_model(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device=device,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{what} must have weights that can be read, got {what}={name} ({error}); copy or download it again"
        ) from error
    except (ImportError, ValueError) as error:
        if attn_implementation is None:
            raise
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"attn_implementation must be one that {what}={name} can run with here, got attn_implementation="
            f"{attn_implementation} ({reason}); leave it out, or give sdpa or eager"
        ) from error


@contextmanager
def loading_bars(wanted: bool) -> Iterator[None]:
    """Turns transformers' own progress bars, of loading and saving weights, off for a while unless they are wanted."""
    if wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
