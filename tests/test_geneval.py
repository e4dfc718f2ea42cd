"""GenEval in evaluate.py: the rules equal the official scorer's (golden/geneval), the files around
them, and the folders of images."""
import copy
import json

import pytest
import torch
from conftest import load_case

import evaluate
import sample
import tokenizer

GOLDEN = load_case("geneval", "cases").info
PROMPT = {"tag": "position", "prompt": "a photo of a dog left of a cat",
          "include": [{"class": "cat", "count": 1},
                      {"class": "dog", "count": 1, "position": ["left of", 0]}]}
COLOR = {"tag": "colors", "prompt": "a photo of a blue cow",
         "include": [{"class": "cow", "count": 1, "color": "blue"}]}
COW = {"class": "cow", "box": [10, 10, 60, 60], "confidence": 0.9, "color": "blue"}
MADE_WITH = {"model": "student", "steps": 1, "seed": 0, "weights": "abc"}


def write_jsonl(path, objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def image_line(index, number, detections):
    return {"image": f"out/{index:05d}/samples/{number:04d}.png", "detections": detections}


# ---------------------------------------------------------------- the rules
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_verdict_equals_the_official_one(case):
    """171 images: the verdict, its reason word by word, how many objects of each class count."""
    objects = evaluate.kept_objects(case["detections"], case["metadata"]["tag"])
    assert {name: len(found) for name, found in objects.items()} == case["kept"]
    assert evaluate.verdict(objects, case["metadata"]) == (case["correct"], case["reason"])


def test_relative_position_equals_the_official_one():
    for case in GOLDEN["relative_position"]:
        assert evaluate.relative_position(case["a"], case["b"]) == case["relations"]
    # under a thousandth of a pixel: no direction, no division by 0
    assert evaluate.relative_position([5e-4, 0, 5e-4, 0], [0, 0, 0, 0]) == []


def test_constants_are_the_official_ones():
    """The thresholds are strict, of 20 objects 16 count, and of two equally confident ones the
    later leads, as numpy's order reversed."""
    constants = GOLDEN["constants"]
    assert list(evaluate.OBJECT_COLORS) == constants["colors"]
    for tag, threshold in (("single_object", constants["threshold"]),
                           ("counting", constants["counting_threshold"])):
        assert evaluate.kept_objects([COW | {"confidence": threshold}], tag) == {}
        kept = evaluate.kept_objects([COW | {"confidence": threshold + 1e-6}], tag)
        assert len(kept["cow"]) == 1
        kept = evaluate.kept_objects([COW | {"confidence": 0.95}] * 20, tag)
        assert len(kept["cow"]) == constants["max_objects"]
    kept = evaluate.kept_objects([COW, COW | {"color": "red"}], "colors")
    assert kept["cow"][0]["color"] == "red"


# ---------------------------------------------------------------- scores of a file
def test_scores_equal_the_official_summary(tmp_path):
    """The recorded verdicts, acted out: a correct image has the object that its prompt asks for,
    another one has nothing."""
    results, prompts, lines = GOLDEN["summary"]["results"], [], []
    names = list(dict.fromkeys(result["prompt"] for result in results))
    for index, name in enumerate(names):
        verdicts = [result for result in results if result["prompt"] == name]
        prompts.append({"tag": verdicts[0]["tag"], "include": [{"class": "cow", "count": 1}],
                        "prompt": name})
        for i, v in enumerate(verdicts):
            seen = [COW | {"confidence": 0.99}] if v["correct"] else []
            lines.append(image_line(index, i, seen))
    scores = evaluate.geneval_scores(write_jsonl(tmp_path / "d.jsonl", lines[::-1]),
                                     write_jsonl(tmp_path / "p.jsonl", prompts))
    printed = [line.split() for line in GOLDEN["summary"]["printed"]]
    shares = {words[0]: words[2] for words in printed if len(words) > 2 and words[1] == "="}
    assert {tag: f"{scores[tag]:.2%}" for tag in evaluate.TAGS} == shares
    assert f"{scores['overall']:.5f}" == printed[-1][-1]
    assert [scores["images"], scores["prompts"]] == [int(printed[2][-1]), int(printed[3][-1])]
    table = evaluate.geneval_table(scores, "a detector of mine").splitlines()
    assert table[0] == ("GenEval rules, detections by a detector of mine: 132 images of 33 prompts")
    assert table[1].split() == [*evaluate.TAGS, "overall"]
    assert table[2].split() == ["0.95", "0.75", "0.62", "0.70", "0.21", "0.38", "0.60"]
    assert len(table[1]) == len(table[2])


def test_scores_of_some_tags(tmp_path):
    """A file without one of the kinds: the mean is over the others, and the column stays empty."""
    seen = write_jsonl(tmp_path / "d.jsonl", [image_line(0, 0, [COW]), image_line(1, 0, [])])
    scores = evaluate.geneval_scores(seen, write_jsonl(tmp_path / "p.jsonl", [COLOR, PROMPT]))
    assert scores == dict(colors=1.0, position=0.0, overall=0.5, images=2, prompts=2)
    assert evaluate.geneval_table(scores, "x").splitlines()[2].split() == ["1.00", "0.00", "0.50"]


@pytest.mark.parametrize("lines, message", [
    ([image_line(0, 0, [COW])] * 2, "has a second line"),
    ([image_line(0, 0, [COW]), image_line(7, 0, [COW])],
     "out/00007/samples/0000.png has no prompt"),
    ([image_line(0, 0, [COW])], "no line for 1 images, such as 00001/samples/0000.png"),
    ([image_line(0, 0, [COW]), image_line(1, 0, []), image_line(1, 1, [])],
     "no line for 1 images, such as 00000/samples/0001.png"),
    ([image_line(0, 0, [COW]), {"image": "00001/samples/0000.png"}], "line 2 has no 'detections'"),
    ([image_line(0, 0, [{"class": "cow", "box": [1, 2, 3, 4]}])], "line 1 has no 'confidence'"),
    ([{"image": "0000.png", "detections": []}], "line 1 is not an image with its detections"),
    ([image_line(0, 0, [COW | {"confidence": 90}])], "line 1 is not an image with its detections"),
    ([image_line(0, 0, [COW | {"confidence": float("nan")}])],
     "line 1 is not an image with its detections"),
    ([image_line(0, 0, [COW | {"box": [10, 10, 5, 60]}])],
     "line 1 is not an image with its detections"),
    ([image_line(0, 0, [COW | {"box": [10, 10, 60]}])],
     "line 1 is not an image with its detections"),
    ([image_line(0, 0, [COW | {"box": [10, 10, 60, float("inf")]}])],
     "line 1 is not an image with its detections"),
    ([image_line(0, 0, [COW | {"color": "grey"}])], "line 1 is not an image with its detections"),
    ([image_line(0, 0, ["cow"])], "line 1 is not an image with its detections"),
    ([image_line(0, 0, [COW | {"class": "Cow"}]), image_line(1, 0, [])],
     "out/00000/samples/0000.png has a 'Cow', which no prompt of .*p.jsonl has"),
])
def test_detections_that_do_not_fit(lines, message, tmp_path):
    seen = write_jsonl(tmp_path / "d.jsonl", lines)
    prompts = write_jsonl(tmp_path / "p.jsonl", [COLOR, PROMPT])
    with pytest.raises(ValueError, match=message) as error:
        evaluate.geneval_scores(seen, prompts)
    assert "d.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_class_that_is_only_excluded_is_known(tmp_path):
    prompt = COLOR | {"exclude": [{"class": "dog", "count": 1}]}
    seen = write_jsonl(tmp_path / "d.jsonl", [image_line(0, 0, [COW, COW | {"class": "dog"}])])
    scores = evaluate.geneval_scores(seen, write_jsonl(tmp_path / "p.jsonl", [prompt]))
    assert scores["colors"] == 0


def test_color_is_needed_only_where_it_is_asked_for():
    objects = {"cow": [{k: v for k, v in COW.items() if k != "color"}]}
    assert evaluate.verdict(objects, {"include": [{"class": "cow", "count": 1}]}) == (True, "")
    with pytest.raises(ValueError, match="a cow was detected without a color, but 'a photo of a "
                                         "blue cow' asks for one"):
        evaluate.verdict(objects, COLOR)


# ---------------------------------------------------------------- the prompts
def changed(change):
    prompt = copy.deepcopy(PROMPT)
    change(prompt)
    return prompt


def without(key):
    return {k: v for k, v in PROMPT.items() if k != key}


@pytest.mark.parametrize("prompt, message", [
    (without("tag"), "line 2 has no 'tag'"),
    (without("include"), "line 2 has no 'include'"),
    (without("prompt"), "line 2 has no 'prompt'"),
    (changed(lambda p: p["include"][1].pop("count")), "line 2 has no 'count'"),
    (changed(lambda p: p.update(tag="colour")), "line 2 is not a prompt of GenEval"),
    (changed(lambda p: p.update(include=[])), "line 2 is not a prompt of GenEval"),
    (changed(lambda p: p.update(prompt=3)), "line 2 is not a prompt of GenEval"),
    (changed(lambda p: p["include"][0].update(count="1")), "line 2 is not a prompt of GenEval"),
    (changed(lambda p: p["include"][0].update(color="grey")), "line 2 is not a prompt of GenEval"),
    (changed(lambda p: p["include"][1].update(position=["left of", 1])),
     "line 2 is not a prompt of GenEval"),
    (changed(lambda p: p["include"][1].update(position=["under", 0])),
     "line 2 is not a prompt of GenEval"),
    (changed(lambda p: p.update(exclude=[{"class": "dog"}])), "line 2 has no 'count'"),
    ([PROMPT], "line 2 is not a prompt of GenEval"),
    ("text", "line 2 is not a prompt of GenEval"),
])
def test_prompts_that_do_not_fit(prompt, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        evaluate.read_prompts(write_jsonl(tmp_path / "p.jsonl", [PROMPT, prompt]))
    assert "p.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    (None, "no such file"),
    (b"", "line 1 is not a prompt"),
    (b"\x89PNG\r\n\x1a\n\x00\xff", "line 1 is not a prompt"),
    (json.dumps(PROMPT).encode() + b"\n\n" + json.dumps(PROMPT).encode(),
     "line 2 is not a prompt"),
    (json.dumps(PROMPT).encode()[:-5], "line 1 is not a prompt"),
])
def test_prompts_from_a_file_of_another_kind(content, message, tmp_path):
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        evaluate.read_prompts(tmp_path / "p.jsonl")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the images
def make_images(caption, numbers, index):
    """Images that depend on the caption, the prompt and their number alone, as they should."""
    images = torch.zeros(len(numbers), 3, 12, 10, dtype=torch.uint8)
    images[:, 0], images[:, 1] = len(caption), index
    images[:, 2] = torch.tensor(numbers, dtype=torch.uint8)[:, None, None]
    # neither flat nor square
    images[:, :, 3] = torch.arange(10, dtype=torch.uint8)
    return images


