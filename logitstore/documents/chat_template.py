"""Renders conversations with the tokenizer's chat template, and finds the assistant's turns in the text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Tag with which a chat template marks the beginning of text that the assistant generates."""


def without_filler(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Removes the fields whose value is None from each message, except `content`.

    In a typed table, all messages have the same fields. A field that a message did not have originally is filled with
    None. A chat template would treat the filled field as one that the user gave.
    """
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, ask: bool) -> str:
    """Renders a conversation with the tokenizer's chat template.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: The conversation.
        ask: Whether to add the text that asks for the assistant's next turn (`add_generation_prompt`).

    Raises:
        TemplateError, TypeError: The template does not compile, or does not accept the conversation.
    """
    render_all: Any = chat_template_utils.render_jinja_template
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    template = tokenizer.get_chat_template()
    (text,), _ = render_all([messages], chat_template=template, add_generation_prompt=ask, **special)
    return str(text)


def response_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]], int]:
    """Renders a conversation and finds the text that the assistant generates in it.

    If the template has `{% generation %}`, the generated text is the text that this tag encloses. Otherwise, two
    renderings are compared for each assistant turn. The first consists of the messages before the turn, followed by the
    generation prompt. The second consists of the messages up to and including the turn. The generated text of the turn
    is what the second rendering adds to the first. White space after an end-of-turn token is excluded, because
    generation stops at that token.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: The conversation.

    Returns:
        The rendered text, the character ranges (start, stop) of the generated text, and the number of assistant turns
        that were not found. A turn is not found in three cases: it is the first message, the template renders it
        differently when later messages follow, or the rendered turn does not begin with the generation prompt.

    Raises:
        TemplateError, TypeError: The template does not compile, or does not accept the conversation.
    """
    template = tokenizer.get_chat_template()
    # apply_chat_template can compute a token mask, but this mask is wrong for tokenizers whose offsets leave out the
    # space before a word. A turn that begins with a space would be lost, together with all later turns, and a turn that
    # ends with a space would never end.
    if GENERATION.search(template):
        render_all: Any = chat_template_utils.render_jinja_template
        special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        (text,), (spans,) = render_all([messages], chat_template=template, return_assistant_tokens_mask=True, **special)
        return text, spans, 0

    text = render(tokenizer, messages, ask=False)
    ends_of_turn = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    found, missed = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:i], ask=True) if i else None
        answered = render(tokenizer, messages[: i + 1], ask=False)
        # The position of the turn in the text is known only if the text begins with both of the shorter renderings.
        if asked is None or not (text.startswith(answered) and answered.startswith(asked)):
            missed += 1
            continue
        stripped = answered.rstrip()
        stop = len(stripped) if stripped.endswith(ends_of_turn) else len(answered)
        found.append((len(asked), max(stop, len(asked))))
    return text, found, missed
