"""GenEval in evaluate.py: the rules equal the official scorer's (golden/geneval), the files around
them, and the folders of images."""
import json
from pathlib import Path

import pytest
from conftest import fake_run, in_process, load_case, refused
from PIL import Image

import evaluate
import tokenizer

GOLDEN = load_case("geneval", "cases").info
PROMPT = {"tag": "position", "prompt": "a red circle left of a blue square",
          "include": [{"class": "cat", "count": 1},
                      {"class": "dog", "count": 1, "position": ["left of", 0]}]}
COLOR = {"tag": "colors", "prompt": "a blue cross",
         "include": [{"class": "cow", "count": 1, "color": "blue"}]}
COW = {"class": "cow", "box": [10, 10, 60, 60], "confidence": 0.9, "color": "blue"}


def write_jsonl(path, objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def image_line(index, number, detections):
    return {"image": f"out/{index:05d}/samples/{number:04d}.png", "detections": detections}


# ---------------------------------------------------------------- the rules
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_verdict_equals_the_official_one(case):
    """171 images: the verdict, and how many objects of each class count."""
    objects = evaluate.kept_objects(case["detections"], case["metadata"]["tag"])
    assert {name: len(found) for name, found in objects.items()} == case["kept"]
    assert evaluate.is_correct(objects, case["metadata"]) is case["correct"]


def test_relative_position_equals_the_official_one():
    for case in GOLDEN["relative_position"]:
        assert evaluate.relative_position(case["a"], case["b"]) == case["relations"]
    # Under a thousandth of a pixel there is no direction, and no division by 0.
    assert evaluate.relative_position([5e-4, 0, 5e-4, 0], [0, 0, 0, 0]) == []


def test_constants_are_the_official_ones():
    """The thresholds are strict, of 20 objects 16 count, and of two equally confident ones the
    later leads, as numpy's order reversed."""
    constants = GOLDEN["constants"]
    assert evaluate.OBJECT_COLORS == constants["colors"]
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
    another one has nothing. The table names the detector."""
    results, prompts, lines = GOLDEN["summary"]["results"], [], []
    names = list(dict.fromkeys(result["prompt"] for result in results))
    for index, name in enumerate(names):
        verdicts = [result for result in results if result["prompt"] == name]
        prompts.append({"tag": verdicts[0]["tag"], "include": [{"class": "cow", "count": 1}],
                        "prompt": name})
        for i, v in enumerate(verdicts):
            seen = [COW | {"confidence": 0.99}] if v["correct"] else []
            lines.append(image_line(index, i, seen))
    seen = write_jsonl(tmp_path / "d.jsonl", lines[::-1])
    scores = evaluate.geneval_scores(seen, write_jsonl(tmp_path / "p.jsonl", prompts))
    printed = [line.split() for line in GOLDEN["summary"]["printed"]]
    shares = {words[0]: words[2] for words in printed if len(words) > 2 and words[1] == "="}
    assert {tag: f"{scores[tag]:.2%}" for tag in tokenizer.TAGS} == shares
    assert f"{scores['overall']:.5f}" == printed[-1][-1]
    assert [scores["images"], scores["prompts"]] == [int(printed[2][-1]), int(printed[3][-1])]
    line = "evaluate.py --geneval --prompts p.jsonl --detections d.jsonl --detector mine"
    table = in_process(line, tmp_path).stdout.splitlines()
    assert table[0] == "GenEval rules, detections by mine: 132 images of 33 prompts"
    assert table[1].split() == [*tokenizer.TAGS, "overall"]
    assert table[2].split() == ["0.95", "0.75", "0.62", "0.70", "0.21", "0.38", "0.60"]


@pytest.mark.parametrize("lines, message", [
    # The score would rise without images on which nothing was seen.
    ([image_line(0, 0, [COW])] * 2, r"2 lines about 1 of 2 images; .* \[\(1, 0\)\]"),
    ([image_line(0, 0, [COW]), image_line(0, 1, []), image_line(1, 0, [])],
     r"3 lines about 3 of 4 images; .* \[\(1, 1\)\]"),
    ([image_line(0, 1, [COW]), image_line(1, 0, [])], "samples/0001.png is none of 1 images"),
    ([image_line(0, 99999999999, [COW]), image_line(1, 0, [])], "99999999999.png is none of"),
    ([image_line(7, 0, [COW]), image_line(1, 0, [])], "00007/samples/0000.png is none of"),
    # Such objects would count as missing, or as sure.
    ([image_line(0, 0, [COW | {"class": "Cow"}]), image_line(1, 0, [])], "unknown class"),
    ([image_line(0, 0, [COW | {"color": None}]), image_line(1, 0, [])], "unknown class or color"),
    ([image_line(0, 0, [COW | {"confidence": 90}]), image_line(1, 0, [])], "confidence"),
    ([image_line(0, 0, [COW | {"box": [10, 10, 5, 60]}]), image_line(1, 0, [])], "no box"),
])
def test_detections_that_would_change_the_score_silently(lines, message, tmp_path):
    seen = write_jsonl(tmp_path / "d.jsonl", lines)
    prompts = write_jsonl(tmp_path / "p.jsonl", [COLOR, PROMPT])
    with pytest.raises(ValueError, match=message):
        evaluate.geneval_scores(seen, prompts)


def test_some_tags_and_excluded_classes(tmp_path):
    """Without one of the kinds the mean is over the others. A class that is only excluded is
    known."""
    prompt = COLOR | {"exclude": [{"class": "dog", "count": 1}]}
    prompts = write_jsonl(tmp_path / "p.jsonl", [prompt, PROMPT])
    for dogs, share in (([], 1), ([COW | {"class": "dog"}], 0)):
        seen = [image_line(0, 0, [COW] + dogs), image_line(1, 0, [])]
        scores = evaluate.geneval_scores(write_jsonl(tmp_path / "d.jsonl", seen), prompts)
        assert scores == dict(colors=share, position=0, overall=share / 2, images=2, prompts=2)


# ---------------------------------------------------------------- the images
@pytest.fixture
def scenes_run(monkeypatch, tmp_path):
    """What evaluate.py loads: tiny networks of the scenes world."""
    nets = fake_run(tmp_path, "scenes", ["a red circle"])
    monkeypatch.setattr(evaluate, "chosen_networks", lambda args, device: nets)
    write_jsonl(tmp_path / "p.jsonl", [PROMPT, COLOR])
    return nets


LINE = "evaluate.py --geneval --prompts p.jsonl"


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*")) if path.is_file()}


def test_images_lie_as_the_official_scorer_reads_them(scenes_run, tmp_path, monkeypatch):
    """It takes the folders whose names are numbers, and leaves the file beside them alone. Images
    that are there are not drawn again. One that is missing, or whose writing was cut off, is."""
    assert in_process(LINE, tmp_path).returncode == 0
    out = tmp_path / "runs" / "a" / "geneval"
    first = contents(out)
    expected = [f"{index:05d}/{name}" for index in (0, 1) for name in (
        "metadata.jsonl", *(f"samples/{i:04d}.png" for i in range(4)))]
    assert list(first) == [*expected, "protocol.json"]
    assert json.loads(first["00001/metadata.jsonl"]) == COLOR
    assert len(set(first.values())) == len(first)

    def cut_off(image, file, *args):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    (out / "00000/samples/0001.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", cut_off)
        assert in_process(LINE, tmp_path).returncode == 130
    before = (out / "00001/samples/0000.png").stat().st_mtime_ns
    assert in_process(LINE, tmp_path).returncode == 0
    assert contents(out) == first
    assert (out / "00001/samples/0000.png").stat().st_mtime_ns == before
    protocol = json.loads(first["protocol.json"])
    assert protocol["run"] == "a/checkpoint.pt" and protocol["init_mask"] == 0.9
    assert protocol["model"].startswith("student") and protocol["trained_steps"] == 4


@pytest.mark.parametrize("other", ["--steps 2", "--seed 1", "a student of more steps", "init_mask",
                                   "other objects of a prompt", "no protocol"])
def test_images_of_other_settings_are_refused(other, scenes_run, tmp_path):
    """They would be kept, and be called those of the new model."""
    line = f"{LINE} --out out"
    assert in_process(line, tmp_path).returncode == 0
    if other == "no protocol":
        (tmp_path / "out" / "protocol.json").unlink()
    before = contents(tmp_path / "out")
    if other == "a student of more steps":
        scenes_run.step = 8
    elif other == "init_mask":
        scenes_run.cfg.init_mask = 0.6
    elif other == "other objects of a prompt":
        write_jsonl(tmp_path / "p.jsonl", [PROMPT, COLOR | dict(include=PROMPT["include"])])
    elif other.startswith("--"):
        line = f"{line} {other}"
    refused(in_process(line, tmp_path), "out has images of another protocol")
    assert contents(tmp_path / "out") == before
    assert in_process(f"{line} --out elsewhere", tmp_path).returncode == 0
