"""Open the stored outputs that a configuration needs, and check that the present teacher made them.

    names, views, images    the identity in the folder's index: strings, known without the teacher
    files on this machine   teacher_files.json beside the shards: hashes, skipped where size and times are unchanged
    weights and code        only where those files differ: the teacher is built once, its weights are hashed, and a few
                            stored views run through it

Files that agree are remembered, so the next start neither builds the teacher nor hashes.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillery.cache.folder import load_index
from distillery.config.keys_data import DataConfig
from distillery.config.load import Configs
from distillery.losses.total import check_tokens
from distillery.models.configured import build_teacher_backbone, choose_teacher_precision, low_weights, place_teacher
from distillery.models.views import Augmentation
from distillery.models.weights import weights_hash
from distillery.reading.datasets import CachedTensorDataset
from distillery.reading.rows import ImageRows
from distillery.system import distributed
from distillery.system.console import format_bytes
from distillery.system.errors import RunError, UserError, stage1_command, teacher_command
from distillery.system.files import sha256_of
from distillery.teacher_cache.identity import TeacherCacheSpec, resolved_teacher
from distillery.teacher_cache.local_files import (
    MAX_FILES,
    TeacherFiles,
    changed_files,
    local_sources,
    remember_files,
    remembered_files,
    scan_teacher_files,
)
from distillery.teacher_cache.outputs import LiveTeacher
from distillery.teacher_cache.reader import TeacherCache, find_teacher_cache, fitting_folders
from distillery.teacher_cache.records import FILES_NAME, read_teacher_index, teacher_shard_name
from distillery.teacher_cache.replay import Replay, replay_views
from distillery.teacher_cache.survey import image_hashes
from distillery.teacher_cache.targets import wanted_outputs

# views run again to see whether the code gives the same outputs: other code changes every view
_NUM_REPLAYS = 8
# images that the teacher sees in float32 and in the type of its weights
_NUM_COMPARED = 8
_TELL_HASHING_BYTES = 1 << 30


def open_teacher_cache(
    configs: Configs, loader: Any, device: torch.device, *, fingerprint: str | None = None, is_plan: bool = False
) -> TeacherCache | None:
    """Open the stored outputs that the configuration needs; None where every step runs the teacher.

    Args:
        configs: data, train and model.
        loader: the run's PretrainingLoader, on the shards that it trains on.
        device: where the teacher is built if its files are not those that the outputs were last compared with.
        fingerprint: of the outputs that the run was started on, where it goes on.
        is_plan: nothing is written, and every rank raises when there are none: the plan goes on without them.
    Raises:
        MissingFileError: there are none. UserError: they are of something else, or do not cover the images.
    """
    if not configs.train.teacher_cache.is_read:
        return None
    if loader.shard_names is None:
        raise UserError(
            "teacher_cache.enabled is true, and this run decodes raw images: stored outputs belong to a cache of "
            f"images. Make it ({stage1_command()}) and leave use_cached at null, or set teacher_cache.enabled: false."
        )

    def find() -> tuple[Path, list[Path]]:
        cache = _find(configs, loader.fingerprint, device, fingerprint, is_plan=is_plan)
        return cache.directory, cache.of_other_weights

    directory, of_other_weights = distributed.on_main(find, raise_everywhere=is_plan)
    cache = TeacherCache(directory, of_other_weights=of_other_weights)
    images = getattr(loader.dataset, "base_dataset", loader.dataset)
    index = images.index
    cache.check_covers(index.shard_starts, _rows_trained_on(images))
    cache.check_decoded(index.shard_starts, index.shard_rows, index.shard_failed)
    return cache


def _rows_trained_on(images: CachedTensorDataset) -> np.ndarray:
    """int64 [S]: rows of each shard up to the last one that is trained on: max_samples may end inside a shard."""
    rows, last = images.index.shard_rows.copy(), np.array([len(images.shard_rows) - 1])
    num_used = images.shard_rows[last]
    rows[last] = images.rows.files.local_rows(last, num_used - 1) + 1 if num_used else 0
    return rows


def files_of_teacher(configs: Configs) -> TeacherFiles:
    """The files on this machine that the configuration builds the teacher from, but teacher_checkpoint."""
    # inside a folder as wide as teacher_repo: ., these change all the time, and no teacher comes from them
    leave_out = [configs.data.cache_path]
    with contextlib.suppress(UserError):  # the pass needs no checkpoint_dir
        leave_out.append(configs.train.checkpoint_path)
    return scan_teacher_files(local_sources(configs.model.model_dump()), leave_out)


def build_live_teacher(
    configs: Configs, images: str, device: torch.device, fingerprint: str | None = None
) -> tuple[LiveTeacher, TeacherCacheSpec]:
    """The teacher of a configuration on the device, and what decides its outputs over the cache of a fingerprint.

    With `teacher_precision: auto` it runs in the precision that its stored outputs have, where there are any: nodes
    with and without a GPU read and extend the same folder. fingerprint: of the outputs that a run was started on.
    """
    data, train, model = configs.data, configs.train, configs.model
    configured = wanted_outputs(configs, images)
    with_logits = configured["stored"]["logits"]
    is_auto, precision = train.teacher_precision == "auto", choose_teacher_precision(train, device)
    likely = is_auto and _recorded_precision(data.cache_path, configured, {}, fingerprint) or precision
    low = low_weights(train, device, likely)
    backbone = build_teacher_backbone(model, data, with_logits=with_logits, low=low)
    check_tokens(backbone, "teacher", train.distill_loss_weights, train.teacher_cache.tokens)
    augmentation = Augmentation(**train.augment.model_dump(), mean=data.mean, std=data.std)
    resolved = resolved_teacher(backbone, weights_hash(backbone.model), precision)
    facts = {name: value for name, value in resolved.items() if name != "precision"}
    if backbone.dtype != torch.float32:
        precision = likely
    elif is_auto:
        precision = _recorded_precision(data.cache_path, configured, facts, fingerprint) or precision
    backbone = place_teacher(backbone, train, device, precision, lambda: images_to_compare(data))
    teacher = LiveTeacher(backbone, augmentation, train.teacher_cache.seed, device, precision)
    return teacher, TeacherCacheSpec(configured, resolved | {"precision": precision})


def _recorded_precision(cache_dir: Path, configured: dict, facts: dict, fingerprint: str | None) -> str | None:
    """The precision of a teacher's stored outputs, of several the ones that are read; None where there are none.

    facts: what is known of the teacher beside the configuration, keys of resolved_teacher.
    """
    try:
        folder = fitting_folders(cache_dir, configured | {"resolved": facts}, fingerprint)[0]
    except UserError:
        return None
    return read_teacher_index(folder)["identity"]["resolved"]["precision"]


def images_to_compare(data: DataConfig) -> torch.Tensor:
    """A few images [B, 3, H, W] as the teacher gets them, from the whole cache; noise where there is none yet."""
    try:
        rows = ImageRows(data.cache_path, load_index(data.cache_path).fingerprint)
        spread, num_rows = np.linspace(0, 1, _NUM_COMPARED), rows.index.shard_rows
        if len(num_rows):
            shards = (spread * (len(num_rows) - 1)).astype(np.int64)
            return rows.read_rows(shards, (spread * (num_rows[shards] - 1)).astype(np.int64))
    except (UserError, RunError, OSError):
        pass  # not made yet, or damaged: whoever reads it for the run says so
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUM_COMPARED, 3, data.image_size, data.image_size, generator=generator)


def known_of_teacher(spec: TeacherCacheSpec) -> dict:
    """What outputs must agree with that a built teacher may read.

    Another precision is no other teacher: on the CPU, what a GPU made is compared in that one's precision.
    """
    names = ("weights_hash", "img_size", "mean", "std", "pooling")
    facts = {name: spec.resolved[name] for name in names if name in spec.resolved}
    return spec.configured | {"resolved": facts}


def _find(
    configs: Configs, images: str, device: torch.device, fingerprint: str | None, *, is_plan: bool
) -> TeacherCache:
    """The outputs that open_teacher_cache reads: by their files where these are remembered, else by the teacher."""
    cache_dir, wanted, files = configs.data.cache_path, wanted_outputs(configs, images), files_of_teacher(configs)
    if not files:
        return find_teacher_cache(cache_dir, wanted, fingerprint)
    changes: tuple[Path, list[str]] | None = None
    for folder in fitting_folders(cache_dir, wanted, fingerprint):
        differing, entries = compare_files(files, folder)
        if not differing:
            if not is_plan:
                remember(folder, entries)
            return TeacherCache(folder)
        changes = changes or (folder, differing)
    print(_why_built(files, *changes), flush=True)
    with _exact_convolutions():
        teacher, spec = build_live_teacher(configs, images, device, fingerprint)
        cache = _confirmed(cache_dir, teacher, spec, images, fingerprint)
    if not is_plan and files.is_whole:
        remember(cache.directory, compare_files(files, cache.directory)[1])
    print(f"  the same weights ({cache.weights_hash}) and outputs as in {cache.directory}", flush=True)
    return cache


def outputs_of_built(cache_dir: Path, spec: TeacherCacheSpec, files: TeacherFiles) -> TeacherCache:
    """The outputs of a built teacher's weights; of those of several codes, the folder that remembers the present files.

    Raises:
        MissingFileError, UserError: there are none, with what differs.
    """
    folders = fitting_folders(cache_dir, known_of_teacher(spec))
    return TeacherCache(min(folders, key=lambda folder: bool(files and compare_files(files, folder)[0])))


def compare_files(files: TeacherFiles, directory: Path) -> tuple[list[str], dict[str, list]]:
    """(names of the files that differ from those a folder of outputs remembers, the entries to remember now)."""
    known = remembered_files(directory, read_teacher_index(directory)["fingerprint"])
    if (size := files.bytes_to_hash(known)) > _TELL_HASHING_BYTES:
        print(f"the teacher's files: {len(files.paths)}, {format_bytes(size)} to hash, once", flush=True)
    entries = files.entries(known)
    differing = changed_files(entries, known)
    return differing or ([] if files.is_whole else [f"more than {MAX_FILES} files"]), entries


def remember(directory: Path, entries: dict[str, list]) -> None:
    """Record which files a folder's outputs were compared with; print one line if the record cannot be written."""
    error = remember_files(directory, read_teacher_index(directory)["fingerprint"], entries)
    if error is not None:
        why = error.strerror or error
        print(f"{directory / FILES_NAME}: not written ({why}): the next start compares the teacher again")


