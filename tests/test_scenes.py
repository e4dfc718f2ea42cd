"""The scenes world: its grammar, its pictures, the exact scorer that reads them, and its text
encoder."""
import itertools
import math
import random

import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from evaluate import AREAS, scene_correct, scene_objects, scene_scores
from models import MaskGen, Words
from tokenizer import (COLOURS, COUNTS, PLURALS, RELATIONS, SCENE_WORDS, SHAPES, TAGS, paint,
                       parse_caption, scene_captions, scene_contents, scenes, shapes_names,
                       signed_distance, to_float, to_uint8)

CAPTIONS = scene_captions(600, 1)
IMAGES = scenes(CAPTIONS, 1)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def picture(*objects, size=32):
    """(colour, shape, x, y) ... on a dark ground, in pixels, radius 5 -> (3, size, size) uint8."""
    canvas = torch.full((1, 3, size, size), -0.75)
    for colour, shape, x, y in objects:
        canvas = paint(canvas, torch.tensor([SHAPES.index(shape)]), torch.tensor([COLOURS[colour]]),
                       torch.tensor([[x, y]]).float(), torch.tensor([5.0]), torch.zeros(1))
    return to_uint8(canvas)[0]


# ---------------------------------------------------------------- the grammar
@pytest.mark.parametrize("text, tag, objects, relation", [
    ("a circle", "single_object", [(None, "circle")], None),
    ("a circle and a square", "two_object", [(None, "circle"), (None, "square")], None),
    ("three red circles", "counting", 3 * [("red", "circle")], None),
    ("two cyan crosses", "counting", 2 * [("cyan", "cross")], None),
    ("a red circle", "colors", [("red", "circle")], None),
    ("a blue square above a green triangle", "position",
     [("blue", "square"), ("green", "triangle")], "above"),
    ("a red cross left of a red circle", "position",
     [("red", "cross"), ("red", "circle")], "left of"),
    ("a red circle and a blue square", "color_attr", [("red", "circle"), ("blue", "square")], None),
    ("A  Red circle ", "colors", [("red", "circle")], None)])
def test_every_kind_of_caption(text, tag, objects, relation):
    assert parse_caption(text) == dict(tag=tag, objects=objects, relation=relation)


def say(objects, relation=None):
    """The inverse of parse_caption."""
    phrases = [" ".join(filter(None, ("a", colour, shape))) for colour, shape in objects]
    if len(set(objects)) < len(objects):
        colour, shape = objects[0]
        number = {n: word for word, n in COUNTS.items()}[len(objects)]
        plural = {shape: plural for plural, shape in PLURALS.items()}[shape]
        return f"{number} {colour} {plural}"
    return f" {relation or 'and'} ".join(phrases)


def test_drawn_captions_are_of_the_six_kinds_in_turn_and_say_what_was_parsed():
    for i, caption in enumerate(CAPTIONS):
        parsed = parse_caption(caption)
        assert parsed["tag"] == TAGS[i % 6]
        assert say(parsed["objects"], parsed["relation"]) == caption
        if parsed["tag"] in ("two_object", "position", "color_attr"):
            (colour, shape), (colour2, shape2) = parsed["objects"]
            assert shape != shape2 and (colour is None or colour != colour2)
    words = set(" ".join(CAPTIONS).split())
    # nothing is never drawn
    assert words == set(SCENE_WORDS)
    assert {parse_caption(c)["relation"] for c in CAPTIONS} == {None, *RELATIONS}
    assert {len(parse_caption(c)["objects"]) for c in CAPTIONS} == {1, 2, 3, 4}


def test_drawn_captions_follow_from_the_seed_alone():
    state = random.getstate()
    assert scene_captions(60, 3) == scene_captions(60, 3) == scene_captions(90, 3)[:60]
    assert scene_captions(60, 3) != scene_captions(60, 4)
    assert random.getstate() == state


@pytest.mark.parametrize("text, word", [("a red dog", "dog"), ("a circle, a square", "circle,"),
                                        ("a purple circle", "purple"),
                                        ("five red circles", "five")])
