"""Stores with very many shards: the cost of opening, and the agreement of the index with a plain loop over records.

The records here are empty files with valid names, so a test fails if opening reads one of them.
"""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

import logitstore
from logitstore.format.commit import NO_DIGEST
from logitstore.format.schemes import Scheme
from logitstore.format.spec import DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits.index import commits_folder, index_from_names
from tests.helpers.faults import FaultyProxy, S3Server, s3_options

NUM_SHARDS = 20_000
LAYERS = ("tokens", "target", "losses/reference")
GAP = 19_900
"""The first shard whose tokens are missing."""
STRANGE = ("notes.txt", "000003-012d-1r-1c-0e-0s-0123456789ab-0123456789ab.json", "000003.json")
"""Names that are not those of records. The second has one zero too many."""


def make_store(storage, num_shards):
    model = ModelSpec(name="none", revision="0", dtype="float32", padded_vocab_size=512)
    target, losses = TargetSpec(model=model, scheme=Scheme(k=4)), LossSpec(model=model)
    spec = StoreSpec(
        tokenizer=TokenizerSpec(name="none", fingerprint="none", vocab_size=512, chat_template=None),
        data=DataSpec(source="none", digest=None, columns="input_ids", mask_policy="all"),
        max_length=64, shard_rows=1024, num_shards=num_shards, target=target, losses={"reference": losses},
    )  # fmt: skip
    writer.create_store(storage, spec)
    writer.add_layer(storage, spec, "target", target)
    writer.add_layer(storage, spec, "losses/reference", losses)
    return spec


def name(shard, documents, digest, origin):
    return f"{shard:06d}-{documents}d-{documents * 9}r-{documents * 5}c-0e-0s-{digest}-{origin}.json"


def digits(rng):
    return f"{rng.getrandbits(48):012x}"


