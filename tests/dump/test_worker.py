"""ShardDumper without Ray: shards with documents set aside, retries, and other writers on the same store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import logitstore
from logitstore.dump.missing import find_todo
from logitstore.dump.scoring.score import score_losses
from logitstore.dump.worker import ShardDumper
from logitstore.errors import IdentityError
from logitstore.format.spec import LossSpec
from logitstore.models.loading import ModelSource
from logitstore.models.split_lm import SplitLM
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits.index import commits_folder, find_commit
from logitstore.store.take_back import take_back
from tests.helpers.tiny import VOCAB_SIZE

BATCH_TOKENS = 700
LAYERS = ("tokens", "target", "losses/reference")


@pytest.fixture(scope="module")
def tokens(tiny_store):
    """Shard 0, two of its tokens (the largest id and a rare one), and the documents with each of them."""
    shard = logitstore.open(tiny_store).shard(0, layers=("tokens",))
    documents = [shard.document(i) for i in range(len(shard))]

    def holders(token):
        return [i for i, document in enumerate(documents) if token in document.ids]

    last = int(shard.ids.max())
    prompts = np.concatenate([document.ids[: document.loss_mask.argmax()] for document in documents])
    # One of the two documents with the rare token also has the largest id.
    rare = next(t for t in np.unique(prompts) if len(holders(t)) == 2 and len({*holders(t), *holders(last)}) == 3)
    return SimpleNamespace(shard=shard, last=last, rare=rare, with_last=holders(last), with_rare=holders(rare))


@pytest.fixture
def storage(tiny_store, tmp_path):
    """A store with the same tokens and the empty layers target, losses/reference and losses/later."""
    url = tmp_path / "cache.zarr"
    shutil.copytree(tiny_store, url)
    spec = logitstore.open(url).spec
    for folder in ("target", "losses", "commits/target", "commits/losses"):
        shutil.rmtree(url / folder)
    model = spec.losses["reference"].model
    spec = replace(spec, losses={name: LossSpec(model=model) for name in ("reference", "later")})
    storage = Storage(str(url))
    writer.add_layer(storage, spec, "target", spec.target)
    for name, layer_spec in spec.losses.items():
        writer.add_layer(storage, spec, f"losses/{name}", layer_spec)
    return storage


def broken(path, folder, change):
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        change(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    return ModelSource(name=str(folder))


def nan_at(token):
    return lambda weight: weight.__setitem__(token, float("nan"))


def dumper(storage, target, made_by=(), **references):
    return ShardDumper(storage, target, references, batch_tokens=BATCH_TOKENS, device="cpu", made_by=dict(made_by))


def test_documents_set_aside_are_recorded_in_the_commit_of_their_layer(storage, tokens, tiny, tmp_path):
    target = broken(tiny.target, tmp_path / "target", nan_at(tokens.last))
    reference = broken(tiny.reference, tmp_path / "reference", nan_at(tokens.rare))
    records = dumper(storage, target, reference=reference).dump(0, ["target", "losses/reference"])
    own = [i for i in tokens.with_rare if i not in tokens.with_last]
    assert [(record.layer, list(record.set_aside)) for record in records] == [
        ("target", tokens.with_last), ("losses/reference", own)
    ]  # fmt: skip
    store = logitstore.open(storage.url)
    assert store.reader.commit("target", 0).set_aside == records[0].set_aside
    shard = store.read_shard(0, layers=LAYERS)
    counted = [tokens.shard.document(i).loss_mask.sum() for i in range(len(shard))]
    for i in range(len(shard)):
        document = shard.document(i)
        assert (document.rows.counts.sum() == 0) == (i in tokens.with_last)
        assert document.loss_mask.sum() == (0 if i in {*own, *tokens.with_last} else counted[i])
        assert np.isfinite(store.loss("reference")[i]).sum() == document.loss_mask.sum()
    assert records[0].counted == sum(counted) - sum(counted[i] for i in tokens.with_last)
    assert records[1].counted == shard.loss_mask.sum()


def test_losses_computed_later_equal_those_of_the_same_call(storage, tokens, tiny, tmp_path):
    """A document that the target set aside is never run with a reference, neither in the same call nor later."""
    target = broken(tiny.target, tmp_path / "target", nan_at(tokens.last))
    reference = broken(tiny.reference, tmp_path / "reference", nan_at(tokens.last))
    both = dumper(storage, target, reference=reference)
    later = dumper(storage, None, later=reference)
    (_, first), (second,) = both.dump(0, ["target", "losses/reference"]), later.dump(0, ["losses/later"])
    assert first.set_aside == second.set_aside == {}
    assert (first.digest, first.computed_from, first.counted) == (second.digest, second.computed_from, second.counted)


def test_shard_dumped_again_is_identical(storage, tokens, tiny, tmp_path):
    target = broken(tiny.target, tmp_path / "target", lambda weight: weight.__setitem__(tokens.last, float("inf")))
    (first,) = dumper(storage, target).dump(0, ["target"])
    storage.remove(f"{commits_folder('target')}/{first.name}")
    (second,) = dumper(storage, target).dump(0, ["target"])
    assert (first.name, first.set_aside, first.checksums) == (second.name, second.set_aside, second.checksums)
    assert list(first.set_aside) == tokens.with_last


def test_model_that_fails_with_all_documents_leaves_no_files(storage, tiny, tmp_path):
    target = broken(tiny.target, tmp_path / "target", lambda weight: weight.fill_(float("nan")))
    with pytest.raises(ValueError, match="must give finite numbers"):
        dumper(storage, target).dump(0, ["target"])
    assert logitstore.open(storage.url).layers["target"].missing == list(range(3))
    assert not storage.names("staging/target")
    assert not storage.names("commits/target")


def test_losses_are_computed_from_the_rows_that_were_committed_first(storage, tiny):
    """The two writers stand for devices with different rounding; here they use two models with the same identity."""
    first = dumper(storage, ModelSource(name=tiny.draft))
    second = dumper(storage, ModelSource(name=tiny.target), reference=ModelSource(name=tiny.reference))
    kept = []

    def be_first(*_):
        if not kept:
            kept.extend(first.dump(0, ["target"]))

    second._target.model.register_forward_pre_hook(be_first)
    second._target.model.base_model.register_forward_pre_hook(be_first)
    adopted, losses = second.dump(0, ["target", "losses/reference"])
    assert [adopted] == kept
    assert losses.computed_from == adopted.digest
    shard = logitstore.open(storage.url).read_shard(0, layers=LAYERS)
    reference = SplitLM(AutoModelForCausalLM.from_pretrained(tiny.reference), VOCAB_SIZE)
    expected = score_losses(reference, shard, shard.rows, batch_tokens=BATCH_TOKENS).arrays["ce"]
    np.testing.assert_array_equal(shard.losses["reference"], expected)


def test_losses_can_use_a_target_committed_after_the_store_was_opened(storage, tiny):
    early = dumper(storage, None, reference=ModelSource(name=tiny.reference))
    dumper(storage, ModelSource(name=tiny.target)).dump(1, ["target"])
    (record,) = early.dump(1, ["losses/reference"])
    assert record.computed_from == logitstore.open(storage.url).reader.commit("target", 1).digest


def names(storage, shard=0):
    """Returns the name of the commit record of a shard in each layer that has one."""
    found = {layer: find_commit(storage, layer, shard) for layer in ("target", "losses/reference")}
    return {layer: commit.name for layer, commit in found.items() if commit is not None}


def count_calls(dumper):
    """Returns a dictionary that counts the documents that each model runs from now on."""
    calls = {}
    models = {"target": dumper._target, **dumper._references}
    for name, lm in models.items():
        calls[name] = 0

        def hook(module, args, kwargs, name=name):
            calls[name] += len(kwargs["input_ids"])

        if lm is not None:
            lm.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def test_committed_shards_are_not_computed_again(storage, tiny):
    both = dumper(storage, ModelSource(name=tiny.target), reference=ModelSource(name=tiny.reference))
    both.dump(0, ["target"])
    before, calls = names(storage), count_calls(both)
    (losses,) = both.dump(0, ["target", "losses/reference"])
    assert both.dump(0, ["target", "losses/reference"]) == []
    assert (losses.layer, calls["target"]) == ("losses/reference", 0)
    assert names(storage) == {**before, "losses/reference": losses.name}


def test_retried_documents_replace_the_commit_and_the_losses_computed_from_it(storage, tokens, tiny, tmp_path):
    target = broken(tiny.target, tmp_path / "target", nan_at(tokens.last))
    reference = ModelSource(name=tiny.reference)
    dumper(storage, target, reference=reference).dump(0, ["target", "losses/reference"])
    lacking = names(storage)
    mended = dumper(storage, ModelSource(name=tiny.target), reference=reference)
    assert mended.dump(0, ["target", "losses/reference"]) == []
    records = mended.dump(0, ["target", "losses/reference"], retry=[lacking["target"]])
    assert [record.layer for record in records] == ["target", "losses/reference"]
    assert [record.set_aside for record in records] == [{}, {}]
    assert not set(names(storage).values()) & set(lacking.values())
    assert logitstore.verify(logitstore.open(storage.url)) == []
    fresh = logitstore.open(storage.url).read_shard(0, layers=LAYERS)
    np.testing.assert_array_equal(fresh.loss_mask, tokens.shard.loss_mask)


def test_documents_that_fail_again_leave_the_commit_and_the_losses_unchanged(storage, tokens, tiny, tmp_path):
    target = broken(tiny.target, tmp_path / "target", nan_at(tokens.last))
    failing = dumper(storage, target, reference=ModelSource(name=tiny.reference))
    failing.dump(0, ["target", "losses/reference"])
    lacking = names(storage)
    written = {path: path.stat().st_mtime_ns for path in Path(storage.root).rglob("*") if path.is_file()}
    calls = count_calls(failing)
    failing.dump(0, ["target", "losses/reference"], retry=list(lacking.values())[:1])
    assert calls["target"] > 0
    assert calls["reference"] == 0
    assert {path: path.stat().st_mtime_ns for path in Path(storage.root).rglob("*") if path.is_file()} == written


def test_retry_that_fails_with_more_documents_leaves_the_commit_unchanged(storage, tokens, tiny, tmp_path):
    (lacking,) = dumper(storage, broken(tiny.target, tmp_path / "one", nan_at(tokens.last))).dump(0, ["target"])
    worse = dumper(storage, ModelSource(name=tiny.target))
    score = worse._score_target

    def fail_with_more(shard):
        scored, *others = score(shard)
        return replace(scored, set_aside=dict.fromkeys([*lacking.set_aside, len(shard) - 2], "out of memory")), *others

    worse._score_target = fail_with_more
    worse.dump(0, ["target"], retry=[lacking.name])
    assert logitstore.open(storage.url).reader.commit("target", 0) == lacking


def test_losses_can_be_retried_without_changing_the_target(storage, tokens, tiny, tmp_path):
    reference = broken(tiny.reference, tmp_path / "reference", nan_at(tokens.rare))
    dumper(storage, ModelSource(name=tiny.target), reference=reference).dump(0, ["target", "losses/reference"])
    lacking = names(storage)
    mended = dumper(storage, None, reference=ModelSource(name=tiny.reference))
    (record,) = mended.dump(0, ["losses/reference"], retry=[lacking["losses/reference"]])
    assert record.set_aside == {}
    assert names(storage) == {"target": lacking["target"], "losses/reference": record.name}


def test_only_stale_losses_are_replaced(storage, tiny):
    both = dumper(storage, ModelSource(name=tiny.target), reference=ModelSource(name=tiny.reference))
    for shard in (0, 1):
        both.dump(shard, ["target", "losses/reference"])
    kept, other = names(storage, 1), dumper(storage, ModelSource(name=tiny.draft))
    take_back(storage, "target", 0)
    other.dump(0, ["target"])
    assert logitstore.open(storage.url).layers["losses/reference"].stale == {0}
    (record,) = both.dump(0, ["target", "losses/reference"])
    assert record.layer == "losses/reference"
    assert record.computed_from == logitstore.open(storage.url).reader.commit("target", 0).digest
    assert not logitstore.open(storage.url).layers["losses/reference"].stale
    assert both.dump(1, ["target", "losses/reference"]) == []
    assert names(storage, 1) == kept


def test_late_shard_of_a_replaced_layer_is_refused_and_replaced(storage, tiny):
    """Another job starts the layer again with another model, just before the old writer commits its first shard."""
    spec = logitstore.open(storage.url).spec
    late = dumper(storage, ModelSource(name=tiny.target))
    late._writers["target"]._check_still_ours = lambda: None  # as if it had checked just before
    model = replace(spec.target.model, revision="1")
    writer.add_layer(storage, spec, "target", replace(spec.target, model=model))
    owner = dumper(storage, ModelSource(name=tiny.draft))
    late.dump(0, ["target"])
    with pytest.raises(IdentityError, match="another job "):
        logitstore.open(storage.url).reader.commit("target", 0)
    todo = find_todo(logitstore.open(storage.url), ["target"], retry_set_aside=False)
    assert list(todo.shards) == [0, 1, 2]
    (record,) = owner.dump(0, ["target"])
    assert logitstore.open(storage.url).reader.commit("target", 0) == record
    assert logitstore.verify(logitstore.open(storage.url)) == []
    todo = find_todo(logitstore.open(storage.url), ["target"], retry_set_aside=True)
    assert list(todo.shards) == [1, 2]
    with pytest.raises(IdentityError, match=r"another job replaced layer 'target' in .* uses another model"):
        dumper(storage, ModelSource(name=tiny.target), made_by={"target": late._made_by["target"]})
    del late._writers["target"]._check_still_ours
    with pytest.raises(IdentityError, match=r"another job replaced layer 'target' in .* uses another model"):
        late.dump(0, ["target"])
    with pytest.raises(IdentityError, match=r"another job replaced layer 'target' in .* uses another model"):
        late.dump(1, ["target"])
    assert logitstore.open(storage.url).reader.commit("target", 0) == record


def test_second_job_that_starts_a_layer_again_keeps_the_commits_of_the_first(storage, tiny, monkeypatch):
    spec = logitstore.open(storage.url).spec
    anew = replace(spec.target, model=replace(spec.target.model, revision="1"))
    check, committed = writer.check_layer, []

    def check_and_be_late(*args):
        is_same = check(*args)
        if not committed:
            committed.append(None)
            writer.add_layer(storage, spec, "target", anew)
            committed[:] = dumper(storage, ModelSource(name=tiny.target)).dump(0, ["target"])
        return is_same

    monkeypatch.setattr(writer, "check_layer", check_and_be_late)
    writer.add_layer(storage, spec, "target", anew)
    store = logitstore.open(storage.url)
    assert [store.reader.commit("target", 0)] == committed
    assert logitstore.verify(store) == []


def test_losses_of_a_replaced_target_are_computed_again(storage, tiny):
    """Another job commits losses first that were computed from the replaced rows."""
    both = dumper(storage, ModelSource(name=tiny.target), reference=ModelSource(name=tiny.reference))
    late = dumper(storage, None, reference=ModelSource(name=tiny.reference))
    both.dump(0, ["target"])
    shard = late._read(0, ("tokens", "target"))
    old = late._score_losses(late._references["reference"], shard)
    take_back(storage, "target", 0)
    dumper(storage, ModelSource(name=tiny.draft)).dump(0, ["target"])
    score = both._score_losses

    def be_late(*args):
        if find_commit(storage, "losses/reference", 0) is None:
            late._writers["losses/reference"].write(
                0, old.arrays, documents=len(shard), rows=len(shard.ids), counted=int(shard.loss_mask.sum()),
                computed_from=shard.target_digest, started=0.0,
            )  # fmt: skip
        return score(*args)

    both._score_losses = be_late
    (record,) = both.dump(0, ["target", "losses/reference"])
    assert record.computed_from == logitstore.open(storage.url).reader.commit("target", 0).digest
    assert logitstore.verify(logitstore.open(storage.url)) == []


def test_current_rows_are_read_even_if_they_were_replaced_after_opening(storage, tiny):
    late = dumper(storage, None, reference=ModelSource(name=tiny.reference))
    dumper(storage, ModelSource(name=tiny.draft)).dump(0, ["target"])
    late.dump(0, ["losses/reference"])
    take_back(storage, "target", 0)
    (target,) = dumper(storage, ModelSource(name=tiny.target)).dump(0, ["target"])
    (record,) = late.dump(0, ["losses/reference"])
    assert record.computed_from == target.digest
