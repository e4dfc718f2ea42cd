"""Captions: how they are encoded, which are drawn, and how a batch is trained on them."""
import types

import torch

import models
import sample
import tokenizer
import train


def test_a_caption_does_not_depend_on_its_batch_and_is_cut_behind_75_tokens():
    encoder = models.TextEncoder(width=16, depth=2, heads=2)
    fits = " ".join(["word"] * 75)
    c = encoder.encode(["a red circle", "", fits, f"{fits} and a tail"])
    assert c.shape == (4, 155, 16) and not c.requires_grad
    assert torch.allclose(encoder.encode([""])[0], c[1], atol=1e-4)
    assert torch.equal(c[2], c[3]) and (c[0] - c[1]).abs().max() > 0.1


def test_without_a_prompt_the_captions_of_the_grids_are_drawn():
    run = types.SimpleNamespace(text=models.Words(), names=["a circle", "a red circle"])
    c, what = sample.conditions(run, None, None, 3)
    assert torch.equal(c, run.text.encode(["a circle", "a red circle", "a circle"]))
    assert what == "the captions of its example grids"
    c, _ = sample.conditions(run, None, "a cross", 2)
    assert torch.equal(c, run.text.encode(["a cross", "a cross"]))
    c, captions = sample.grid_conditions(run)
    assert torch.equal(c, run.text.encode(captions)) and captions == run.names


class Counted(models.Words):
    """Remembers what it was asked to encode."""
    asked = ()

    def encode(self, captions):
        self.asked = [*self.asked, captions]
        return super().encode(captions)


def test_a_batch_has_runs_of_equal_captions_each_encoded_once():
    cfg = train.Config(batch=12, per_class=3)
    parts = types.SimpleNamespace(text=Counted(), captions=tokenizer.scene_captions(50, 0),
                                  names=["a circle"])
    c = train.draw_condition(parts, cfg, torch.Generator().manual_seed(0))
    (asked,) = parts.text.asked
    assert len(asked) == len(set(asked)) == 4 and set(asked) <= set(parts.captions)
    assert torch.equal(c, models.Words().encode([caption for caption in asked for _ in range(3)]))
    # Of fewer captions than a batch takes, all are taken, then some again.
    parts.captions = ["a circle", "a cross", "a square"]
    train.draw_condition(parts, cfg, torch.Generator().manual_seed(0))
    asked = parts.text.asked[1]
    assert set(asked) == set(parts.captions) and len(asked) == 4