def touch(folder, names):
    """Makes empty files as hard links to a single one, which is ten times as fast."""
    folder.mkdir(parents=True)
    empty = folder.with_name("empty")
    empty.touch()
    for one in names:
        os.link(empty, folder / one)
    empty.unlink()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store of 20,000 shards, unfinished and partly stale, and the facts about it that a plain loop collects."""
    rng = random.Random(5)
    root = tmp_path_factory.mktemp("scale") / "cache.zarr"
    make_store(Storage(root), NUM_SHARDS)
    documents = [rng.randint(1, 40) for _ in range(NUM_SHARDS)]
    gaps = {"tokens": {GAP, GAP + 7}, "target": set(rng.sample(range(NUM_SHARDS), 300)), LAYERS[2]: {0, 9, 19_999}}
    names, stale = {}, {}
    below = None
    for layer in LAYERS:
        digests = {shard: digits(rng) for shard in range(NUM_SHARDS) if shard not in gaps[layer]}
        old = set() if below is None else set(rng.sample(sorted(digests), 150))
        origins = dict.fromkeys(digests, NO_DIGEST) if below is None else {s: below.get(s, "a" * 12) for s in digests}
        origins |= {shard: digits(rng) for shard in old}
        names[layer] = [name(s, documents[s], digest, origins[s]) for s, digest in digests.items()]
        # A shard that is missing in the layer below cannot be compared, so it is not stale.
        stale[layer] = {shard for shard in old if shard in below}
        below = digests
        touch(root / "commits" / layer, names[layer])
    missing = {layer: sorted(shards) for layer, shards in gaps.items()}
    return SimpleNamespace(url=str(root), documents=documents, names=names, missing=missing, stale=stale)


def test_opening_lists_each_folder_once_and_reads_no_record(large):
    code = (
        "import json, sys, logitstore\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, values: seen.append((event, str(values[0]))))\n"
        "logitstore.open(sys.argv[1])\n"
        "print(json.dumps([one for one in seen if one[1].startswith(sys.argv[1])]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, large.url], stdout=subprocess.PIPE, check=True, timeout=60)
    touched = Counter((event, path.removeprefix(f"{large.url}/")) for event, path in json.loads(done.stdout))
    listed = ("losses", "appends", *(f"commits/{layer}" for layer in LAYERS))
    read = ("zarr.json", "target/zarr.json", "losses/reference/zarr.json")
    assert touched == Counter([*(("os.listdir", path) for path in listed), *(("open", path) for path in read)])


def test_documents_are_numbered_up_to_the_first_gap(large):
    store = logitstore.open(large.url)
    assert store.num_shards == GAP
    assert store.spec.num_shards == NUM_SHARDS
    assert len(store) == sum(large.documents[:GAP])
    assert (store.num_rows, store.num_counted) == (9 * len(store), 5 * len(store))


def test_documents_are_located_at_the_edges_of_shards(large):
    store = logitstore.open(large.url)
    first = [0]
    for documents in large.documents[:GAP]:
        first.append(first[-1] + documents)
    for shard in (0, 1, 2, 999, 1000, 9_999, GAP - 2, GAP - 1):
        last = large.documents[shard] - 1
        assert store.locate(first[shard]) == (shard, 0)
        assert store.locate(first[shard] + last) == (shard, last)
        assert store.locate(first[shard] - len(store)) == (shard, 0)
    assert store.locate(-1) == (GAP - 1, large.documents[GAP - 1] - 1)
    for outside in (len(store), -len(store) - 1):
        with pytest.raises(IndexError, match=f"got document={outside}"):
            store.locate(outside)


@pytest.mark.parametrize("layer", LAYERS)
def test_missing_and_stale_shards_equal_those_of_a_plain_loop(large, layer):
    found = logitstore.open(large.url).layers[layer]
    assert found.missing == large.missing[layer]
    assert found.stale == large.stale[layer]
    assert bool(found.stale) == (layer != "tokens")
    assert found.committed == set(range(NUM_SHARDS)) - set(large.missing[layer])
    assert [shard in found.index for shard in (0, 5, 299, GAP, 10**12, -1)] == [
        shard in found.committed for shard in (0, 5, 299, GAP, 10**12, -1)
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_index_rebuilds_the_names_of_records(large, layer):
    index = logitstore.open(large.url).layers[layer].index
    assert [index.name(place) for place in range(len(index))] == large.names[layer]


def test_index_of_any_names_agrees_with_a_plain_loop():
    rng = random.Random(6)
    numbers = [0, 5, 5, 5, 77, 999_999, 1_000_000, 16_777_215, 16_777_215]
    counts = [[rng.choice((0, 1, 9, 4_294_967_295, 9_999_999_999)) for _ in range(5)] for _ in numbers]
    names = sorted(
        f"{shard:06d}-{d}d-{r}r-{c}c-{e}e-{s}s-{digits(rng)}-{digits(rng)}.json"
        for shard, (d, r, c, e, s) in zip(numbers, counts, strict=True)
    )
    index = index_from_names("target", sorted([*names, *STRANGE]))
    kept = {int(name.split("-")[0]): name for name in names}  # the last record of each shard
    assert index.shards.tolist() == sorted(set(numbers))
    assert [index.name(place) for place in range(len(index))] == [kept[shard] for shard in sorted(kept)]
    columns = (index.documents, index.rows, index.counted, index.entries, index.set_aside)
    for place, shard in enumerate(sorted(kept)):
        fields = kept[shard].removesuffix(".json").split("-")
        assert [int(column[place]) for column in columns] == [int(field[:-1]) for field in fields[1:6]]
        assert [bytes(digest[place]).decode() for digest in (index.digests, index.origins)] == fields[6:]
    assert index.contested == {5, 16_777_215}
    assert set(index.unknown) == set(STRANGE)
    assert index.upto(77).shards.tolist() == [0, 5]
    assert index.upto(77).contested == {5}


def test_an_index_of_no_names_is_empty():
    index = index_from_names("target", [])
    assert (len(index), 0 in index, index.committed, index.upto(3)) == (0, False, frozenset(), index)


def test_pickled_store_does_not_list_records_again(tiny_store, tmp_path):
    url = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    store = logitstore.open(url)
    data = pickle.dumps(store)
    for record in Path(url, "commits/tokens").iterdir():
        record.rename(record.with_suffix(".away"))
    copied = pickle.loads(data)
    assert len(copied) == len(store)
    assert copied.locate(20) == store.locate(20)
    for record in Path(url, "commits/tokens").iterdir():
        record.rename(record.with_suffix(".json"))
    assert copied[20].ids.tolist() == store[20].ids.tolist()


def test_opening_a_bucket_takes_one_request_per_1000_records_and_a_few_others():
    sizes = {"tokens": 1_001, "target": 1_000, "losses/reference": 3}
    with S3Server() as server, FaultyProxy(server.url) as proxy:
        server.make_bucket("bucket")
        storage = Storage("s3://bucket/cache.zarr", s3_options(proxy.url))
        writer_of_tokens = writer.LayerWriter(storage, make_store(storage, 3_000), "tokens")
        tokens = encode_tokens(np.arange(9), np.zeros(9), np.array([9]))
        size = {"documents": 1, "rows": 9, "counted": 0, "computed_from": None, "started": time.monotonic()}

        def requests(action, *arguments, **options):
            before = proxy.counts.copy()
            action(*arguments, **options)
            return proxy.counts - before

        in_an_empty_store = requests(writer_of_tokens.write, 0, tokens, **size)
        fs = fsspec.filesystem("s3", **s3_options(server.url))
        empty = {
            f"bucket/cache.zarr/{commits_folder(layer)}/{name(shard, 2, 'c' * 12, NO_DIGEST)}": b""
            for layer, number in sizes.items()
            for shard in range(1 if layer == "tokens" else 0, number)
        }
        fs.pipe(empty)

        opened = requests(logitstore.open, "s3://bucket/cache.zarr", s3_options(proxy.url))
        # GET: the metadata of the store and two layers. LIST: losses/, appends/, one more for the absent folder
        # (s3fs looks for it), and the records.
        assert opened == {"GET": 3, "LIST": 3 + (2 + 1 + 1)}
        store = logitstore.open("s3://bucket/cache.zarr", s3_options(proxy.url))
        assert (store.num_shards, len(store)) == (1_001, 2_001)
        assert not store.storage._fs.dircache

        # Reading or committing one shard does not cost more in a store with many shards.
        assert requests(store.reader.commit, "tokens", 0) == {"GET": 1}
        assert requests(store.read_shard, 0, ("tokens",)) == {"GET": 5}
        assert requests(writer_of_tokens.write, 2_999, tokens, **size) == in_an_empty_store