def _why_built(files: TeacherFiles, directory: Path, differing: list[str]) -> str:
    if not files.is_whole:
        what = f"more than {MAX_FILES}, too many to remember"
    elif not (directory / FILES_NAME).exists():
        what = f"{len(files.paths)}, none remembered in {directory} yet"
    else:
        some = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        some = some.encode(errors="backslashreplace").decode()  # a name that is no text cannot be printed
        what = f"{len(differing)} are new, gone or changed since they were last compared with {directory} ({some})"
    return f"the teacher's local files: {what}. It is built once, to compare its weights and {_NUM_REPLAYS} views"


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """cuDNN as the pass has it, and then as training had it."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    use_exact_convolutions()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def use_exact_convolutions() -> None:
    """The fastest convolution is searched by the clock, and two runs may find two that round differently."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _confirmed(
    cache_dir: Path, teacher: LiveTeacher, spec: TeacherCacheSpec, images: str, fingerprint: str | None
) -> TeacherCache:
    """The outputs of the built teacher's weights that it gives once more.

    Raises:
        UserError: there are none of these weights, or the same weights give something else now.
    """
    refused = None
    for folder in fitting_folders(cache_dir, known_of_teacher(spec), fingerprint):
        cache = TeacherCache(folder)
        differing, _ = compare_views(cache, teacher, cache_dir, images)
        if differing is None:
            return cache
        refused = refused or (cache, differing)
    cache, differing = refused
    raise UserError(
        f"{cache.directory}: the teacher has the weights that these outputs were made with ({cache.weights_hash}), and "
        f"gives other outputs now: {differing.describe()}. Its code or its configuration has changed. Put the files "
        f"back, or make its outputs: {teacher_command()}"
    )