def no_images(caption, numbers, index):
    pytest.fail("no image should be made")


@pytest.fixture
def prompts(tmp_path):
    return write_jsonl(tmp_path / "p.jsonl", [PROMPT, COLOR])


def make_all(prompts, out, make=make_images, made_with=MADE_WITH):
    evaluate.geneval_images(evaluate.read_prompts(prompts), prompts, out, made_with, make)


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*") if path.is_file()}


def sample_files(out, index):
    return [out / f"{index:05d}" / "samples" / f"{i:04d}.png" for i in range(4)]


def test_images_lie_as_the_official_scorer_reads_them(prompts, tmp_path):
    """It takes the folders whose names are numbers, and leaves the file beside them alone."""
    out = tmp_path / "new" / "out"
    make_all(prompts, out)
    expected = ["made_with.json"]
    for index in (0, 1):
        expected.append(f"{index:05d}/metadata.jsonl")
        expected += [str(path.relative_to(out)) for path in sample_files(out, index)]
    assert sorted(contents(out)) == sorted(expected)
    for index, prompt in enumerate([PROMPT, COLOR]):
        assert json.loads((out / f"{index:05d}" / "metadata.jsonl").read_text()) == prompt
        images = torch.stack([tokenizer.read_image(path) for path in sample_files(out, index)])
        assert torch.equal(images, make_images(prompt["prompt"], [0, 1, 2, 3], index))


