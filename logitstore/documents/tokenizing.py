"""Records of a data set -> token ids and masks of documents, by a tokenizer. Pure but for the tokenizer; no store.

T tokens of one document.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore.documents.records import Records

Kind = Literal["text", "prompt_response", "messages", "input_ids"]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_response": ("prompt", "response"),
    "text": ("text",),
    "input_ids": ("input_ids",),
}
"""Which columns make which kind of document; the first kind whose columns are there is taken."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def choose_columns(names: list[str]) -> list[str]:
    """Picks the columns that make documents.

    Raises:
        ValueError: No kind of document can be made from these columns.
    """
    for columns in COLUMNS.values():
        if all(name in names for name in columns):
            extra = ["loss_mask"] if columns == ("input_ids",) and "loss_mask" in names else []
            return [*columns, *extra]
    raise ValueError(
        "columns must include messages, or prompt and response, or text, or input_ids (with loss_mask or without), "
        f"got columns={', '.join(names) or 'none'}; rename those that hold the documents"
    )


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns batches of records into documents, in whichever process. Calling it is what datasets' map does."""

    records: Records
    tokenizer: PreTrainedTokenizerBase
    columns: list[str]
    kind: Kind
    vocab_size: int
    max_length: int

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Tokenises a batch.

        Returns:
            ids and mask, a row for each document, empty for a dropped one: rows of the result need not be filtered
            again, and the values of many documents are one run in memory. unlocated: assistant turns of a record
            that the template's text does not show, at the record's first document.
        """
        places, values = [], []
        for index, record in self.records.read(batch, indices):
            places.append(index)
            values.append([self._field(record, name, index) for name in self.columns])
        documents: dict[str, list[Any]] = {"ids": [], "mask": [], "unlocated": []}
        for ids, counted, unlocated in self._encode(places, values) if places else ():
            windows = list(split(np.asarray(ids, dtype=np.int32), counted, self.max_length))
            documents["ids"] += [window for window, _ in windows]
            documents["mask"] += [mask for _, mask in windows]
            documents["unlocated"] += [unlocated, *[0] * (len(windows) - 1)]
        return documents

    def _bad(self, index: int, name: str, rule: str, found: object) -> ValueError:
        place = self.records.place(index)
        return ValueError(f"{name} must be {rule}, got {name}={found!r:.80} in {place}; mend or remove that record")

    def _field(self, record: dict[str, Any], name: str, index: int) -> Any:  # noqa: ANN401
        """Returns one column of a record, checked."""
        if name not in record:
            raise self._bad(index, name, "in every record", None)
        value = record[name]
        if name in ("input_ids", "loss_mask"):
            limit = self.vocab_size if name == "input_ids" else 2
            if not isinstance(value, list):
                raise self._bad(index, name, "a list of integers", value)
            try:
                array = np.asarray(value or np.zeros(0, np.int64))
            except ValueError as error:  # lists of several lengths
                raise self._bad(index, name, "a list of integers", value) from error
            if array.ndim != 1 or array.dtype.kind not in ("iu" if name == "input_ids" else "iub"):
                raise self._bad(index, name, "a list of integers", value)
            if len(array) and not 0 <= int(array.min()) <= int(array.max()) < limit:
                wrong = array[(array < 0) | (array >= limit)][0]
                raise self._bad(index, name, f"at least 0 and below {limit}", int(wrong))
            return array
        if name == "messages":
            if not isinstance(value, list) or not value:
                raise self._bad(index, name, "a list of messages", value)
            for message in value:
                if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                    raise self._bad(index, name, "a list of objects with role and content", message)
            return without_filler(value)
        if not isinstance(value, str):
            raise self._bad(index, name, "text", value)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self._bad(index, name, "text without lone surrogates", value[error.start]) from error
        return value

    def _encode(
        self, places: list[int], values: list[list[Any]]
    ) -> Iterator[tuple[list[int] | NDArray[Any], NDArray[np.bool_], int]]:
        """Yields token ids [T], whether each token is one to be predicted [T], and turns not located, by record."""
        eos = self.tokenizer.eos_token_id
        if self.kind == "text":
            for ids in self._tokenize([text for (text,) in values], special=True):
                if eos is not None and ids[-1:] != [eos]:
                    ids.append(eos)
                yield ids, np.ones(len(ids), dtype=bool), 0
        elif self.kind == "prompt_response":
            # Each on its own: at serving time the prompt is tokenised alone, and no token spans the border.
            prompts = self._tokenize([prompt for prompt, _ in values], special=True)
            responses = self._tokenize([response for _, response in values], special=False)
            for prompt, response in zip(prompts, responses, strict=True):
                if eos is not None:
                    if prompt[-1:] == [eos]:
                        prompt.pop()
                    response.append(eos)
                yield prompt + response, np.arange(len(prompt) + len(response)) >= len(prompt), 0
        elif self.kind == "messages":
            yield from self._encode_messages(places, [messages for (messages,) in values])
        else:
            for index, (ids, *mask) in zip(places, values, strict=True):
                if mask and len(mask[0]) != len(ids):
                    raise self._bad(index, "loss_mask", f"as long as input_ids, which has {len(ids)}", mask[0])
                yield ids, mask[0].astype(bool) if mask else np.ones(len(ids), dtype=bool), 0

    def _tokenize(self, texts: list[str], *, special: bool) -> list[list[int]]:
        # verbose=False: a text longer than the model's context is no fault here, it is split into windows
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _encode_messages(
        self, places: list[int], conversations: list[list[dict[str, Any]]]
    ) -> Iterator[tuple[list[int], NDArray[np.bool_], int]]:
        texts, spans, unlocated = [], [], []
        for index, messages in zip(places, conversations, strict=True):
            try:
                text, located, missed = response_spans(self.tokenizer, messages)
            except (TemplateError, TypeError) as error:
                reason = f"a conversation that the chat template accepts ({str(error).strip()[:80]})"
                raise self._bad(index, "messages", reason, messages) from error
            texts.append(text)
            spans.append(located)
            unlocated.append(missed)
        # The template writes the special tokens itself.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for i, located in enumerate(spans):
            begins, ends = np.asarray(encoded["offset_mapping"][i], dtype=np.int64).reshape(-1, 2).T
            counted = np.zeros(len(begins), dtype=bool)
            for start, stop in located:
                # Offsets may leave out the space that begins a token, so that one of spaces alone is empty: a token
                # counts where it begins in the span, or reaches into it.
                counted |= (begins < stop) & ((ends > start) | (begins >= start))
            yield encoded["input_ids"][i], counted, unlocated[i]


def without_filler(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops the fields without a value, but for the content.

    Typed tables fill the fields that other records' messages have with None: templates take them for given.
    """
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, ask: bool) -> str:
    """Renders a conversation by the chat template, if `ask` with what asks for the next turn of the assistant."""
    render_all: Any = chat_template_utils.render_jinja_template
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    template = tokenizer.get_chat_template()
    (text,), _ = render_all([messages], chat_template=template, add_generation_prompt=ask, **special)
    return str(text)