def test_unknown_words_are_named(text, word):
    with pytest.raises(ValueError, match=f"scenes does not know the word '{word}'; it knows: a, "
                                         "and, two, .*below$") as error:
        parse_caption(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "", "a", "circle", "a red", "red circle", "two circles", "three red circle", "a red circles",
    "a circle above a square", "a red circle and a square", "a circle and a blue square",
    "a red circle left a blue square", "a red circle and a red circle", "a circle and a circle",
    "a circle and a square and a cross"])
def test_known_words_that_are_no_caption(text):
    with pytest.raises(ValueError, match="scenes knows the words of .*, but not the sentence; it "
                                         "knows such as 'a circle'") as error:
        parse_caption(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


# ---------------------------------------------------------------- the pictures
def test_scenes_are_uint8_and_follow_from_captions_and_seed():
    assert IMAGES.shape == (600, 3, 32, 32) and IMAGES.dtype == torch.uint8
    before = torch.get_rng_state()
    assert torch.equal(IMAGES, scenes(CAPTIONS, 1)) and not torch.equal(IMAGES, scenes(CAPTIONS, 2))
    assert torch.equal(torch.get_rng_state(), before)
    # what is not said varies
    assert len(scenes(100 * ["a red circle"], 0).flatten(1).unique(dim=0)) == 100
    assert scenes(["a circle"], 0, size=48).shape == (1, 3, 48, 48)
    with pytest.raises(ValueError, match="'dog'"):
        scenes(["a circle", "a dog"], 0)


def test_objects_do_not_touch():
    for image, caption in zip(IMAGES, CAPTIONS):
        x = to_float(image)
        # 0.1: faint edges, too
        is_object = (x - x[:, :1, :1]).abs().amax(0) > 0.1
        _, regions = scipy.ndimage.label(is_object, torch.ones(3, 3))
        assert regions == len(parse_caption(caption)["objects"]), caption


def test_every_place_and_every_unsaid_colour_is_drawn_equally_often():
    """Within three standard deviations."""
    found = [scene_objects(image) for image in scenes(400 * ["a circle and a square"], 0)]
    assert all(len(objects) == 2 for objects in found)
    circle_is_left = []
    for objects in found:
        circle, square = sorted(objects, key=lambda thing: thing["shape"])
        circle_is_left.append(circle["box"][0] < square["box"][0])
    assert abs(sum(circle_is_left) - 200) < 3 * 10
    things = list(itertools.chain(*found))
    colours = [thing["colour"] for thing in things]
    deviation = (800 * 5 / 36) ** 0.5
    for colour in COLOURS:
        assert abs(colours.count(colour) - 800 / 6) < 3 * deviation, colour


def test_images_behind_the_first_chunk_of_1024_show_their_own_captions():
    captions = scene_captions(1060, 5)
    assert scene_scores(scenes(captions, 5)[1020:], captions[1020:])["overall"] == 1


def test_contents():
    captions = ["a circle", "three red circles", "a blue square above a green triangle",
                "a circle and a square"]
    images, contents = scene_contents(torch.arange(4), captions)
    assert images.tolist() == [1, 2] and contents.shape == (2, 24)
    names = [[shapes_names()[i] for i in row.nonzero().flatten()] for row in contents]
    assert names == [["red circle"], ["green triangle", "blue square"]]


# ---------------------------------------------------------------- the scorer
def wrong(caption, i):
    """A caption of the same kind that the picture of this one does not show. i chooses what is
    wrong."""
    parsed = parse_caption(caption)
    tag, objects, relation = parsed["tag"], parsed["objects"], parsed["relation"]
    (colour, shape), others, k, n = objects[0], objects[1:], i // 6, len(objects)
    shapes = [s for s in SHAPES if s not in {other for _, other in objects}]
    colours = [c for c in COLOURS if c not in {other for other, _ in objects}]
    other_shape = [(colour, shapes[k % len(shapes)])]
    other_colour = [(colours[k % len(colours)], shape)]
    other_number = [m for m in (2, 3, 4) if m != n][k % 2]
    colours_swapped = [(b, s) for (_, s), (b, _) in zip(objects, objects[::-1])]
    kinds = {
        "single_object": [other_shape],
        "two_object": [other_shape + others],
        "colors": [other_shape, other_colour],
        "counting": [n * other_shape, n * other_colour, other_number * [(colour, shape)]],
        "position": [other_shape + others, other_colour + others, objects, objects[::-1]],
        "color_attr": [other_shape + others, other_colour + others, colours_swapped]}
    j = k % len(kinds[tag])
    if tag == "position" and j == 2:
        relation = OPPOSITE[relation]
    return say(kinds[tag][j], relation)


def test_the_scorer_is_right_about_pictures_of_the_caption():
    assert min(scene_scores(IMAGES, CAPTIONS).values()) >= 0.99


def test_the_scorer_is_right_about_pictures_of_something_else():
    """Another colour, shape, number or relation, colours or places swapped: at least 99 of 100 are
    called wrong, of every kind."""
    others = [wrong(caption, i) for i, caption in enumerate(CAPTIONS)]
    for caption, other in zip(CAPTIONS, others, strict=True):
        assert caption != other and parse_caption(caption)["tag"] == parse_caption(other)["tag"]
    assert max(scene_scores(IMAGES, others).values()) <= 0.01


def test_the_scorer_is_right_about_soft_and_noisy_pictures():
    """Decoded pictures are neither sharp nor clean: a blur over three pixels and 5 of 255 of noise
    cost next to nothing."""
    kernel = torch.tensor([0.15, 0.7, 0.15])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    captions = CAPTIONS[:300]
    x = F.conv2d(F.pad(to_float(IMAGES[:300]), (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = to_uint8(x + 0.04 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert min(scene_scores(x, captions).values()) >= 0.98
    others = [wrong(caption, i) for i, caption in enumerate(captions)]
    assert max(scene_scores(x, others).values()) <= 0.02


@pytest.mark.parametrize("colour, shape", list(itertools.product(COLOURS, SHAPES)))
def test_objects_are_read_exactly(colour, shape):
    [thing] = scene_objects(picture((colour, shape, 20, 11)))
    assert (thing["colour"], thing["shape"]) == (colour, shape) and 0.95 < thing["fit"] <= 1
    x0, y0, x1, y1 = thing["box"]
    assert abs((x0 + x1 + 1) / 2 - 20) <= 0.5
    assert abs((y0 + y1 + 1) / 2 - 11) <= (2 if shape == "triangle" else 0.5)


def test_areas_of_the_shapes():
    axis = (torch.arange(800) + 0.5) / 200 - 2
    x, y = axis.expand(4, 800, 800), axis[:, None].expand(4, 800, 800)
    areas = (signed_distance(torch.arange(4), x, y) < 0).sum((1, 2)) / 200 ** 2
    assert areas.tolist() == pytest.approx(AREAS.tolist(), rel=0.005)
    assert AREAS[0].item() == pytest.approx(math.pi * 0.95 ** 2, rel=1e-3)


def test_what_is_no_object():
    assert scene_objects(picture()) == []
    red, blue = picture(("red", "circle", 8, 8)), picture(("blue", "circle", 8, 8))
    # a slice of one
    assert scene_objects(red.where(torch.arange(32) < 6, picture())) == []
    # half red, half blue
    assert scene_objects(red.where(torch.arange(32) < 8, blue)) == []
    # grown together
    assert scene_objects(picture(("red", "square", 8, 8), ("red", "square", 16, 8))) == []
    assert not scene_correct(picture(), "a circle")


def test_more_than_was_asked_for():
    """As in GenEval: wrong where things are counted, allowed elsewhere."""
    image = picture(("red", "circle", 8, 8), ("red", "circle", 24, 8), ("blue", "square", 8, 24))
    answers = {"a circle": 1, "a red circle": 1, "a circle and a square": 1,
               "a red circle and a blue square": 1, "two red circles": 1, "three red circles": 0,
               "a blue circle": 0, "a triangle": 0, "a red circle above a blue square": 1}
    for caption, right in answers.items():
        assert scene_correct(image, caption) == bool(right), caption
    image = picture(("red", "circle", 8, 8), ("red", "circle", 24, 8), ("red", "circle", 8, 24))
    assert not scene_correct(image, "two red circles") and scene_correct(image, "three red circles")


def test_on_a_diagonal_two_relations_hold():
    def relations(image, first, second):
        return [r for r in RELATIONS if scene_correct(image, f"a {first} {r} a {second}")]
    image = picture(("red", "circle", 8, 8), ("blue", "square", 24, 24))
    assert relations(image, "red circle", "blue square") == ["left of", "above"]
    assert relations(image, "blue square", "red circle") == ["right of", "below"]
    image = picture(("red", "circle", 8, 9), ("blue", "square", 24, 7))
    assert relations(image, "red circle", "blue square") == ["left of"]


def test_overall_is_the_mean_of_the_kinds():
    image = picture(("red", "circle", 8, 8))
    scores = scene_scores(torch.stack(4 * [image]),
                          ["a circle", "a red circle", "a blue circle", "a red square"])
    assert scores == dict(single_object=1, colors=1 / 3, overall=pytest.approx(2 / 3))
    with pytest.raises(ValueError):
        scene_scores(image[None], ["a circle", "a square"])


# ---------------------------------------------------------------- the words
def test_a_row_says_which_words_there_are_and_how_far_from_it():
    text = Words()
    c = text.encode(["a red circle and a blue square", "a blue circle and a red square", "a circle",
                     "a circle and a square", ""])
    assert c.shape == (5, 13, 128)
    # behind the last word; the empty caption
    assert c[2, 3:].eq(0).all() and c[4].eq(0).all()
    a, circle = SCENE_WORDS.index("a"), SCENE_WORDS.index("circle")
    v, T = text.vectors, text.T
    # row 0 stands before "a", row 1 on it, row 2 on "circle"
    for row in range(3):
        assert torch.allclose(c[2, row], (v[T + 1 - row, a] + v[T + 2 - row, circle]) / 2 ** 0.5)
    # the order counts
    assert not torch.equal(c[0, 0], c[1, 0])
    # "circle" alone, and beside a square
    assert not torch.equal(c[2, 2], c[3, 2])
    # numbers of the size 1
    assert torch.allclose(c[0, 1:8].pow(2).mean(), torch.tensor(1.0), atol=0.15)
    # alone or in a batch
    assert torch.equal(c[2], text.encode(["A  circle"])[0])


def test_every_caption_has_an_encoding_of_its_own_that_fits():
    captions = sorted(set(scene_captions(6000, 0)))
    assert len(Words().encode(captions)[:, 1:].flatten(1).unique(dim=0)) == len(captions)
    assert max(len(caption.split()) for caption in captions) == 8
    model = MaskGen(K=8, L=4, width=16, depth=1, heads=2)
    z = torch.zeros(2, 4, dtype=torch.long)
    assert model(z, Words().encode(captions[:2])).shape == (2, 4, 8)


def test_words_refuse_what_scenes_cannot_draw():
    for captions, words in ((["a dog"], "the word 'dog'"),
                            (["a circle", "a red"], "not the sentence"),
                            ("a circle", "list of one text"), ([], "list of one text"),
                            ([3], "list of one text")):
        with pytest.raises(ValueError, match=words):
            Words().encode(captions)


def test_words_are_rebuilt_from_arguments_and_state():
    text = Words(width=48, T=9)
    again = Words(width=48, T=9)
    again.load_state_dict(text.state_dict())
    caption = ["two red circles"]
    assert torch.equal(text.encode(caption), again.encode(caption))
    assert not list(text.parameters())
