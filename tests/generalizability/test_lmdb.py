"""Image folders as LMDB files: building, continuing after a kill, reading in workers, and errors."""

import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image
from processes import run_forked, started_python
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import decoding_benchmark
import folder2lmdb
from data.image_lmdb import Contents, ImageFolderLMDB, append_records, make_record, reopen_unfinished
from folder2lmdb import Args, main
from s3net_common.command_line import run_script
from s3net_common.errors import InputError

FOLDER = Path(__file__).parents[2] / "generalizability"
SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three classes of 7, 5 and 4 JPEG files, one of them in a subfolder, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, count in {"cat": 7, "dog": 5, "eel": 4}.items():
        (folder / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(len(name) * 100 + i).integers(256, size=(40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{i}.JPEG")
    (folder / "eel" / "deep").mkdir()
    (folder / "eel" / "eel0.JPEG").rename(folder / "eel" / "deep" / "eel0.JPEG")
    (folder / "cat" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def small_transactions(monkeypatch):
    """Three or four photographs per transaction."""
    monkeypatch.setattr(folder2lmdb, "TRANSACTION_BYTES", 12_000)


@pytest.fixture(scope="module")
def built_file(photographs, tmp_path_factory):
    """The photographs as an LMDB file."""
    file = tmp_path_factory.mktemp("built") / "train.lmdb"
    assert main(Args(file, photographs, workers=2)) == 0
    return file


def copy_tree(photographs, folder):
    for path in photographs.rglob("*.JPEG"):
        target = folder / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


# -- Content of the file --


def test_the_file_has_the_bytes_labels_and_names_of_the_images(photographs, built_file):
    data = ImageFolderLMDB(built_file)
    assert len(data) == 16 and data.classes == ["cat", "dog", "eel"] and data.class_to_idx["eel"] == 2
    assert data.labels.dtype == np.int64 and data.labels.tolist() == [0] * 7 + [1] * 5 + [2] * 4
    assert [data.name(i) for i in (0, 7, 12, -1)] == ["cat/cat0.JPEG", "dog/dog0.JPEG", "eel/deep/eel0.JPEG",
                                                     "eel/eel3.JPEG"]  # fmt: skip
    for i in range(len(data)):
        assert data.encoded(i) == ((photographs / data.name(i)).read_bytes(), data.labels[i])
    with pytest.raises(IndexError):
        data[16]


def test_items_equal_those_of_torchvisions_image_folder(photographs, built_file):
    transform = transforms.Compose([transforms.CenterCrop(32), transforms.ToTensor()])
    folder = ImageFolder(str(photographs), transform)
    positions = {path: i for i, (path, _) in enumerate(folder.samples)}
    data = ImageFolderLMDB(built_file, transform)
    assert len(folder) == len(data)
    for i in range(len(data)):
        image, label = folder[positions[str(photographs / data.name(i))]]
        assert data[i][0].equal(image) and data[i][1] == label
    image, _ = ImageFolderLMDB(built_file)[0]
    assert image.mode == "RGB" and image.size == (60, 40)


def test_the_format_is_the_documented_one(built_file):
    with lmdb.open(str(built_file), subdir=False, readonly=True, lock=False, max_dbs=1) as environment:
        images = environment.open_db(b"images", create=False)
        with environment.begin() as transaction:
            info = json.loads(transaction.get(b"info"))
            record = transaction.get((8).to_bytes(8, "big"), db=images)
            records = [value for _, value in transaction.cursor(images)]
    assert info["format"] == "image-folder-lmdb" and info["version"] == 1 and info["counts"] == [7, 5, 4]
    assert record[:19] == b"\1\0\0\0" + b"\x0d\0" + b"dog/dog1.JPEG" and record[19:21] == b"\xff\xd8"
    digest = b""
    for value in records:
        digest = hashlib.sha256(digest + hashlib.sha256(value).digest()).digest()
    assert info["digest"] == digest.hex()


# -- The same images give the same bytes --


def test_building_twice_gives_the_same_bytes(photographs, built_file, tmp_path):
    assert main(Args(tmp_path / "again.lmdb", photographs, workers=1)) == 0
    assert (tmp_path / "again.lmdb").read_bytes() == built_file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.lmdb"]


def test_a_killed_build_continues_to_the_same_bytes(photographs, tmp_path, small_transactions):
    assert main(Args(tmp_path / "uninterrupted.lmdb", photographs)) == 0
    slow = (  # the script with a pause after the second transaction
        "import time, folder2lmdb as f; f.TRANSACTION_BYTES = 12_000\n"
        "append, calls = f.append_records, []\n"
        "def append_and_pause(*arguments):\n"
        "    append(*arguments); calls.append(1)\n"
        "    if len(calls) == 2: print('paused', flush=True); time.sleep(60)\n"
        "f.append_records = append_and_pause; f.run_script(f.main, f.Args, '')"
    )
    target, partial = tmp_path / "killed.lmdb", tmp_path / "killed.lmdb.partial"
    flags = ["--images", photographs, "--out", target]
    with started_python("-c", slow, *flags, cwd=FOLDER, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "paused\n"
        with pytest.raises(InputError, match=r"killed.lmdb.partial is being written by another process"):
            main(Args(target, photographs))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 0 < len(reopen_unfinished(partial)) < 16 and not target.exists()
    with pytest.raises(InputError, match="is not finished"):
        ImageFolderLMDB(partial)
    with partial.open("ab") as file:  # as an interrupted transaction would
        file.write(b"\xaa" * 9000)
    assert main(Args(target, photographs)) == 0
    assert target.read_bytes() == (tmp_path / "uninterrupted.lmdb").read_bytes() and not partial.exists()


def test_aborted_transactions_do_not_change_the_bytes(tmp_path):
    """The records are many and small, so that branch pages split. A write is aborted before each transaction."""

    def write(path, abort):
        contents = Contents(["a"], [0])
        for start in range(0, 9000, 1500):
            records = [make_record(f"a/{i}", 0, bytes([i % 251]) * (i % 97)) for i in range(start, start + 1500)]
            contents.counts[0] += len(records)
            if abort:
                with lmdb.open(str(path), subdir=False, lock=False, max_dbs=1) as environment:
                    transaction = environment.begin(write=True)
                    transaction.put(b"zzz", b"x" * 50_000)
                    transaction.abort()
            append_records(path, records, contents)
        return path.read_bytes()

    assert write(tmp_path / "finished", abort=False) == write(tmp_path / "aborted", abort=True)


def test_a_build_continues_after_a_full_disk(photographs, built_file, tmp_path, small_transactions):
    resource = pytest.importorskip("resource")  # Windows lacks it
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (45_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"partial cannot be written \(.*is the disk full\?\): make room"):
            main(Args(tmp_path / "train.lmdb", photographs))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["train.lmdb.partial"]
    assert 0 < len(reopen_unfinished(tmp_path / "train.lmdb.partial")) < 16
    assert main(Args(tmp_path / "train.lmdb", photographs)) == 0
    assert ImageFolderLMDB(tmp_path / "train.lmdb").digest == ImageFolderLMDB(built_file).digest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_prints_how_to_continue(photographs, tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr(folder2lmdb, "append_records", lambda *_: signal.raise_signal(number))
    monkeypatch.setattr(
        "sys.argv", ["folder2lmdb.py", "--out", str(tmp_path / "train.lmdb"), "--images", str(photographs)]
    )
    resume = re.search(r"resume=\"(.*)\"", Path(folder2lmdb.__file__).read_text()).group(1)
    with pytest.raises(SystemExit) as stop:
        run_script(main, Args, "", resume=resume)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err.endswith("\nstopped; run the same command again to continue\n")
    assert not (tmp_path / "train.lmdb").exists()


# -- Images that cannot be decoded --


def test_an_unreadable_image_stops_the_build_or_is_skipped(photographs, tmp_path, capsys, small_transactions):
    folder, file = copy_tree(photographs, tmp_path / "images"), tmp_path / "val.lmdb"
    bad = folder / "dog" / "dog3.JPEG"
    bad.write_bytes(bad.read_bytes()[:900])
    with pytest.raises(InputError, match=r"dog3.JPEG cannot be read as an image \(.*truncated.*\): remove or"):
        main(Args(file, folder))
    assert not file.exists()
    assert main(Args(file, folder, skip_unreadable=True, verify=True)) == 0  # continues
    printed = capsys.readouterr()
    assert f"cannot be decoded: {bad} (image file is truncated" in printed.err
    assert "1 images that cannot be decoded were skipped: dog/dog3.JPEG" in printed.out
    assert "is sound: 15 images decoded" in printed.out
    data = ImageFolderLMDB(file)
    assert data.skipped == ["dog/dog3.JPEG"] and data.labels.tolist() == [0] * 7 + [1] * 4 + [2] * 4
    assert main(Args(tmp_path / "uninterrupted.lmdb", folder, skip_unreadable=True)) == 0
    assert (tmp_path / "uninterrupted.lmdb").read_bytes() == file.read_bytes()


def test_one_error_names_all_unreadable_images(photographs, tmp_path, small_transactions):
    folder, file = copy_tree(photographs, tmp_path / "images"), tmp_path / "val.lmdb"
    bad = ["cat/cat6.JPEG", "dog/dog3.JPEG", "eel/eel1.JPEG"]
    for name in bad:
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"^3 images cannot be read: .*cat6.JPEG \(the file is empty\), .*dog3.*eel1"):
        main(Args(file, folder))
    assert main(Args(file, folder, skip_unreadable=True)) == 0  # continues
    assert ImageFolderLMDB(file).skipped == bad
    assert main(Args(tmp_path / "uninterrupted.lmdb", folder, skip_unreadable=True)) == 0
    assert (tmp_path / "uninterrupted.lmdb").read_bytes() == file.read_bytes()


def test_a_class_folder_without_images_is_refused_unless_the_order_is_given(photographs, tmp_path, capsys):
    folder, names = copy_tree(photographs, tmp_path / "images"), tmp_path / "classes.txt"
    (folder / "bee").mkdir()
    with pytest.raises(InputError, match=r"there are no images in .*images/bee: add some, remove the folder, or pass"):
        main(Args(tmp_path / "a.lmdb", folder))
    names.write_text("bee\ncat\ndog\neel\n")
    assert main(Args(tmp_path / "a.lmdb", folder, names)) == 0
    assert ImageFolderLMDB(tmp_path / "a.lmdb").classes == ["bee", "cat", "dog", "eel"]
    assert "class folders without images: 1 (bee)" in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_is_kept(photographs, tmp_path):
    folder = copy_tree(photographs, tmp_path / "images")
    name = b"cat/caf\xe9.JPEG"
    os.rename(folder / "cat" / "cat0.JPEG", os.fsencode(folder) + b"/" + name)  # noqa: PTH104
    assert main(Args(tmp_path / "a.lmdb", folder, verify=True)) == 0
    assert os.fsencode(ImageFolderLMDB(tmp_path / "a.lmdb").name(0)) == name


def test_the_error_of_an_undecodable_image_names_it(tmp_path):
    append_records(tmp_path / "f", [make_record("a/b.jpg", 0, b"no image")], Contents(["a"], [1], complete=True))
    with pytest.raises(InputError, match=r"a/b.jpg in .*f cannot be decoded: only 8 B"):
        ImageFolderLMDB(tmp_path / "f")[0]


# -- The listing and the classes --


def test_a_build_does_not_continue_with_other_images(photographs, tmp_path, small_transactions):
    folder, file = copy_tree(photographs, tmp_path / "images"), tmp_path / "train.lmdb"
    last = folder / "eel" / "eel3.JPEG"
    good = last.read_bytes()
    last.write_bytes(b"")
    with pytest.raises(InputError, match="eel3"):
        main(Args(file, folder))
    last.write_bytes(good)
    (folder / "cat" / "cat00.JPEG").write_bytes(good)
    with pytest.raises(InputError, match=r"have changed since .*partial was started: pass --overwrite"):
        main(Args(file, folder))
    assert main(Args(file, folder, overwrite=True)) == 0
    assert ImageFolderLMDB(file).name(1) == "cat/cat00.JPEG"
    with pytest.raises(InputError, match="exists already: pass --overwrite"):
        main(Args(file, folder))


def test_classes_file_fixes_the_order(photographs, tmp_path, capsys):
    names = tmp_path / "classes.txt"
    names.write_text("eel\tan eel\nbee\tno folder\ndog\ncat\n")
    assert main(Args(tmp_path / "a.lmdb", photographs, names)) == 0
    data = ImageFolderLMDB(tmp_path / "a.lmdb")
    assert data.classes == ["eel", "bee", "dog", "cat"] and data.labels.tolist() == [0] * 4 + [2] * 5 + [3] * 7
    assert data.encoded(0)[1] == 0 and data.name(0) == "eel/deep/eel0.JPEG"
    assert "1 of the 4 classes have no images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog\n", "eel is not one of the 2 classes"),
        ("cat\ndog\ncat\neel\n", "contains 'cat' twice"),
        ("\n", "is empty"),
        (None, "cannot be read"),
    ],
)
def test_wrong_classes_file(photographs, tmp_path, text, message):
    names = tmp_path / "classes.txt"
    if text is not None:
        names.write_text(text)
    with pytest.raises(InputError, match=message):
        main(Args(tmp_path / "a.lmdb", photographs, names))
    assert not list(tmp_path.glob("a.lmdb*"))


def test_wrong_flags(photographs, tmp_path):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    for args, message in [
        (Args(tmp_path / "a"), "nothing to do"),
        (Args(tmp_path / "a", tmp_path / "none"), "there is no folder"),
        (Args(tmp_path / "a", tmp_path / "empty"), "has no images"),
        (Args(tmp_path, photographs), "is a folder"),
        (Args(tmp_path / "a", photographs, workers=-1), "--workers -1"),
        (Args(tmp_path / "a", verify=True), "cannot be opened"),
    ]:
        with pytest.raises(InputError, match=message):
            main(args)


# -- Reading in other processes --


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_open_the_file_themselves(built_file, start):
    data = ConcatDataset(
        [ImageFolderLMDB(built_file, np.asarray), ImageFolderLMDB(built_file, np.mean)]
    )  # two readers of one file
    expected = [(np.sum(values), label) for values, label in data]  # the parent process has read the file, too
    loader = DataLoader(data, 4, num_workers=2, multiprocessing_context=start, collate_fn=list)
    assert [(np.sum(values), label) for batch in loader for values, label in batch] == expected


def test_a_pickle_does_not_contain_the_images(built_file):
    data = ImageFolderLMDB(built_file)
    pickled = pickle.dumps(data)
    assert len(pickled) < 2000 and pickle.loads(pickled).encoded(3) == data.encoded(3)


def test_a_file_that_is_replaced_while_in_use_is_an_error(photographs, tmp_path):
    def write(image):
        append_records(
            tmp_path / "f", [make_record("a/b.jpg", 0, image)], Contents(["a"], [1], [], image.hex(), "", True)
        )

    write(b"\x01")
    pickled = pickle.dumps(ImageFolderLMDB(tmp_path / "f"))
    (tmp_path / "f").unlink()
    write(b"\x02")
    with pytest.raises(InputError, match="another file has replaced"):
        pickle.loads(pickled).encoded(0)


# -- Damaged files and files of other formats --


def test_files_that_cannot_be_used(built_file, tmp_path):
    content = built_file.read_bytes()
    (tmp_path / "truncated").write_bytes(content[: len(content) // 2])
    (tmp_path / "stub").write_bytes(content[:100])
    (tmp_path / "text").write_text("no LMDB" * 10_000)
    (tmp_path / "empty").touch()
    foreign = tmp_path / "foreign"
    with lmdb.open(str(foreign), subdir=False, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", b"an image")
    newer = tmp_path / "newer"
    newer.write_bytes(content.replace(b'"version": 1', b'"version": 2'))
    (tmp_path / "counts").write_bytes(content.replace(b'"counts": [7, 5, 4]', b'"counts": "7,  5,4"'))
    for name, message in {
        "truncated": r"truncated is truncated: it has [\d,]+ of [\d,]+ bytes",
        "stub": "stub is not an LMDB file",
        "text": "text is not an LMDB file",
        "empty": "empty is not an LMDB file",
        "foreign": "foreign was not written by folder2lmdb.py",
        "newer": "newer has version 2 of its format and this program reads version 1",
        "counts": "counts was not written by folder2lmdb.py",
        "absent": r"absent cannot be opened \(No such file or directory\)",
        ".": "is a folder, not an LMDB file",
    }.items():
        with pytest.raises(InputError, match=message):
            ImageFolderLMDB(tmp_path / name)


def test_a_record_with_a_damaged_header_is_an_error(built_file, tmp_path):
    content, name = built_file.read_bytes(), b"cat/cat0.JPEG"
    header = b"\0\0\0\0" + bytes([len(name), 0]) + name
    damaged = tmp_path / "damaged.lmdb"
    for replaced in (bytes(len(header)), b"\7" + header[1:]):  # no name; label 7 of 3 classes
        assert content.count(header) == 1
        damaged.write_bytes(content.replace(header, replaced))
        with pytest.raises(InputError, match=r"damaged.lmdb is damaged: image 0 is missing or has a wrong header"):
            ImageFolderLMDB(damaged).encoded(0)
        assert ImageFolderLMDB(damaged).encoded(1)[1] == 0
        damaged.unlink()


def test_a_file_whose_images_have_another_name_is_an_error(built_file, tmp_path):
    content = built_file.read_bytes()
    (tmp_path / "damaged.lmdb").write_bytes(content.replace(b"\x06\0images", b"\x06\0imagez"))
    with pytest.raises(InputError, match=r"damaged.lmdb is damaged: it has no images; copy it again, or build it"):
        ImageFolderLMDB(tmp_path / "damaged.lmdb")


def test_verify_finds_a_changed_byte(built_file, tmp_path, capsys):
    assert main(Args(built_file, verify=True)) == 0
    assert f"16 images decoded, digest {ImageFolderLMDB(built_file).digest}" in capsys.readouterr().out
    content = bytearray(built_file.read_bytes())
    image, _ = ImageFolderLMDB(built_file).encoded(5)
    position = content.index(image) + len(image) - 40  # in the coded pixels: it still decodes
    content[position] ^= 1
    damaged = tmp_path / "damaged.lmdb"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="is damaged: its records have the digest"):
        main(Args(damaged, verify=True))
    content[content.index(image[:100]) : content.index(image[:100]) + 2] = b"no"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=r"\d of 16 images in .*damaged.lmdb cannot be used"):
        main(Args(damaged, verify=True))


def test_the_script_prints_one_line_and_exits_with_2(tmp_path):
    process = run_forked(FOLDER / "folder2lmdb.py", "--out", tmp_path / "a.lmdb", "--images", tmp_path / "none")
    assert process.returncode == 2 and process.stdout == ""
    assert (
        process.stderr
        == f"error: there is no folder {tmp_path / 'none'}: pass --images DIR with the images in DIR/<class>/\n"
    )


# -- The benchmark --


def test_the_decoding_benchmark_compares_the_same_images(photographs, monkeypatch, capsys):
    labels = {}

    def images_per_second(data, workers):
        labels.setdefault(workers, []).append([data[i][1] for i in range(len(data))])
        return 100.0

    monkeypatch.setattr(decoding_benchmark, "images_per_second", images_per_second)
    results = decoding_benchmark.benchmark_decoding(1, photographs)
    assert results["count"] == 16 and all(case == labels[0][0] for case in labels[0] + labels[2])
    assert len(labels[0]) == len(decoding_benchmark.CASES)
    assert results["workers"]["0"]["share_of_the_decoder"]["LMDB, warm"]["median"] == 1.0
    decoding_benchmark.print_decoding(results)
    assert "LMDB, cold              100.0 images/s         1.000" in capsys.readouterr().out


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs the sample of ImageNet")
def test_real_photographs(tmp_path):
    file, names = tmp_path / "sample.lmdb", SAMPLE.parent / "imagenet_wnids.txt"
    assert main(Args(file, SAMPLE, names)) == 0
    data = ImageFolderLMDB(file)
    assert len(data) == 60 and len(data.classes) == 1000
    assert data.encoded(0)[0] == (SAMPLE / data.name(0)).read_bytes()
    assert data.digest == "426f15e47086a44685524e56709d47c14767ae97f3cfe144aedd50c68fc49c0f"
