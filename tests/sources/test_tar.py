"""Tar archives of every origin, and the samples in them."""

import io
import tarfile

import pytest

from distillery.sources.registry import open_source
from distillery.system.errors import MissingFileError, UserError

IMAGES = [f"image {index}".encode() * 40 for index in range(6)]


def write_tar(path, members, mode="w", format=tarfile.USTAR_FORMAT):
    """members: (name, bytes), or a TarInfo without data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, type, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, target
    return info


def images(start, stop, suffix="png"):
    return [(f"{index}.{suffix}", IMAGES[index]) for index in range(start, stop)]


def open_tars(*paths, **arguments):
    return open_source(dataset_name="webdataset", data_files=[str(path) for path in paths], **arguments)


def rows(source):
    return [IMAGES.index(image) for image in source.read(0, len(source))]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_to_members_are_images_and_others_are_counted(tmp_path, format):
    members = [
        ("./0.png", IMAGES[0]),
        special("./1.png", tarfile.LNKTYPE, "./0.png"),
        special("./2.png", tarfile.SYMTYPE, "3.png"),
        special("./3.png", tarfile.SYMTYPE, "sub/4.png"),
        ("./sub/4.png", IMAGES[4]),
        special("./sub/5.png", tarfile.SYMTYPE, "../1.png"),
        special("./6.png", tarfile.SYMTYPE, "/data/elsewhere.png"),
        special("./7.png", tarfile.LNKTYPE, "./no.png"),
        special("./8.png", tarfile.SYMTYPE, "8.png"),
    ]
    source = open_tars(write_tar(tmp_path / "a.tar", members, format=format))
    assert rows(source) == [0, 0, 4, 4, 4, 0]
    assert source.describe().endswith(", 3 links left out")


def test_a_hard_link_means_the_file_of_that_name_that_came_before_it(tmp_path):
    link = special("1.png", tarfile.LNKTYPE, "0.png")
    path = write_tar(tmp_path / "a.tar", [("0.png", IMAGES[0]), link, ("0.png", IMAGES[5])])
    assert rows(open_tars(path)) == [0, 0, 5]


def test_labels_may_be_links(tmp_path):
    link = special("1.cls", tarfile.LNKTYPE, "0.cls")
    members = [("0.png", IMAGES[0]), ("0.cls", b"7"), ("1.png", IMAGES[1]), link]
    assert open_tars(write_tar(tmp_path / "a.tar", members), labels_required=True).labels(0, 2).tolist() == [7, 7]


def test_archives_one_after_the_other_in_a_file_are_all_read(tmp_path):
    first = write_tar(tmp_path / "a", images(0, 2)).read_bytes()
    second = write_tar(tmp_path / "b", [("n" * 150 + ".png", IMAGES[2])], format=tarfile.PAX_FORMAT).read_bytes()
    (tmp_path / "c.tar").write_bytes(bytes(512) + first + second + first + bytes(3 << 20))
    source = open_tars(tmp_path / "c.tar")
    assert rows(source) == [0, 1, 2, 0, 1] and "left out" not in source.describe()


def test_bytes_after_the_end_mark_that_are_no_archive_are_counted(tmp_path):
    data = write_tar(tmp_path / "a.tar", images(0, 2)).read_bytes()
    (tmp_path / "a.tar").write_bytes(data + b"signature " * 5)
    source = open_tars(tmp_path / "a.tar")
    assert rows(source) == [0, 1] and source.describe().endswith(", 50 bytes after an end mark left out")


def test_a_damaged_header_does_not_end_an_archive_silently(tmp_path):
    path = write_tar(tmp_path / "a.tar", images(0, 4))
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.tar: .*no member begins at byte 2,048\). Copy or download it again"):
        open_tars(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_but_between_members_is_named(tmp_path, format):
    path = write_tar(tmp_path / "a.tar", images(0, 3), format=format)
    data = path.read_bytes()
    for size in (0, 100, 512, 700, 1023, 1025, 1500, 1536, 2600):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="a.tar: not an uncompressed tar archive, or truncated"):
            open_tars(path)


@pytest.mark.parametrize("mode, name", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_is_named_whatever_its_suffix(tmp_path, mode, name):
    path = write_tar(tmp_path / "a.tar", images(0, 2), mode)
    with pytest.raises(UserError, match=f"a.tar: .*it is {name} data.*Unpack"):
        open_tars(path)
    write_tar(tmp_path / "only/a.tar.gz", images(0, 2), mode)
    with pytest.raises(MissingFileError, match=r"no files for webdataset \(.tar\); it holds 1 others, first a.tar.gz"):
        open_source(dataset_name="webdataset", data_dir=str(tmp_path / "only"))
    write_tar(tmp_path / "only/b.tar", images(0, 2))
    source = open_source(dataset_name="webdataset", data_dir=str(tmp_path / "only"))
    assert source.describe().endswith(", 1 other files left out")


def test_access_times_in_incremental_archives_of_gnu_tar_are_no_folders(tmp_path):
    path = write_tar(tmp_path / "a.tar", [special("d", b"D"), ("0.png", IMAGES[0]), ("0.cls", b"5")])
    data = bytearray(path.read_bytes())
    for start, time in ((0, b"15302273560"), (512, b"15302273561"), (512 * 3, b"15302273562")):
        data[start + 257 : start + 265] = b"ustar  \0"
        data[start + 345 : start + 356] = time
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    for begin in (0, 512):
        path.write_bytes(data[begin:])
        source = open_tars(path, labels_required=True)
        assert source.labels(0, 1).tolist() == [5] and "left out" not in source.describe()


def sparse_members():
    """One image stored without its zeros, as GNU tar -S writes it: old GNU, and PAX versions 0.0, 0.1 and 1.0."""
    old = tarfile.TarInfo("0.png")
    old.type = tarfile.GNUTYPE_SPARSE
    yield "gnu", old, b""
    headers = {
        "0.0": {"GNU.sparse.size": "2048", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "1024",
                "GNU.sparse.numbytes": "512"},
        "0.1": {"GNU.sparse.size": "2048", "GNU.sparse.map": "1024,512", "GNU.sparse.name": "0.png"},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "2048",
                "GNU.sparse.name": "0.png"},
    }  # fmt: skip
    for version, header in headers.items():
        info = tarfile.TarInfo("0.png")
        info.pax_headers = header
        data = (b"1\n1024\n512\n".ljust(512, b"\0") if version == "1.0" else b"") + b"x" * 512
        info.size = len(data)
        yield version, info, data


@pytest.mark.parametrize("info, data", [pytest.param(*rest, id=version) for version, *rest in sparse_members()])
def test_a_sparse_image_is_refused_by_name(tmp_path, info, data):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"a.tar: 0.png is stored as a sparse file \(tar -S\).*Pack it again: mkdir x"):
        open_tars(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "a", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(special("1.png", tarfile.LNKTYPE, "0.png"))
    with pytest.raises(UserError, match="0.png is stored as a sparse file"):
        open_tars(tmp_path / "a.tar")


def test_a_sparse_member_that_is_not_read_changes_nothing(tmp_path):
    info = tarfile.TarInfo("1.bin")
    info.type = tarfile.GNUTYPE_SPARSE
    assert rows(open_tars(write_tar(tmp_path / "a.tar", [("0.png", IMAGES[0]), info, ("2.png", IMAGES[2])]))) == [0, 2]


def test_folders_devices_and_members_without_extension_are_no_images_and_counted(tmp_path):
    members = [
        special("d.png", tarfile.DIRTYPE),
        ("0.png", IMAGES[0]),
        special("1.png", tarfile.FIFOTYPE),
        special("2.png", tarfile.CHRTYPE),
        ("README", b"text"),
        ("../3.png", IMAGES[3]),
        ("/abs/./4.png", IMAGES[4]),
        ("5.png", b""),
    ]
    source = open_tars(write_tar(tmp_path / "a.tar", members))
    assert source.read(0, len(source)) == [IMAGES[0], IMAGES[3], IMAGES[4], b""]
    assert source.describe().endswith(", 2 special files, 1 members without an extension left out")


def test_keys_with_dots_are_explained(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"im.{index}.png", IMAGES[index]) for index in range(3)])
    explanation = r"A key ends at the first dot: im.0.png is '0.png' of sample 'im'. Rename the files \(here im_0.png\)"
    for column in (None, "png"):
        with pytest.raises(UserError, match=f"no sample has an image.*{explanation}"):
            open_tars(path, image_column=column)
    assert rows(open_tars(path, image_column="2.png")) == [2]


def test_images_with_dots_in_their_names_beside_others_are_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*images(0, 1), ("im.1.png", IMAGES[1]), ("im.2.png", IMAGES[2])])
    expected = ", 1 samples without an image, 2 images named like im.1.png (a key ends at the first dot) left out"
    assert open_tars(path).describe().endswith(expected)


def test_labels_that_are_not_beside_their_images_are_an_error(tmp_path):
    labels = [(f"{index}.cls", b"1") for index in range(3)]
    path = write_tar(tmp_path / "a.tar", images(0, 3) + labels)
    assert rows(open_tars(path)) == [0, 1, 2]
    message = (
        "0.cls is not beside its image .3 labels are not.: the members of a sample must be neighbours.*--sort=name"
    )
    for arguments in ({"label_column": "cls"}, {"labels_required": True}):
        with pytest.raises(UserError, match=message):
            open_tars(path, **arguments)
        with pytest.raises(UserError, match=message):
            open_tars(write_tar(tmp_path / "b.tar", images(0, 3)), write_tar(tmp_path / "c.tar", labels), **arguments)
    members = [*images(0, 1), labels[0], *images(1, 3), labels[2], labels[1]]
    with pytest.raises(UserError, match="a.tar: 1.cls is not beside its image .1 labels are not."):
        open_tars(write_tar(tmp_path / "a.tar", members), label_column="cls")


def test_the_same_keys_in_several_archives_are_several_samples(tmp_path):
    first = write_tar(tmp_path / "a.tar", [("0.png", IMAGES[0]), ("0.cls", b"3")])
    second = write_tar(tmp_path / "b.tar", [("0.png", IMAGES[1]), ("1.png", IMAGES[2]), ("1.cls", b"4")])
    source = open_tars(first, second, labels_required=True)
    assert rows(source) == [0, 1, 2] and source.labels(0, 3).tolist() == [3, -1, 4]


def test_a_name_twice_in_a_sample_is_an_error_and_twice_in_an_archive_two_images(tmp_path):
    assert rows(open_tars(write_tar(tmp_path / "a.tar", [*images(0, 2), ("0.png", IMAGES[2])]))) == [0, 1, 2]
    with pytest.raises(UserError, match="a.tar: 0.png is there twice in a sample. Unpacking keeps the last. Pack it"):
        open_tars(write_tar(tmp_path / "a.tar", [("0.png", IMAGES[0]), ("0.png", IMAGES[2])]))
