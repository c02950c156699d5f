import json
import shutil

import numpy as np
import pytest
from teachers import make_teacher_test_cache

from distillery.cache.fields import place_fields
from distillery.cache.store import FutureFormatError, record_path, record_text
from distillery.system.errors import UserError
from distillery.teacher_cache.problems import find_teacher_problems
from distillery.teacher_cache.records import TEACHER_SHARDS, encode_sums, fields_of, statistics_of, teacher_shard_name


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """16 images in 2 shards, with all tokens and logits."""
    return make_teacher_test_cache(tmp_path_factory.mktemp("cache"), 16, tokens="full", fields=("logits",), bad=(3,))


@pytest.fixture
def record(plan):
    """The first shard's record, to be changed."""
    return TEACHER_SHARDS.read_record(record_path(plan.shard_path(0)))


def test_a_record_is_what_its_shard_says_with_size_and_hash(plan, record):
    assert TEACHER_SHARDS.record_of_shard(plan.shard_path(0)) == record
    assert (record["shard_path"], record["num_views"], record["failed_rows"]) == (teacher_shard_name(0), 2, [3])


def test_tensors_are_placed_in_one_order_however_the_record_lists_them(record):
    fields = fields_of(record)
    assert [field.name for field in fields] == ["pooled", "tokens", "logits"]
    assert fields == place_fields({field.name: (field.dtype, field.shape) for field in fields})
    assert [*json.loads(json.dumps(record["fields"], sort_keys=True))] == ["logits", "pooled", "tokens"]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(shard_path="../images_shard_00000.pt"),
        lambda record: record.update(shard_idx=1),
        lambda record: record.update(num_samples=10**9),
        lambda record: record.update(num_views=0),
        lambda record: record.update(bytes=10),
        lambda record: record.update(failed_rows=[8]),
        lambda record: record.update(failed_rows=[3, 3]),
        lambda record: record.update(images_hash="none"),
        lambda record: record.update(hash=7),
        lambda record: record.update(fields={}),
        lambda record: record["fields"].update(extra=record["fields"]["pooled"]),
        lambda record: record["fields"]["pooled"].update(dtype="object"),
        lambda record: record["fields"]["pooled"].update(shape=[8, 2, 0]),
        lambda record: record["fields"]["tokens"].update(shape=[8, 2, 1 << 40, 1 << 40]),
        lambda record: record["checksums"].pop("tokens"),
        lambda record: record["checksums"]["pooled"].update(values="AAAA"),
        lambda record: record["identity"].update(images="forged"),
        lambda record: record["sums"]["pooled"].update(sum="not base64"),
        lambda record: record.update(libraries={"torch": 2}),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_although_its_hash_is_right(tmp_path, record, change):
    change(record)
    path = tmp_path / "teacher_shard_00000.json"
    path.write_bytes(record_text(record))
    with pytest.raises(UserError, match=r"teacher_shard_00000.json: (not a shard's record|its fields contradict)"):
        TEACHER_SHARDS.read_record(path)


def test_a_record_of_a_later_version_is_refused_and_never_taken_for_damage(tmp_path, record):
    path = tmp_path / "teacher_shard_00000.json"
    path.write_bytes(record_text(record | {"format_version": 4}))
    with pytest.raises(FutureFormatError):
        TEACHER_SHARDS.read_record(path)


def test_every_byte_of_a_shard_is_guarded(plan, tmp_path):
    path, content = tmp_path / "teacher_shard_00000.pt", bytearray(plan.shard_path(0).read_bytes())
    for position in range(0, len(content), 97):
        content[position] ^= 2
        path.write_bytes(content)
        with pytest.raises(UserError):
            assert TEACHER_SHARDS.record_of_shard(path) == TEACHER_SHARDS.read_record(record_path(plan.shard_path(0)))
            raise AssertionError(f"byte {position} was changed unnoticed")
        content[position] ^= 2


def test_what_does_not_belong_in_the_folder_is_named(plan):
    leftover, foreign = plan.directory / ".index.json.tmp-0123456789ab", plan.directory / "notes.txt"
    for path in (leftover, foreign):
        path.write_text("x")
    problems = [text for text, _ in find_teacher_problems(plan.directory)]
    for path in (leftover, foreign):
        path.unlink()
    assert sorted(problems) == [
        f"{leftover}: left by a killed run; stage 1 removes it",
        f"{foreign}: not part of a cache; move it elsewhere",
    ]
    assert list(find_teacher_problems(plan.directory)) == []


def test_shards_that_the_index_lists_and_the_folder_lacks_are_named(plan, tmp_path):
    folder = shutil.copytree(plan.directory, tmp_path / "teacher" / plan.directory.name)
    lost = sorted(folder.glob("teacher_shard_*"))
    for path in lost:
        path.unlink()
    problems = [text for text, _ in find_teacher_problems(folder)]
    assert len(problems) == len(lost) // 2 > 1
    for path in lost:
        assert any(str(path.with_suffix(".pt")) in text for text in problems)
    (folder / "index.json").write_text("{")
    assert [str(folder / "index.json") in text for text, _ in find_teacher_problems(folder)] == [True]
    (folder / "index.json").unlink()  # as a pass leaves it that was stopped before its first shard
    assert list(find_teacher_problems(folder)) == []


def test_sums_of_shards_are_merged_exactly_as_one(record):
    values = np.random.default_rng(0).normal(3, 2, (30, 4))
    records = [
        {"sums": {"pooled": encode_sums(len(part), part.sum(0), (part**2).sum(0))}} for part in np.split(values, 3)
    ]
    found = statistics_of(records)
    assert found["pooled_count"] == 30
    np.testing.assert_allclose(found["pooled_mean"], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["pooled_std"], values.std(0), rtol=1e-9)