def response_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]], int]:
    """Renders a conversation and finds what the model has to say in it.

    With `{% generation %}` in the template, that is what it encloses. Without, an assistant turn is what its message
    adds to the text that asks for it; white space that the template writes after an end-of-turn token is no part of
    it, because generation stops at that token.

    Returns:
        The text, its spans of characters that count, and the number of assistant turns that could not be located
        because the template writes them otherwise once more messages follow.
    """
    template = tokenizer.get_chat_template()
    # apply_chat_template's own mask of tokens will not do: where the tokenizer leaves the space before a word out of
    # the token's offsets, a turn that begins with one is lost with all that follow, and one that ends so never ends.
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
        if asked is None or not (text.startswith(answered) and answered.startswith(asked)):
            missed += 1
            continue
        stripped = answered.rstrip()
        stop = len(stripped) if stripped.endswith(ends_of_turn) else len(answered)
        found.append((len(asked), max(stop, len(asked))))
    return text, found, missed


def split(
    ids: NDArray[np.int32], counted: NDArray[np.bool_], max_length: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
    """Moves the mask from tokens to the rows that predict them, and splits into windows of at most max_length tokens.

    Args:
        ids: [T]
        counted: [T]: whether each token is one to be predicted.
        max_length: At least 2.

    Yields:
        Ids and row mask of each window; both empty where no prediction counts.
    """
    mask = np.zeros(len(ids), dtype=np.uint8)
    mask[:-1] = counted[1:]
    # Windows overlap by one token: the last of a window predicts nothing there, so it is also the first of the next,
    # where its prediction is made, though with nothing of the context before it.
    for start in range(0, max(len(ids) - 1, 1), max_length - 1):
        window = slice(start, start + max_length)
        row_mask = mask[window].copy()
        row_mask[-1:] = 0
        yield (ids[window], row_mask) if row_mask.any() else (ids[:0], row_mask[:0])