def test_images_that_exist_are_not_made_again(prompts, tmp_path):
    """One file is missing, one cut short, one empty, one damaged: these are made, and end as in one
    go. Complete ones are not touched."""
    out, asked = tmp_path / "out", []
    make_all(prompts, out)
    whole = contents(out)

    def make(caption, numbers, index):
        asked.append((caption, numbers, index))
        return make_images(caption, numbers, index)
    make_all(prompts, out, make)
    assert asked == []
    missing, _, cut, empty = sample_files(out, 0)
    _, kept, _, damaged = sample_files(out, 1)
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-30])
    empty.write_bytes(b"")
    data = bytearray(damaged.read_bytes())
    # length of the pixels' chunk: PIL has a SyntaxError for that
    data[36] -= 20
    damaged.write_bytes(data)
    before = kept.stat().st_mtime_ns
    make_all(prompts, out, make)
    assert asked == [(PROMPT["prompt"], [0, 2, 3], 0), (COLOR["prompt"], [3], 1)]
    assert contents(out) == whole and kept.stat().st_mtime_ns == before


def test_interrupted_run_leaves_whole_files_only(prompts, tmp_path, monkeypatch):
    """Stopped while the second prompt's first image is written: nothing has the name of an image
    and is not one."""
    out, save = tmp_path / "out", sample.Image.Image.save

    def stop(image, path, *args):
        if "00001" in str(path):
            path.write_bytes(b"\x89PNG")
            raise KeyboardInterrupt
        save(image, path, *args)
    monkeypatch.setattr(sample.Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        make_all(prompts, out)
    monkeypatch.undo()
    names = [path.name for path in (out / "00001" / "samples").iterdir()]
    assert [name for name in names if name[0].isdigit()] == []
    for folder in (out, tmp_path / "other"):
        make_all(prompts, folder)
    assert contents(out) == contents(tmp_path / "other")


def test_folder_of_another_prompts_file_is_refused(prompts, tmp_path):
    out = tmp_path / "out"
    make_all(prompts, out)
    other = write_jsonl(tmp_path / "other.jsonl", [PROMPT, PROMPT])
    with pytest.raises(ValueError, match="00001/metadata.jsonl has another prompt than "
                                         ".*other.jsonl"):
        make_all(other, out, no_images)


@pytest.mark.parametrize("change, says", [
    (dict(model="teacher", steps=16), "model student, not teacher, steps 1, not 16"),
    (dict(seed=1), "made with seed 0, not 1"),
    (dict(weights="def"), "made with weights abc, not def"),
    (dict(guidance=3.0), "made with guidance None, not 3.0")])
def test_images_of_other_settings_are_refused(change, says, prompts, tmp_path):
    """They would be kept, and be called those of the new model."""
    out = tmp_path / "out"
    make_all(prompts, out)
    before = contents(out)
    with pytest.raises(ValueError, match=says):
        make_all(prompts, out, no_images, MADE_WITH | change)
    assert contents(out) == before


def test_images_of_which_nobody_knows_the_model_are_refused(prompts, tmp_path):
    out = tmp_path / "out"
    make_all(prompts, out)
    (out / "made_with.json").write_text("[1")
    with pytest.raises(ValueError, match="made_with.json cannot be read"):
        make_all(prompts, out, no_images)
    (out / "made_with.json").unlink()
    with pytest.raises(ValueError, match="no made_with.json that says of what model"):
        make_all(prompts, out, no_images)