def compare_views(
    cache: TeacherCache, teacher: LiveTeacher, cache_dir: Path, images: str, *, skip_damaged: bool = False
) -> tuple[Replay | None, int]:
    """(a stored view for which the teacher's outputs differ now, None where all agree; number of views compared).

    It compares a few views, always the same ones, from shards whose images have not changed since.

    Args:
        cache: the outputs.
        teacher: the one that is there now.
        cache_dir: the image cache.
        images: its fingerprint.
        skip_damaged: leave out the shards that cannot be read.
    Raises:
        UserError: images or outputs are gone or damaged.
    """
    teacher = replace(teacher, precision=cache.identity["resolved"]["precision"])
    rows, rng, num_compared = ImageRows(cache_dir, images), np.random.default_rng(0), 0
    # outputs of images that have changed since differ whatever the teacher: the pass makes them again
    hashes = {teacher_shard_name(shard_idx): value for shard_idx, value in image_hashes(cache_dir).items()}
    listed = enumerate(cache.index["shards"])
    shards = [s for s, row in listed if row["images_hash"] == hashes.get(row["shard_path"])]
    chosen = rng.permutation(shards)[:_NUM_REPLAYS].tolist()
    for s in chosen:
        try:
            replays = list(replay_views(cache, teacher, rows, -(-_NUM_REPLAYS // len(chosen)), rng, [s]))
        except UserError:
            if not skip_damaged:
                raise
            continue
        num_compared += len(replays)
        if (differing := next((replay for replay in replays if not replay.agrees), None)) is not None:
            return differing, num_compared
    return None, num_compared


def spec_to_go_on_with(
    cache_dir: Path, teacher: LiveTeacher, spec: TeacherCacheSpec, files: TeacherFiles
) -> TeacherCacheSpec:
    """What the pass makes: `spec`; or that of a folder made under other paths or other code of the same outputs; or one
    of its own where the folder that `spec` names holds what other code of the same weights gave.
    """
    if not files or not spec.folder(cache_dir).parent.is_dir():
        return spec
    try:
        folders = fitting_folders(cache_dir, spec.identity, spec.fingerprint)
    except UserError:  # there are none
        return spec
    own, is_taken = spec.folder(cache_dir), False
    for folder in folders:
        found = _compare_for_pass(folder, teacher, cache_dir, spec.configured["images"], files)
        if found is True or (found is None and folder == own):
            identity = read_teacher_index(folder)["identity"]
            return TeacherCacheSpec({k: v for k, v in identity.items() if k != "resolved"}, identity["resolved"])
        is_taken = is_taken or folder == own
    if not is_taken:
        return spec
    contents = {name: entry[-1] or entry[0] for name, entry in files.entries({}).items()}
    other = TeacherCacheSpec(spec.configured | {"code": sha256_of(contents)}, spec.resolved)
    print(f"{own}: other code of the same weights gave these outputs; they stay, and the teacher's own are beside them")
    return other


def _compare_for_pass(
    folder: Path, teacher: LiveTeacher, cache_dir: Path, images: str, files: TeacherFiles
) -> bool | None:
    """Whether a folder holds what the teacher gives; None where nothing in it can be compared."""
    try:
        if not compare_files(files, folder)[0]:
            return True
        cache = TeacherCache(folder)
        differing, num_compared = compare_views(cache, teacher, cache_dir, images, skip_damaged=True)
    except UserError:  # no images, or no basis: the pass repairs its own folder
        return None
    return None if not num_compared else differing is None
