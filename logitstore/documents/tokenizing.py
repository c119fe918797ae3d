"""Turns records of a data set into token ids and loss masks of documents. Uses a tokenizer, but no store.

T: number of tokens in one document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from logitstore.documents.chat_template import response_spans, without_filler
from logitstore.documents.loss_mask import split_windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore.documents.columns import Kind
    from logitstore.documents.records import Records


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Callable that turns batches of records into documents. `Dataset.map` runs it in several processes."""

    records: Records
    """Reader of the records."""
    tokenizer: PreTrainedTokenizerBase
    columns: list[str]
    """Columns from which documents are made."""
    kind: Kind
    """Kind of the records."""
    vocab_size: int
    """Size of the tokenizer's vocabulary. Every id in the column `input_ids` must be below this size."""
    max_length: int
    """Largest number of tokens in a document, at least 2. Longer documents are split into windows."""

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Tokenises a batch of records.

        Args:
            batch: Values of each column of the table of records.
            indices: Number of the table row that each record comes from.

        Returns:
            Three columns with one row for each document:
            ids, mask: token ids and loss mask. A document in which no prediction counts is dropped: both are empty.
            Dropped documents are not filtered out, so that the values of many documents stay contiguous in memory.
            unlocated: number of the record's assistant turns that were not found in the rendered conversation. The
            first document of the record has this number; the record's other documents have 0.

        Raises:
            ValueError: A record is malformed. The message says where the record is in the data.
        """
        places, values = [], []
        for index, record in self.records.read(batch, indices):
            places.append(index)
            values.append([self._field(record, name, index) for name in self.columns])
        documents: dict[str, list[Any]] = {"ids": [], "mask": [], "unlocated": []}
        for ids, counted, unlocated in self._encode(places, values) if places else ():
            windows = list(split_windows(np.asarray(ids, dtype=np.int32), counted, self.max_length))
            documents["ids"] += [window for window, _ in windows]
            documents["mask"] += [mask for _, mask in windows]
            documents["unlocated"] += [unlocated, *[0] * (len(windows) - 1)]
        return documents

    def _bad(self, index: int, name: str, rule: str, found: object) -> ValueError:
        place = self.records.place(index)
        return ValueError(f"{name} must be {rule}, got {name}={found!r:.80} in {place}; fix or remove that record")

    def _field(self, record: dict[str, Any], name: str, index: int) -> Any:  # noqa: ANN401
        """Returns the value of one column of a record after checking it.

        Raises:
            ValueError: The column is missing, or its value has the wrong type or range.
        """
        if name not in record:
            raise self._bad(index, name, "in every record", None)
        value = record[name]
        if name in ("input_ids", "loss_mask"):
            limit = self.vocab_size if name == "input_ids" else 2
            if not isinstance(value, list):
                raise self._bad(index, name, "a list of integers", value)
            # For an empty list, np.asarray would make an array of floats.
            try:
                array = np.asarray(value or np.zeros(0, np.int64))
            except ValueError as error:  # NumPy refuses nested lists of different lengths.
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
        # A JSON escape may stand for half of a surrogate pair, which is not valid Unicode text.
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self._bad(index, name, "text without lone surrogates", value[error.start]) from error
        return value

    def _encode(
        self, places: list[int], values: list[list[Any]]
    ) -> Iterator[tuple[list[int] | NDArray[Any], NDArray[np.bool_], int]]:
        """Tokenises records.

        Args:
            places: Number of the table row that each record comes from, for error messages.
            values: Values of the columns of each record.

        Yields:
            For each record: its token ids [T], whether the prediction of each token counts [T], and the number of
            assistant turns that were not found.
        """
        eos = self.tokenizer.eos_token_id
        if self.kind == "text":
            for ids in self._tokenize([text for (text,) in values], special=True):
                if eos is not None and ids[-1:] != [eos]:
                    ids.append(eos)
                yield ids, np.ones(len(ids), dtype=bool), 0
        elif self.kind == "prompt_response":
            # Prompt and response are tokenised separately, because an inference server tokenises the prompt alone.
            # Tokens that span the boundary of prompt and response would never occur on the server.
            prompts = self._tokenize([prompt for prompt, _ in values], special=True)
            responses = self._tokenize([response for _, response in values], special=False)
            for prompt, response in zip(prompts, responses, strict=True):
                if eos is not None:
                    # Some tokenizers append the end token to the prompt too. It may only follow the response.
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
        # verbose=False turns off the warning about texts longer than the model's context. The warning is not needed,
        # because such texts are split into windows.
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
        # The text of the template already contains the special tokens.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for i, located in enumerate(spans):
            begins, ends = np.asarray(encoded["offset_mapping"][i], dtype=np.int64).reshape(-1, 2).T
            counted = np.zeros(len(begins), dtype=bool)
            for start, stop in located:
                # A token counts if it begins in the span or extends into the span. The first condition is needed for a
                # token of only spaces, whose range is empty if the tokenizer leaves leading spaces out of the offsets.
                counted |= (begins < stop) & ((ends > start) | (begins >= start))
            yield encoded["input_ids"][i], counted, unlocated[i]
