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
    """Suffixes in any case count, nothing hidden, and no folder behind a link: `ln -s . all` would
    list every image many times."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    draw(root, "b.png", "._b.png", ".hidden.jpg")
    draw(root / "deep/er", "b.JPG", "c.Tiff")
    draw(root / "deep/.ipynb_checkpoints", "e-checkpoint.png")
    draw(root / "folder.png", "f.webp")
    (root / "all").symlink_to(root)
    (root / "notes.txt").write_text("")
    elsewhere.symlink_to(root)
    names = ["b.png", "deep/er/b.JPG", "deep/er/c.Tiff", "folder.png/f.webp"]
    for place in (root, elsewhere):
        assert tokenizer.image_files(str(place)) == [place / name for name in names]
    with pytest.raises(ValueError, match="no images in .*gone"):
        tokenizer.image_files(tmp_path / "gone")


def test_classes_are_the_subfolders_sorted_by_name(tmp_path, capsys):
    data = dataset(tmp_path / "data", cat=25, dog=20)
    draw(data, "beside.png")
    draw(data / "cat", ".a.png")
    draw(data / ".ipynb_checkpoints", "a.png")
    draw(tmp_path / "elsewhere", "b.png", "UPPER CASE.PNG", "c.png")
    (data / "a red  apple").symlink_to(tmp_path / "elsewhere")
    (data / "dog/notes.txt").write_text("")
    images, labels, names, _ = tokenizer.folder(data)
    assert names == ["a red  apple", "cat", "dog"] and labels.bincount().tolist() == [3, 25, 20]
    assert labels.tolist() == sorted(labels.tolist()) and images[28:, 0, 5, 5].eq(10).all()
    assert images.shape == (48, 3, 32, 32) and images.dtype == torch.uint8
    assert capsys.readouterr().out.strip() == (
        f"{data}: 48 images in 3 classes (a red  apple, cat, dog), centre squares at "
        "32 x 32 pixels; 2 other files ignored")


@pytest.mark.parametrize("classes", [dict(a=50, b=2), dict(a=50, b=0), dict(a=50)])
def test_a_class_without_images_to_train_on_and_for_the_test_is_refused(tmp_path, classes):
    with pytest.raises(ValueError, match="images"):
        world(dataset(tmp_path, **classes), "test")


def test_only_the_runs_that_this_command_writes_are_no_class(tmp_path, monkeypatch):
    """cd photos; python .../train.py --data .   In other places "runs" is a class like others."""
    data = dataset(tmp_path, ant=3, runs=3)
    assert world(data, "train")[2] == ["ant", "runs"]
    draw(tmp_path / "bee", "0.png", "1.png", "2.png")
    monkeypatch.chdir(data)
    assert world(".", "train")[2] == ["ant", "bee"]


# -------------------------------------------------------------------- the split
def numbers(split):
    """-> {label: numbers of its images in the order of the split}"""
    images, labels, _ = split
    assert torch.equal(images[:, 0, 0, 0].long(), 10 * labels)
    return {k: images[labels == k, 1, 0, 0].tolist() for k in labels.unique().tolist()}


def test_every_class_is_trained_and_tested(tmp_path):
    """Of n images n / 10, at least two, are kept for the test: one half is the reference, the other
    is scored like a model's. Each image is in one split."""
    sizes = [9, 3, 40, 5, 19, 20, 105]
    data = dataset(tmp_path / "data", **{f"c{k}": n for k, n in enumerate(sizes)})
    train, test, real = (numbers(world(data, split)) for split in ("train", "test", "real"))
    for split in (test, real):
        assert [len(split[k]) for k in range(7)] == [1, 1, 2, 1, 1, 1, 5]
    for k, n in enumerate(sizes):
        assert sorted(train[k] + test[k] + real[k]) == list(range(n))
    for split in ("phi", "judge"):
        assert numbers(world(data, split)) == train


def test_the_split_is_the_recorded_one():
    """Digits' numbers in the README depend on the very images and their order."""
    splits = tokenizer.split_folder(torch.tensor(25 * [0] + 40 * [1]))
    test, real = splits["test"].tolist(), splits["real"].tolist()
    assert (test, real) == ([50, 18, 40], [60, 6, 30])
    assert splits["train"].tolist() == [i for i in range(65) if i not in test + real]


# -------------------------------------------------------------------- read once, recognised
def test_a_folder_is_read_once_and_known_by_its_images_labels_and_names(tmp_path):
    """What changes while a network trains has no effect. In the next process it is other data, but
    not in another place, with other times or by a new name of a file in the same order."""
    data = dataset(tmp_path / "data", ant=3, bee=3)
    first = tokenizer.folder(str(data))
    known = [first[3]]
    changes = [lambda: os.utime(data / "ant/000.png", (1, 1)),
               lambda: (data / "ant/002.png").rename(data / "ant/7.png"),
               # Pixels of an equal size of file, a name, an image more, another class of an image
               lambda: draw(data / "ant", "000.png", colour=(0, 9, 0)),
               lambda: (data / "ant").rename(data / "zebra"),
               lambda: draw(data / "bee", "0.png"),
               lambda: (data / "bee/002.png").rename(data / "zebra/002.png")]
    for i, change in enumerate(changes):
        change()
        assert tokenizer.fingerprint(settings(data)) == known[-1]
        assert tokenizer.folder(str(data))[2] == (["ant", "bee"] if i < 4 else ["bee", "zebra"])
        tokenizer.folder.cache_clear()
        found = tokenizer.fingerprint(settings(data))
        assert found == known[-1] if i < 2 else found not in known
        known.append(found)
    data.rename(tmp_path / "moved")
    assert tokenizer.fingerprint(settings(tmp_path / "moved")) == known[-1]
    assert tokenizer.fingerprint(types.SimpleNamespace(dataset="shapes")) == ""
    with pytest.raises(ValueError, match="imagenet has no images"):
        tokenizer.world(types.SimpleNamespace(dataset="imagenet", smoke=True), "train")
