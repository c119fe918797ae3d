"""Extracts prompts from the records of `--data`. A prompt holds the tokens that a model is given before it answers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from logitstore.documents.chat_template import render, without_filler
from logitstore.documents.records import open_records
from logitstore.documents.sources import find_source
from logitstore.documents.table import progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_HALF_TOKENS = 64
"""Maximum number of tokens of a prompt that is made from the first half of a text."""


def read_prompts(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    num_prompts: int,
    room: float,
    storage_options: dict[str, Any] | None = None,
) -> tuple[list[list[int]], int]:
    """Reads the first prompts of a data set.

    The prompt of a record depends on its columns:
    - `messages`: the conversation before the last assistant turn; the whole conversation if no such turn exists;
    - `prompt`: the whole column;
    - `text`: the first half of the tokens, at most 64 tokens;
    - `input_ids`: the tokens before the first token that `loss_mask` marks. If there are no such tokens, the first half
      of all tokens, at most 64 tokens.

    Args:
        data: Path, URL or hf:name, in the form that --data of `logitstore dump` accepts.
        tokenizer: The target's tokenizer.
        vocab_size: Size of the tokenizer's vocabulary.
        num_prompts: Largest number of prompts to return.
        room: Maximum number of tokens of a prompt; may be infinite. Longer prompts and empty ones are skipped.
        storage_options: Options for the data's fsspec file system, such as credentials.

    Returns:
        Token ids of each prompt, and the number of records that were skipped.

    Raises:
        ValueError: The data are missing or malformed, or hold no prompt. Or the data are conversations, but the
            tokenizer has no working chat template.
        MissingDriverError: No installed package can open the data's URL.
        StorageError: The data's URL cannot be reached.
    """
    prompts: list[list[int]] = []
    left_out = 0
    with tempfile.TemporaryDirectory(prefix="logitstore-") as folder, progress_bars(False):
        dataset, records, columns = open_records(find_source(data, storage_options), Path(folder), _prompt_columns)
        if columns[0] == "messages" and not tokenizer.chat_template:
            raise ValueError(
                f"target must have a chat template for messages, got target={tokenizer.name_or_path} without one; give "
                "an instruction-tuned model, or data with prompts"
            )
        # Records are read one at a time, so that reading stops as soon as there are enough prompts.
        for index in range(len(dataset)):
            for _, record in records.read(dataset[index : index + 1], [index]):
                try:
                    ids = _prompt_ids(record, columns, tokenizer, vocab_size)
                except TemplateSyntaxError as error:
                    raise ValueError(
                        f"target must have a chat template that compiles, got that of {tokenizer.name_or_path} "
                        f"({str(error)[:80]}); fix the template in its folder"
                    ) from error
                except TemplateError as error:
                    raise ValueError(
                        f"messages must be a conversation that the chat template of {tokenizer.name_or_path} accepts, "
                        f"got {str(record['messages'])!r:.80} in {records.place(index)} ({str(error)[:80]}); change "
                        "that record, or fix the template"
                    ) from error
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{columns[0]} must give a prompt, got {str(record.get(columns[0]))!r:.80} in "
                        f"{records.place(index)} ({str(error)[:80]}); fix or remove that record"
                    ) from error
                if 0 < len(ids) <= room:
                    prompts.append(ids)
                else:
                    left_out += 1
            if len(prompts) == num_prompts:
                break
    if not prompts:
        raise ValueError(
            f"data must hold a prompt of 1 to {room} tokens (the models' context minus max_new_tokens), got "
            f"data={data} with none in {left_out} records; give shorter prompts or a smaller --max_new_tokens"
        )
    return prompts, left_out


def _prompt_columns(names: list[str]) -> list[str]:
    for column in ("messages", "prompt", "text", "input_ids"):
        if column in names:
            return [column, "loss_mask"] if column == "input_ids" and "loss_mask" in names else [column]
    raise ValueError(
        f"columns must include messages, prompt, text or input_ids, got columns={', '.join(names) or 'none'}; "
        "rename the column that holds the prompts"
    )


def _prompt_ids(
    record: dict[str, Any], columns: list[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> list[int]:
    """Turns a record into the token ids of its prompt, in the same way as an inference server does.

    Raises:
        KeyError, TypeError, ValueError, TemplateError: The record is malformed.
    """
    value = record[columns[0]]
    if columns[0] == "messages":
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise TypeError("not a list of objects with role and content")
        messages = without_filler(value)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked = messages[: turns[-1]] if turns else messages
        return _encode(tokenizer, render(tokenizer, asked, ask=True), special=False)
    if columns[0] == "input_ids":
        ids = [int(i) for i in value]
        if not all(0 <= i < vocab_size for i in ids):
            raise ValueError(f"ids must be at least 0 and below {vocab_size}")
        counted = [i for i, counts in enumerate(record["loss_mask"]) if counts] if "loss_mask" in columns else []
        return ids[: counted[0]] if counted and counted[0] else ids[: min(MAX_HALF_TOKENS, len(ids) // 2)]
    if not isinstance(value, str):
        raise TypeError(f"{columns[0]} must be text")
    ids = _encode(tokenizer, value, special=True)
    if ids[-1:] == [tokenizer.eos_token_id]:
        # Some tokenizers append the end token, after which a model has nothing to answer.
        ids.pop()
    return ids if columns[0] == "prompt" else ids[: min(MAX_HALF_TOKENS, len(ids) // 2)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids
