"""A user's own images: what an image folder holds, how it is split, read, told and recognised."""
import os
import types

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer


def draw(folder, *names, colour=(0, 0, 0)):
    """Small images of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4), colour).save(folder / name)


def dataset(folder, **classes):
    """DIR/<class>/00.png ...; the images of class k have red = 10 k and green = their number."""
    for label, (name, n) in enumerate(sorted(classes.items())):
        for i in range(n):
            draw(folder / name, f"{i:03d}.png", colour=(10 * label, i, 0))
    return folder


def world(folder, split):
    return tokenizer.world(types.SimpleNamespace(dataset="folder", data=str(folder)), split)


def told(folder):
    """What the folder world refuses, in one line."""
    with pytest.raises(ValueError) as error:
        world(folder, "test")
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------- what a folder holds
def test_one_rule_for_what_is_an_image(tmp_path):
    """Suffixes in any case, linked files and folders; nothing hidden, no folders that look so."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    draw(root, "a.png", "._a.png", ".hidden.jpg")
    draw(root / "deep/er", "b.JPG", "c.Tiff")
    draw(root / ".Trash", "d.png")
    draw(root / "deep/.ipynb_checkpoints", "e-checkpoint.png")
    draw(root / "folder.png", "f.webp")
    draw(elsewhere, "g.PNG", "h.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "linked.bmp").symlink_to(elsewhere / "h.png")
    (root / "gone.png").symlink_to(elsewhere / "gone.png")
    (root / "notes.txt").write_text("")
    (root / "deep/README").write_text("")
    os.mkfifo(root / "pipe.png")
    files, left_out = tokenizer.find_images(root)
    assert [str(file.relative_to(root)) for file in files] == [
        "a.png", "deep/er/b.JPG", "deep/er/c.Tiff", "folder.png/f.webp", "linked/g.PNG",
        "linked/h.png", "linked.bmp"]
    assert files == tokenizer.image_files(str(root))
    assert left_out == {"hidden file": 2, "hidden folder": 2, "broken link": 1, ".txt file": 1,
                        "other file": 1, ".png file": 1}
    for file in files:
        tokenizer.read_image(file)


def test_links_that_lead_back_end(tmp_path):
    draw(tmp_path / "a/b", "x.png")
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    (tmp_path / "again").symlink_to(tmp_path / "a/b")
    files, left_out = tokenizer.find_images(tmp_path)
    assert len(files) == 1
    assert left_out == {"repeated folder": 2, "broken link": 1}


def test_no_images(tmp_path):
    draw(tmp_path / ".hidden", "a.png")
    with pytest.raises(ValueError, match="--reference .*: no images there .*1 hidden folder"):
        tokenizer.image_files(tmp_path, "--reference")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(ValueError, match="cannot be listed: Permission denied$"):
        tokenizer.image_files(tmp_path)


# -------------------------------------------------------------------- classes
def test_hidden_and_linked_classes(tmp_path):
    """A class may be a link; .ipynb_checkpoints and ._x.png are neither classes nor images."""
    data = dataset(tmp_path / "data", cat=30, dog=30)
    (tmp_path / "data/dog").rename(tmp_path / "elsewhere")
    (data / "dog").symlink_to(tmp_path / "elsewhere")
    draw(data / ".ipynb_checkpoints", "a.png")
    (data / "cat/._000.png").write_bytes(b"\0\5\x16\7")
    (data / "cat/.ipynb_checkpoints").mkdir()
    draw(data / "cat/folder.png", "a.png")
    images, labels, names = tokenizer.folder(data)
    assert names == ["cat", "dog"] and labels.bincount().tolist() == [30, 30]


def test_one_line_says_what_is_used_and_what_is_not(tmp_path):
    data = dataset(tmp_path / "data", cat=25, dog=20)
    assert tokenizer.folder_summary(data) == f"{data}: 45 images in 2 classes"
    draw(data, "beside.png")
    draw(data / "cat", ".a.png", ".b.png")
    draw(data / "cat/deeper", "c.png")
    (data / "dog/notes.TXT").write_text("")
    (data / "dog/Thumbs.db").write_text("")
    (data / "list.txt").write_text("")
    line = tokenizer.folder_summary(data)
    assert line.startswith(f"{data}: 45 images in 2 classes; not used: ")
    assert set(line.split(": ")[-1].split(", ")) == {
        "2 hidden files", "2 .txt files", "1 .db file", "1 nested folder", "1 unsorted image"}


def test_what_cannot_be_trained_is_refused(tmp_path):
    for case, classes in enumerate([dict(all=60), dict(a=50, b=1), dict(a=20, b=19), dict(a=50)]):
        dataset(tmp_path / str(case), **classes)
    assert "has one class folder, 'all'; at least 2" in told(tmp_path / "0")
    assert "class folder 'b' has one image; at least 2" in told(tmp_path / "1")
    assert "has fewer than 40 images: 39; classes: 2" in told(tmp_path / "2")
    (tmp_path / "3/b").mkdir()
    (tmp_path / "3/b/._x.png").write_bytes(b"\0\5\x16\7")
    assert "no images in class folder 'b'" in told(tmp_path / "3")
    assert "not used: 1 hidden file" in told(tmp_path / "3")
    dataset(tmp_path / "4", **{"a": 30, "b\nc": 30})
    assert r"the name of class folder 'b\nc' cannot be printed" in told(tmp_path / "4")


# -------------------------------------------------------------------- the split
def numbers(split):
    """-> {label: numbers of its images in the order of the split}"""
    images, labels, _ = split
    assert torch.equal(images[:, 0, 0, 0].long(), 10 * labels)
    return {k: images[labels == k, 1, 0, 0].tolist() for k in labels.unique().tolist()}


def test_every_class_is_trained_and_tested(tmp_path):
    """Of n images the test has n / 10, at least one; train has the rest, and none is in both."""
    sizes = [9, 2, 40, 5, 19, 20, 105]
    data = dataset(tmp_path / "data", **{f"c{k}": n for k, n in enumerate(sizes)})
    train, test = numbers(world(data, "train")), numbers(world(data, "test"))
    assert [len(test[k]) for k in range(7)] == [1, 1, 4, 1, 1, 2, 10]
    for k, n in enumerate(sizes):
        assert sorted(train[k] + test[k]) == list(range(n))
    for split in ("phi", "judge"):
        assert numbers(world(data, split)) == train


def test_the_test_is_spread_over_the_files_of_a_class(tmp_path):
    """Files are often named in the order of time: a tenth from each stretch of ten."""
    data = dataset(tmp_path / "data", a=200, b=2)
    test = numbers(world(data, "test"))[0]
    assert sorted(i // 10 for i in test) == list(range(20))
    # and each half of it from all over: [:n] is what a report of n images compares with
    for half in (test[:10], test[10:]):
        assert max(half) > 120 and min(half) < 80 and 60 < np.mean(half) < 140


@pytest.mark.parametrize("sizes", [[60] * 10, [200, 100, 40, 20, 20]])
def test_a_cut_of_the_test_has_all_classes_in_their_shares(tmp_path, sizes):
    data = dataset(tmp_path / "data", **{f"c{k}": n for k, n in enumerate(sizes)})
    _, labels, names = world(data, "test")
    share = torch.tensor([n // 10 for n in sizes]) / len(labels)
    for n in range(len(labels) + 1):
        for cut in (labels[:n], labels[len(labels) - n:]):
            assert (cut.bincount(minlength=len(sizes)) - n * share).abs().max() <= 1
    assert torch.equal(labels, world(data, "test")[1])


# -------------------------------------------------------------------- read once
@pytest.fixture
def reads(monkeypatch):
    """-> list of the files that were read"""
    seen = []
    read = tokenizer.read_image
    monkeypatch.setattr(tokenizer, "read_image",
                        lambda path, *args: seen.append(path.name) or read(path, *args))
    return seen


def test_images_are_read_once_with_a_bar(tmp_path, reads, capsys):
    data = dataset(tmp_path / "data", a=20, b=20)
    for split in ("train", "phi", "judge", "test"):
        world(data, split)
    tokenizer.folder_digest(data)
    assert len(reads) == 40
    assert "reading images" in capsys.readouterr().err
    # what changed meanwhile is read again
    draw(data / "a", "000.png", colour=(0, 99, 0))
    os.utime(data / "a/000.png", (1, 1))
    assert 99 in sum(numbers(world(data, "train")).values(), [])
    assert len(reads) == 80


def test_what_one_caller_does_to_its_images_no_other_sees(tmp_path):
    data = dataset(tmp_path / "data", a=20, b=20)
    for split in ("train", "test"):
        before = world(data, split)[0]
        world(data, split)[0].zero_()
        assert torch.equal(world(data, split)[0], before) and before.any()


def test_the_bar_is_gone_before_an_error_is_told(tmp_path, capsys):
    data = dataset(tmp_path / "data", a=20, b=20)
    (data / "b/x.png").write_text("no image")
    assert "x.png cannot be read as an image" in told(data)
    assert capsys.readouterr().err.endswith("\r")


# -------------------------------------------------------------------- recognised
def test_the_digest_tells_data_apart(tmp_path):
    """Another name, order, class, file or content is other data; another place or time is not."""
    data = dataset(tmp_path / "data", ant=20, bee=20)
    digests = [tokenizer.folder_digest(data)]
    os.utime(data / "ant/000.png", (1, 1))
    data.rename(tmp_path / "moved")
    data = tmp_path / "moved"
    assert tokenizer.folder_digest(data) == digests[0] and len(digests[0]) == 12

    (data / "ant").rename(data / "zebra")
    digests.append(tokenizer.folder_digest(data))
    (data / "zebra").rename(data / "aardvark")
    digests.append(tokenizer.folder_digest(data))
    draw(data / "cow", "0.png", "1.png")
    digests.append(tokenizer.folder_digest(data))
    (data / "cow/1.png").rename(data / "bee/999.png")
    draw(data / "cow", "2.png")
    digests.append(tokenizer.folder_digest(data))
    draw(data / "cow", "2.png", colour=(1, 2, 3))
    os.utime(data / "cow/2.png", (1, 1))
    digests.append(tokenizer.folder_digest(data))
    assert len(set(digests)) == len(digests)
