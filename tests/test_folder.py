"""A user's own images: what a folder holds, how it is split, read once and recognised."""
import os
import types

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
    """DIR/<class>/000.png ...; the images of class k have red = 10 k and green = their number."""
    for label, (name, n) in enumerate(sorted(classes.items())):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            draw(folder / name, f"{i:03d}.png", colour=(10 * label, i, 0))
    return folder


def settings(folder):
    return types.SimpleNamespace(dataset="folder", data=str(folder))


def world(folder, split):
    return tokenizer.world(settings(folder), split)


# -------------------------------------------------------------------- what a folder holds
def test_hidden_files_are_no_images(tmp_path):
    """Suffixes in any case and linked folders; nothing hidden."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    draw(root, "b.png", "._b.png", ".hidden.jpg")
    draw(root / "deep/er", "b.JPG", "c.Tiff")
    draw(root / "deep/.ipynb_checkpoints", "e-checkpoint.png")
    draw(root / "folder.png", "f.webp")
    draw(elsewhere, "g.PNG")
    (root / "linked").symlink_to(elsewhere)
    (root / "notes.txt").write_text("")
    files = tokenizer.image_files(str(root))
    assert [str(file.relative_to(root)) for file in files] == [
        "b.png", "deep/er/b.JPG", "deep/er/c.Tiff", "folder.png/f.webp", "linked/g.PNG"]
    assert tokenizer.image_files(elsewhere) == [elsewhere / "g.PNG"]
    with pytest.raises(ValueError, match="no images in .*gone"):
        tokenizer.image_files(tmp_path / "gone")


def test_classes_are_the_subfolders_sorted_by_name(tmp_path, capsys):
    data = dataset(tmp_path / "data", cat=25, dog=20)
    draw(data, "beside.png")
    draw(data / "cat", ".a.png")
    draw(data / ".ipynb_checkpoints", "a.png")
    draw(data / "a red  apple", "b.png", "UPPER CASE.PNG")
    (data / "dog/notes.txt").write_text("")
    images, labels, names = tokenizer.folder(data, "")
    assert names == ["a red  apple", "cat", "dog"] and labels.bincount().tolist() == [2, 25, 20]
    assert labels.tolist() == sorted(labels.tolist()) and images[27:, 0, 5, 5].eq(10).all()
    assert images.shape == (47, 3, 32, 32) and images.dtype == torch.uint8
    assert capsys.readouterr().out.strip() == (
        f"{data}: the centre squares of 47 images in 3 classes, scaled to 32 x 32 pixels; 4 other "
        "files left out")


@pytest.mark.parametrize("classes", [dict(a=50, b=1), dict(a=50, b=0), dict(a=50)])
def test_a_class_without_training_or_test_images_is_refused(tmp_path, classes):
    with pytest.raises(ValueError, match="images"):
        world(dataset(tmp_path, **classes), "test")


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


def test_the_split_is_the_recorded_one():
    """Digits' numbers in the README depend on the very images and their order."""
    train, test = tokenizer.split_folder(torch.tensor(25 * [0] + 40 * [1]))
    assert test.tolist() == [60, 6, 30, 50, 18, 40]
    assert train.tolist() == [i for i in range(65) if i not in test]


# -------------------------------------------------------------------- read once, recognised
def test_the_stamp_tells_data_apart(tmp_path):
    """Another name, class, size or time is other data; another place is not."""
    data = dataset(tmp_path / "data", ant=3, bee=3)
    stamps = {tokenizer.fingerprint(settings(data), times=True)}
    data = data.rename(tmp_path / "moved")
    assert tokenizer.fingerprint(settings(data), times=True) in stamps
    without_times = tokenizer.fingerprint(settings(data))
    for change in (lambda: os.utime(data / "ant/000.png", (1, 1)),
                   lambda: (data / "ant").rename(data / "zebra"),
                   lambda: draw(data / "bee", "0.png"),
                   lambda: (data / "bee/0.png").rename(data / "bee/1.png")):
        change()
        assert tokenizer.fingerprint(settings(data), times=True) not in stamps
        stamps.add(tokenizer.fingerprint(settings(data), times=True))
        # a copy has other times
        assert (tokenizer.fingerprint(settings(data)) == without_times) == (len(stamps) == 2)
    assert tokenizer.fingerprint(types.SimpleNamespace(dataset="shapes")) == ""


def test_what_train_py_writes_beside_the_classes_is_no_class(tmp_path, monkeypatch):
    """cd photos; python .../train.py --data ."""
    monkeypatch.chdir(dataset(tmp_path, ant=3, bee=3))
    draw(tmp_path / "runs/folder/samples", "000000.png")
    assert world(".", "train")[2] == ["ant", "bee"]
