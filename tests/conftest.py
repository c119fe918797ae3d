"""Fixtures for all tests: text of the standard library, tiny models, and a store written by a dense oracle."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace

from tests.helpers.tiny import functions, make_model, make_tokenizer, write_jsonl, write_store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models of a few thousand weights are slower on two threads than on one, and many times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """Keeps imported packages out of later garbage collections, of which transformers requests several in a training.

    A collection over a million objects takes a quarter of a second. Without this fixture, collections take a tenth of
    the time of all tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of a tokenizer, a target, a smaller draft, a reference of the draft's size, and prompt-response JSONL."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(folder / "tokenizer")
    return SimpleNamespace(
        tokenizer=tokenizer,
        target=make_model(folder / "target", tokenizer, hidden=48, layers=2, seed=1),
        draft=make_model(folder / "draft", tokenizer, hidden=16, layers=1, seed=2, scale=0.05),
        reference=make_model(folder / "reference", tokenizer, hidden=16, layers=1, seed=3, scale=0.1),
        data=write_jsonl(folder / "functions.jsonl", functions(24)),
    )


@pytest.fixture(scope="session")
def tiny_store(tiny, tmp_path_factory):
    """A finished store of 24 documents in several shards with losses/reference, written by the oracle."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    documents = []
    for pair in functions(24):
        prompt = tokenizer(pair["prompt"])["input_ids"][:60]
        response = [*tokenizer(pair["response"])["input_ids"][:120], tokenizer.eos_token_id]
        mask = [0] * (len(prompt) - 1) + [1] * len(response) + [0]
        documents.append((prompt + response, mask))
    target, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.target, tiny.reference))
    url = str(tmp_path_factory.mktemp("store") / "cache.zarr")
    return write_store(url, documents, target, tokenizer, losses={"reference": reference})


@pytest.fixture(scope="session")
def made(tiny, tmp_path_factory):
    """A store with drawn entries and its inputs, written by the dump's worker. Tests copy it before they change it."""
    from tests.helpers.dumped import make

    return make(tmp_path_factory.mktemp("made"), tiny)


@pytest.fixture(scope="session")
def measured(tiny, tiny_store, tmp_path_factory):
    """URLs of finished stores with losses, one for each scheme, keyed by scheme name; written by the dump's worker."""
    from tests.helpers.measured import make

    return make(tiny, tiny_store, tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    """A store of three shards of random numbers, made without torch."""
    from tests.helpers import stores

    return stores.make(tmp_path_factory.mktemp("small") / "cache.zarr")


@pytest.fixture(scope="session")
def reader():
    """A process with limited memory that reads whole stores."""
    from tests.helpers.reader_process import ReaderProcess

    process = ReaderProcess()
    yield process
    process.close()


@pytest.fixture
def datasets_cache(tmp_path_factory, monkeypatch):
    """Gives the test its own cache folder of `datasets`, and checks that logitstore left no file in it."""
    import datasets

    folder = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    yield
    assert not list(folder.glob("logitstore-*"))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer(tokenizer_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_path)
