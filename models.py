"""models.py - the networks: MaskGIT and MaskGen (student and teacher), text encoders, the feature backbone Phi, and more; their weights.

    z (B, L) codes or mask, labels (B,)  -- MaskGIT --> logits (B, L, K)          student g_theta and teacher f_phi (Sec. 3.1)
    z, text c (B, rows, W)               -- MaskGen --> logits (B, L, K)          the same with captions
    captions -- Words (scenes), TextEncoder (CLIP) --> text c (B, rows, W): row 0 pooled, then states; TA-TiTok reads the last rows
    images (B, 3, H, W)                  -- Phi     --> 4 maps (B, D, h, w)       what "lifted" means (Sec. 3.3)
    images (B, 3, H, W)                  -- Discriminator --> logits (B, n)       real or draft, for the optional GAN (Sec. 3.4)
    images                               -- Inception --> features, logits        of FID and Inception Score (evaluate.py)

One class each for the small worlds and for the official networks: an official file loads strictly by its own key names.
"""
import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

from tokenizer import SCENE_WORDS, count, load_strictly, parse_caption, read_weights, shape_of, source_name


# ------------------------------------------------------------------------------------------------ where pretrained weights are
def find_weights(part, given, filename, repo, save_as=None):
    """Path of a weight file: the user's own, else weights/, else the hub (its cache on this disk, or a download).

    part       "vqgan", "maskgit", ...: the option --<part>-weights and the messages
    given      what that option says, or None
    filename   path of the file inside the repository `repo` of the Hugging Face hub
    save_as    its name under weights/, where the file's own (model.safetensors) says too little
    ValueError in one line that names file, repository and place
    """
    if given:
        if not Path(given).is_file():
            raise ValueError(f"--{part}-weights {given}: no such file")
        return Path(given)
    place = Path("weights") / (save_as or Path(filename).name)
    if place.is_file():
        return place
    try:
        import huggingface_hub as hub                                           # here: slow to import, and the small worlds need no hub
        cached = hub.try_to_load_from_cache(repo, filename)
        if isinstance(cached, str):
            return Path(cached)
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, filename), timeout=10)    # offline this fails at once; a download tries for 25 s
        return Path(hub.hf_hub_download(repo, filename))
    except Exception as error:                                                  # offline, no such file, disk full: dozens of types
        raise ValueError(f"no weights for {part}: the hub gives none ({type(error).__name__}). Put the file {filename} of repository "
                         f"{repo} (Hugging Face hub) at {place}, or name it with --{part}-weights") from None


# ------------------------------------------------------------------------------------------------ MaskGIT (Besnier and Chen 2023, version 1)
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x):
        return self.net(x)


class PreNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):
        return x + self.fn(self.norm(x))


class MaskGIT(nn.Module):
    """Bidirectional transformer over L image tokens and one class token. Defaults: the small worlds' size.

    One table of K + 1 + num_classes + 1 rows holds everything:  0 .. K-1 codes | K mask | K+1 .. K+num_classes classes | null class
    forward(z (B, L) long 0..K, labels (B,) long, drop (B,) bool | None: True = null class) -> logits (B, L, K)
    """
    def __init__(self, K=128, L=64, num_classes=24, width=128, depth=4, heads=4, mlp=512):
        super().__init__()
        self.K, self.L, self.num_classes = K, L, num_classes
        rows = K + 1 + num_classes + 1
        self.pos_emb = nn.Parameter(torch.zeros(1, L + 1, width))
        self.bias = nn.Parameter(torch.zeros(L + 1, rows))                       # of the output; one per position and row
        self.tok_emb = nn.Embedding(rows, width)
        # the official key names count the dropout modules, which nothing here needs: an Identity in the place of each
        self.first_layer = nn.Sequential(nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
                                         nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(nn.ModuleList([PreNorm(width, Attention(width, heads)), PreNorm(width, MLP(width, mlp))])
                                                for _ in range(depth))
        self.last_layer = nn.Sequential(nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
                                        nn.LayerNorm(width, eps=1e-12))
        for p in self.parameters():                                              # officially 0.02 everywhere, which at small widths is a slow
            if p.ndim > 1 and p is not self.bias:                                # start: now every layer keeps the variance (see README)
                nn.init.normal_(p, std=0.02 if p is self.pos_emb or p is self.tok_emb.weight else p.shape[1] ** -0.5)

    def forward(self, z, labels, drop=None, mask_column=False):
        """mask_column=True also returns the logit of "mask" (B, L, K + 1): the official sampler's traces were drawn over it (tests)."""
        if z.shape[1] != self.L:
            raise ValueError(f"this MaskGIT was made for {self.L} tokens, got {z.shape[1]}")
        row = self.K + 1 + labels                                                # (B,)
        if drop is not None:
            row = torch.where(drop, self.K + 1 + self.num_classes, row)
        x = self.tok_emb(torch.cat([z, row[:, None]], 1)) + self.pos_emb         # (B, L + 1, width)
        x = self.first_layer(x)
        for attention, mlp in self.transformer.layers:
            x = mlp(attention(x))
        x = self.last_layer(x[:, :self.L])                                       # the class token gives no logits
        columns = self.K + 1 if mask_column else self.K                          # nobody may answer "mask" or a class
        return x @ self.tok_emb.weight[:columns].T + self.bias[:self.L, :columns]


def load_maskgit(src, heads=16, num_classes=1000):
    """The official MaskGIT, in eval mode, or a DiMO generator (bare state dict, `pytorch_model.bin`), which is the same network.

    src           path or state dict of `pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth`, llvictorll/Maskgit-pytorch on the hub
    heads         of the attention; no tensor tells, and the official constructor's default, 8, is not what the released weights have
    num_classes   likewise: the tensors tell only K + num_classes, from the rows of the table
    ValueError in one line when the file cannot be read or does not fit
    """
    name = source_name(src, "MaskGIT")
    state = read_weights(src, "MaskGIT")
    if all(key.startswith("module.") for key in state):                          # saved from inside DistributedDataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    rows, width = shape_of(state, "tok_emb.weight", 2, name)
    K, L = rows - num_classes - 2, shape_of(state, "pos_emb", 3, name)[1] - 1
    if width == 0 or heads < 1 or width % heads:
        raise ValueError(f"{name}: {heads} heads do not divide the width {width}; the released ImageNet network has 16")
    if K < 1:
        raise ValueError(f"{name}: a table of {rows} rows cannot hold a mask, {num_classes} classes and a null class besides codes")
    # A wrong number of classes would shift every class and the mask without an error. Training shows it: only the columns of codes and
    # mask are ever answers, so the bias of classes and null class stays exactly as it began, zero (in our own training mask's does, too).
    zeros = int(shape_of(state, "bias", 2, name)[1] - state["bias"].any(0).nonzero().max() - 1) if state["bias"].any() else 0
    if zeros and zeros not in (num_classes + 1, num_classes + 2):
        raise ValueError(f"{name} seems to have {zeros - 1} classes, by its bias, instead of {num_classes}")
    mlp = shape_of(state, "transformer.layers.0.1.fn.net.0.weight", 2, name)[0]
    with torch.device("meta"):                                                   # no memory and no random numbers before the file fits
        model = MaskGIT(K, L, num_classes, width, count(state, "transformer.layers.{}.0.norm.weight"), heads, mlp)
    return load_strictly(model, state, name)


def imagenet_names():
    """The 1000 class names in the order of the labels, "tench" ... "golden retriever" (207) ... Namesakes carry their number, "crane 134"."""
    import_timm()
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    names = [info.index_to_description(i).split(",")[0] for i in range(1000)]    # the first of several synonyms
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


# ------------------------------------------------------------------------------------------------ MaskGen (Kim et al. 2025), text to image
class AdaptiveNorm(nn.Module):
    """n vectors (B, 1, width) from the condition (B, width): shifts, scales and gates. The LayerNorm itself, `modulate`, has no weights."""
    def __init__(self, width, n):
        super().__init__()
        self.n, self.linear = n, nn.Linear(width, n * width)

    def forward(self, cond):
        return self.linear(F.silu(cond))[:, None].chunk(self.n, -1)


def modulate(x, shift, scale):
    """x (B, rows, width), shift and scale (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([nn.Module(), nn.Identity(), nn.Linear(4 * width, width)])    # the official keys: net.0.proj and net.2
        self.net[0].proj = nn.Linear(width, 4 * width)

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class JointAttention(nn.Module):
    """Image tokens and text states attend to both, each stream through its own projections."""
    def __init__(self, width, heads, last):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if not last:
            self.to_add_out = nn.Linear(width, width)

    def forward(self, x, text):
        """x (B, L, width), text (B, T, width) -> two of the same shapes; `to_add_out` has yet to project the text's."""
        B, L, width = x.shape
        q, k, v = (torch.cat([a(x), b(text)], 1).view(B, -1, self.heads, width // self.heads).transpose(1, 2) for a, b in
                   ((self.to_q, self.add_q_proj), (self.to_k, self.add_k_proj), (self.to_v, self.add_v_proj)))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, -1, width)
        return self.to_out[0](mixed[:, :L]), mixed[:, L:]


class JointBlock(nn.Module):
    """Block of Stable Diffusion 3. In the last one the text is only read: nobody would use what becomes of it."""
    def __init__(self, width, heads, last):
        super().__init__()
        self.last = last
        self.norm1, self.norm1_context = AdaptiveNorm(width, 6), AdaptiveNorm(width, 2 if last else 6)
        self.attn, self.ff = JointAttention(width, heads, last), FeedForward(width)
        if not last:
            self.ff_context = FeedForward(width)

    def forward(self, x, text, cond):
        """x (B, L, width), text (B, T, width), cond (B, width) -> x, text."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(cond)
        if self.last:
            text_scale, text_shift = self.norm1_context(cond)                    # in this order
        else:
            text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = self.norm1_context(cond)
        from_x, from_text = self.attn(modulate(x, shift, scale), modulate(text, text_shift, text_scale))
        x = x + gate * from_x
        x = x + mlp_gate * self.ff(modulate(x, mlp_shift, mlp_scale))
        if not self.last:
            text = text + text_gate * self.attn.to_add_out(from_text)
            text = text + text_mlp_gate * self.ff_context(modulate(text, text_mlp_shift, text_mlp_scale))
        return x, text


def score_encoding(score, width):
    """Aesthetic scores (B,) -> (B, width): sines, then cosines. The longest period is about 1000, not 10000 as is usual."""
    half = width // 2
    angles = 100 * score[:, None] * torch.exp(-math.log(1000) * torch.arange(half, device=score.device) / half)
    return torch.cat([angles.sin(), angles.cos()], 1)


class MaskGen(nn.Module):
    """Bidirectional transformer over L image tokens, conditioned on text. Defaults: the small worlds' size.

    text_width        W, of the text c (B, rows, W): row 0 the pooled vector, rows 1..T what is attended to; more rows are not looked at
    score_width       of the encoding of an aesthetic score, which joins the pooled vector; 0: none
    aesthetic_score   that score, one for all images: the released config's, meant for sampling
    unused_rows       of the token table behind codes and mask: the official file has some
    .empty            (1 + T, W), c of the empty caption, which `drop` puts in place of c. Zeros until it is set; not in the state dict

    forward(z (B, L) long 0..K, c (B, >= 1 + T, W), drop (B,) bool | None: True = empty caption) -> logits (B, L, K)
    """
    def __init__(self, K=128, L=64, width=128, depth=4, heads=4, text_width=128, T=12, score_width=0, aesthetic_score=6.5, unused_rows=0):
        super().__init__()
        self.K, self.L, self.score_width, self.aesthetic_score = K, L, score_width, aesthetic_score
        self.pos_embed = nn.Parameter(torch.zeros(1, L, width))
        self.text_embed_proj, self.cond_pooled_proj = nn.Linear(text_width, width), nn.Linear(text_width + score_width, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1) for i in range(depth))
        self.norm = AdaptiveNorm(width, 2)
        self.embeddings = nn.Embedding(K + 1 + unused_rows, width)               # 0 .. K-1 codes | K mask | unused; the output layer, too
        self.register_buffer("empty", torch.zeros(1 + T, text_width), persistent=False)
        for p in self.parameters():
            nn.init.trunc_normal_(p, std=0.02) if p.ndim > 1 else nn.init.zeros_(p)
        for module in self.modules():                                            # variance kept by every layer: 0.02 would be a slow start
            if isinstance(module, nn.Linear):                                    # at small widths (measured: half the steps to the same loss)
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        for module in self.modules():
            if isinstance(module, AdaptiveNorm):                                 # gates of 0: every block begins as the identity
                nn.init.zeros_(module.linear.weight)

    def text_parameters(self):
        """The weights that read the text: its projections, and its stream through the blocks."""
        return [p for name, p in self.named_parameters() if any(part in name for part in ("text_embed", "pooled", "add_", "context"))]

    def forward(self, z, c, drop=None):
        rows, W = self.empty.shape
        if z.shape[1] != self.L:
            raise ValueError(f"this MaskGen was made for {self.L} tokens, got {z.shape[1]}")
        if c.ndim != 3 or c.shape[1] < rows or c.shape[2] != W:
            raise ValueError(f"this MaskGen was made for text of shape (B, {rows} or more, {W}), got {tuple(c.shape)}")
        c = c[:, :rows]                                                          # (B, 1 + T, W)
        if drop is not None:
            c = torch.where(drop[:, None, None], self.empty, c)
        pooled = c[:, 0]
        if self.score_width:
            score = torch.full((len(c),), float(self.aesthetic_score), device=c.device)
            pooled = torch.cat([pooled, score_encoding(score, self.score_width)], 1)    # (B, W + score_width)
        cond, text = self.cond_pooled_proj(pooled), self.text_embed_proj(c[:, 1:])
        x = self.embeddings(z) + self.pos_embed                                  # (B, L, width)
        for block in self.blocks:
            x, text = block(x, text, cond)
        scale, shift = self.norm(cond)                                           # in this order
        return modulate(x, shift, scale) @ self.embeddings.weight[:self.K].T     # nobody may answer "mask"


def load_maskgen(src, heads=16, num_classes=1000, T=77):
    """The official MaskGen-L VQ, in eval mode. Its `empty` is still to be set, with the text encoder.

    src           path or state dict of `model.safetensors` of turkeyju/generator_maskgen_vq_l on the hub, or of `maskgen_vq_l.bin` of
                  fun-research/TA-TiTok
    heads, T      of the attention, and rows of text: no tensor tells
    num_classes   likewise: the tensors tell only K + num_classes, from the rows of the table, whose classes nobody uses here
    ValueError in one line when the file cannot be read or does not fit
    """
    name = source_name(src, "MaskGen")
    state = read_weights(src, "MaskGen")
    head = state.pop("lm_head.weight", None)                                     # the token table under its name as output layer: files
    if head is not None and not torch.equal(state.setdefault("embeddings.weight", head), head):    # have either name, or both
        raise ValueError(f"{name} does not fit: lm_head.weight is not embeddings.weight")
    rows, width = shape_of(state, "embeddings.weight", 2, name)
    if width == 0 or heads < 1 or width % heads:
        raise ValueError(f"{name}: {heads} heads do not divide the width {width}; the released MaskGen-L has 16")
    K = rows - num_classes - 2
    if K < 1:
        raise ValueError(f"{name}: a table of {rows} rows cannot hold a mask, {num_classes} classes and a null class besides codes")
    text_width = shape_of(state, "text_embed_proj.weight", 2, name)[1]
    score_width = shape_of(state, "cond_pooled_proj.weight", 2, name)[1] - text_width
    with torch.device("meta"):                                                   # no memory and no random numbers before the file fits
        model = MaskGen(K, shape_of(state, "pos_embed", 3, name)[1], width, count(state, "blocks.{}.attn.to_q.weight"), heads, text_width,
                        T, max(0, score_width), unused_rows=num_classes + 1)
    model = load_strictly(model, state, name)
    model.empty.zero_()                                                          # no longer meta, but never filled
    return model


# ------------------------------------------------------------------------------------------------ words: the scenes world's text encoder
class Words(nn.Module):
    """Text c of the scenes world's captions, with nothing to learn: every row is a random sum of what words there are, and how far from it.

    So the row of "square" knows that it is blue, and above something: like CLIP's rows, it has read its context. (Of rows that know no more
    than their own word and place, the small teacher would have to learn that first; in its minutes it does not. See README.)

    width   W       T   rows; captions have at most 8 words
    """
    def __init__(self, width=128, T=12):
        super().__init__()
        self.T = T
        self.register_buffer("vectors", torch.randn(2 * T + 1, len(SCENE_WORDS), width, generator=torch.Generator().manual_seed(0)))

    def encode(self, captions):
        """Captions, a list of str -> c (B, 1 + T, W): row 0 reads from before the first word, row i from the i-th, and zeros behind the last.

        "" is the empty caption, which stands for "no condition": zeros. ValueError for words and sentences that parse_caption does not know
        """
        if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions should be a list of one text or more, got {captions!r}"[:200])
        c = self.vectors.new_zeros(len(captions), 1 + self.T, self.vectors.shape[2])
        for row, caption in zip(c, captions):
            if caption.strip():
                parse_caption(caption)
                words = torch.tensor([SCENE_WORDS.index(word) for word in caption.lower().split()])
                at = torch.arange(len(words) + 1)
                distance = at[1:] - at[:, None]                                  # (rows, words), from -T to T
                row[at] = self.vectors[self.T + distance, words].sum(1) / len(words) ** 0.5
        return c


# ------------------------------------------------------------------------------------------------ text encoder: CLIP (Radford et al. 2021)
class TextEncoder(nn.Module):
    """The text tower of CLIP ViT-L/14-336 as open_clip builds it (its name there: ViT-L-14-336-quickgelu), with random weights.

    It makes the text c of MaskGen-L and TA-TiTok, (B, 1 + 77 + 77, width) float32:
        row 0        the pooled vector: final states at the end of the text, projected
        rows 1..77   states before the last block, without final norm: what MaskGen attends to
        the last 77  states after the last block and the final norm: what guides TA-TiTok
    """
    def __init__(self, width=768, depth=12, heads=12):
        super().__init__()
        import_timm()                                                            # open_clip imports torchvision as well
        from open_clip import get_tokenizer
        from open_clip.transformer import QuickGELU, TextTransformer
        self.tokenizer = get_tokenizer("ViT-L-14-336-quickgelu")
        self.tower = TextTransformer(width=width, layers=depth, heads=heads, output_dim=width, act_layer=QuickGELU)
        # OpenAI trained with x sigmoid(1.702 x). Some releases of open_clip build these towers with GELU and only warn: every text
        # would come out slightly wrong, and no error would show it
        if not all(isinstance(block.mlp.gelu, QuickGELU) for block in self.tower.transformer.resblocks):
            raise ValueError("this release of open_clip does not build the text tower of CLIP with QuickGELU, its activation")

    @torch.no_grad()
    def states(self, ids):
        """Token ids (B, 77), 0 behind the end token -> c (B, 155, width)."""
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding              # (B, 77, width)
        for block in tower.transformer.resblocks:
            before_last, x = x, block(x, attn_mask=tower.attn_mask)              # causal
        x = tower.ln_final(x)
        end = ids.argmax(1)                                                      # the end token has the largest id
        pooled = x[torch.arange(len(x), device=x.device), end] @ tower.text_projection
        return torch.cat([pooled[:, None], before_last, x], 1).float()

    def encode(self, captions):
        """Captions, a list of str -> c (B, 155, width). "" is the empty caption, which stands for "no condition". See `cut_captions`."""
        if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions should be a list of one text or more, got {captions!r}"[:200])
        return self.states(self.tokenizer(captions).to(self.tower.positional_embedding.device))

    def cut_captions(self, captions):
        """Which captions are longer than the tower reads, 75 tokens, and what is lost -> {caption: the text that is cut off}."""
        room = self.tokenizer.context_length - 2                                 # beside start and end
        tokens = {caption: self.tokenizer.encode(caption) for caption in captions}
        return {caption: self.tokenizer.decode(t[room:]).strip() for caption, t in tokens.items() if len(t) > room}


CLIP_FILE, CLIP_REPO = "open_clip_model.safetensors", "timm/vit_large_patch14_clip_336.openai"      # what open_clip's tag "openai" loads


def load_text_encoder(weights):
    """CLIP's text tower with OpenAI's weights, frozen, in eval mode.

    weights   path or state dict with open_clip's keys, with or without the visual tower
    ValueError in one line when the file cannot be read or does not fit
    """
    what = "the text encoder"
    try:
        state = read_weights(weights, what)
    except ValueError as error:
        if "TorchScript" not in str(error):
            raise
        raise ValueError(f"{source_name(weights, what)} is a TorchScript archive, such as OpenAI's ViT-L-14-336px.pt. Needed are the tensors "
                         f"alone: the file {CLIP_FILE} of repository {CLIP_REPO} (Hugging Face hub)") from None
    model = TextEncoder()
    # not of the text tower: the other tower, and the scale of the similarities between the two
    load_strictly(model.tower, state, source_name(weights, what), ignore_prefix=("visual.", "logit_scale"))
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ Phi and the judge of the small worlds
class ConvNet(nn.Module):
    """A small residual classifier. Trained here on the world's classes; four blocks to lift from, as Phi's {2, 5, 8, 11}.

    Used twice, from different seeds, widths and images: as Phi (train.py) and as the judge, which evaluate.py alone may see.
    """
    def __init__(self, num_classes=24, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        widths, strides = [width, width, 2 * width, 2 * width, 4 * width], [1, 2, 1, 2]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                                                  nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b))
                                    for a, b, s in zip(widths, widths[1:], strides))
        self.skips = nn.ModuleList(nn.Conv2d(a, b, 1, stride=s) for a, b, s in zip(widths, widths[1:], strides))
        self.head = nn.Linear(widths[-1], num_classes)

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> the outputs of the four blocks, each (B, D, h, w)."""
        x, maps = F.relu(self.stem(images)), []
        for block, skip in zip(self.blocks, self.skips):
            x = F.relu(block(x) + skip(x))
            maps.append(x)
        return maps

    def forward(self, images):
        """-> features (B, 4 width), logits (B, num_classes)."""
        features = self.maps(images)[-1].mean((2, 3))
        return features, self.head(features)


# ------------------------------------------------------------------------------------------------ Phi: DINOv3 (Simeoni et al. 2025)
def import_timm():
    """timm, even where torchvision's compiled part does not fit torch, as beside a CPU build.

    timm and open_clip take nothing but image transforms from torchvision, yet importing it fails when it describes operators
    (nms, qnms) that its missing part should have defined. A declaration in their place is enough: nobody here calls them.
    """
    for _ in range(8):
        try:
            import torchvision  # noqa: F401
            break
        except RuntimeError as error:
            operator = re.match(r"operator (torchvision::\w+) does not exist", str(error))
            if operator is None:
                raise
            torch.library.define(operator[1], "(Tensor x) -> Tensor")
    import timm
    return timm


class Backbone(nn.Module):
    """The feature network Phi of Sec. 3.3: a vision transformer of timm, DINOv3 ViT-B/16 unless another is named, with random weights.

    blocks       whose outputs are the maps, 0 .. depth - 1, rising; the paper's are 2, 5, 8, 11
    image_size   pixels per side, a multiple of the patch: 256 gives DINOv3's own 16 x 16 map, other sizes work as well
    """
    def __init__(self, name="vit_base_patch16_dinov3.lvd1689m", blocks=(2, 5, 8, 11), image_size=256):
        super().__init__()
        try:
            self.net = import_timm().create_model(name, num_classes=0, dynamic_img_size=True)
            depth, patch = len(self.net.blocks), self.net.patch_embed.patch_size[0]
        except (RuntimeError, TypeError, AttributeError) as error:               # no such model; or not a vision transformer
            raise ValueError(f"{name!r} is not a vision transformer of timm ({error})") from error
        if list(blocks) != sorted(set(blocks)) or not all(0 <= block < depth for block in blocks):
            raise ValueError(f"{name} has blocks 0 to {depth - 1}; {tuple(blocks)} should be some of them, in rising order")
        if image_size % patch:
            raise ValueError(f"images of {image_size} pixels do not split into the {patch}-pixel patches of {name}")
        self.blocks = list(blocks)
        for what in ("mean", "std"):                                             # what the network was trained with; not in its file
            self.register_buffer(what, torch.tensor(self.net.pretrained_cfg[what]).view(1, 3, 1, 1), persistent=False)

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> one (B, D, H / patch, W / patch) per block: its raw output, without the final norm.

        Class and register tokens are left out. Gradients reach the images, and values beyond [-1, 1] are not clamped (Sec. 3.3).
        """
        x = ((images + 1) / 2 - self.mean) / self.std
        return self.net.forward_intermediates(x, indices=self.blocks, norm=False, stop_early=True, intermediates_only=True)


def find_backbone(name, given=None, part="backbone"):
    """Path of the weights of a timm network: the user's own file, else weights/<name>.safetensors, else repository timm/<name> on the hub.

    given, part   what the option --<part>-weights says, or None
    """
    config = import_timm().get_pretrained_cfg(name)
    if config is None:
        raise ValueError(f"{name!r} is not a network with pretrained weights of timm")
    return find_weights(part, given, "model.safetensors", config.hf_hub_id or f"timm/{name}", save_as=f"{name}.safetensors")


def load_backbone(name, weights, blocks=(2, 5, 8, 11), image_size=256):
    """Phi with its pretrained weights, frozen, in eval mode.

    weights   path or state dict with timm's keys, complete but for a classifier
    ValueError in one line when the file cannot be read or does not fit
    """
    model = Backbone(name, blocks, image_size)
    what = f"the backbone {name}"
    # "head.": a classifier, which we do not build; "rope.": constants that timm computes itself
    load_strictly(model.net, read_weights(weights, what), source_name(weights, what), ignore_prefix=("head.", "rope."))
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ the projected discriminator (Sec. 3.4)
class DeiT(Backbone):
    """One of StyleGAN-XL's two feature networks: a vision transformer, which always looks at 224 x 224 pixels."""
    name, part, unused = "deit_base_distilled_patch16_224", "deit", ("head.", "head_dist.")

    def __init__(self):
        super().__init__(self.name, image_size=224)

    def maps(self, images):
        return super().maps(F.interpolate(images, (224, 224), mode="bilinear"))


class EfficientNet(nn.Module):
    """The other one, convolutional. It sees images as large as they are, but at least 224 x 224 pixels."""
    name, part, unused = "tf_efficientnet_lite0", "efficientnet", ("conv_head.", "bn2.", "classifier.")

    def __init__(self):
        super().__init__()
        self.net = import_timm().create_model(self.name, features_only=True, out_indices=(1, 2, 3, 4))

    def maps(self, images):
        """Images (B, 3, H, W) in [-1, 1], as the network was trained with -> (B, D, h, w) at 1/4, 1/8, 1/16, 1/32 of the side."""
        if images.shape[-1] < 224:
            images = F.interpolate(images, (224, 224), mode="bilinear")
        return self.net(images)


class Projection(nn.Module):
    """Mixes the maps of a feature network over channels and scales, at random (Sauer et al. 2021): heads cannot settle on a few channels.

    maps (B, D, h, w), four from fine to coarse, whose sizes are all that is looked at here: each mixed map has the size of the next
    finer one, the finest twice its own. width: channels of the finest mixed map.
    """
    def __init__(self, maps, width):
        super().__init__()
        D = [m.shape[1] for m in maps]
        if maps[0].shape == maps[3].shape:                                       # of a vision transformer: a pyramid is made of them
            D = [D[0] // 8, D[0] // 4, D[0] // 2, D[0]]
            resize = [nn.ConvTranspose2d(D[0], D[0], 4, stride=4), nn.ConvTranspose2d(D[1], D[1], 2, stride=2), nn.Identity(),
                      nn.Conv2d(D[3], D[3], 3, stride=2, padding=1)]
            self.pretrained = nn.ModuleDict({                                    # "3", "4": the official keys count the reshaping before
                f"layer{i + 1}": nn.Sequential(OrderedDict({"3": nn.Conv2d(m.shape[1], D[i], 1), "4": resize[i]})) for i, m in enumerate(maps)})
        self.scratch = nn.ModuleDict()
        for i, c in enumerate([width, 2 * width, 4 * width, 8 * width]):
            self.scratch[f"layer{i}_ccm"] = nn.Conv2d(D[i], c, 1)                # cross-channel mixing
            self.scratch[f"layer{i}_csm"] = nn.ModuleDict({"out_conv": nn.Conv2d(c, max(width, c // 2), 1)})     # cross-scale mixing
        self.requires_grad_(False)                                               # never trained, either

    def forward(self, maps):
        if hasattr(self, "pretrained"):
            maps = [layer(m) for layer, m in zip(self.pretrained.values(), maps)]
        h, w = maps[0].shape[2:]
        sizes, mixed, below = [(2 * h, 2 * w)] + [m.shape[2:] for m in maps[:3]], [], 0.0
        for i in (3, 2, 1, 0):
            x = self.scratch[f"layer{i}_csm"]["out_conv"](self.scratch[f"layer{i}_ccm"](maps[i]) + below)
            below = F.interpolate(x, sizes[i], mode="bilinear", align_corners=True)    # officially before out_conv: the same, four times the work
            mixed.insert(0, below)
        return mixed


def head(channels, size, width):
    """A small convolutional judge of one mixed map: halve its side until it is about 8, then logits. Every convolution has spectral norm.

    (B, channels, size, size) -> (B, 1, n, n); n = 4 or 5 for maps of 8 pixels and more
    """
    n = max(1, round(math.log2(size / 8)))
    widths, blocks = [channels] + [8 * width >> i for i in reversed(range(n))], []
    for a, b in zip(widths, widths[1:]):
        block = nn.Sequential(spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
        blocks.append(nn.Sequential(OrderedDict(main=block)))
    logits = spectral_norm(nn.Conv2d(widths[-1], 1, min(4, size >> n), bias=False))
    return nn.Sequential(OrderedDict(main=nn.Sequential(*blocks, logits)))


class Discriminator(nn.Module):
    """The projected discriminator of StyleGAN-XL (Sauer et al. 2022), unconditional: feature network -> `Projection` -> four heads, only
    these trained, for each of its feature networks.

    networks     name -> module with .maps(images (B, 3, H, W) in [-1, 1]) -> four maps, fine to coarse: StyleGAN-XL's two
                 (`load_discriminator`) or Phi alone (the small worlds). They are frozen here, and stay what they are: no .train(), .to() or
                 state_dict() of the discriminator reaches them
    image_size   pixels per side, to learn the sizes of the maps
    width        channels of the finest mixed map; 64 in StyleGAN-XL

    forward(images, augment=None: a function of images, called anew for each network) -> list of logits (B, n), one per network.
    In training mode the heads' BatchNorm takes its statistics from the batch: real images and drafts go through in separate calls.
    """
    def __init__(self, networks, image_size=256, width=64):
        super().__init__()
        self.networks = dict(networks)                                           # a plain dict, hence not part of the state dict
        self.feature_networks, self.discriminators = nn.ModuleDict(), nn.ModuleDict()
        for name, network in self.networks.items():
            network.eval().requires_grad_(False)
            with torch.no_grad():
                maps = network.maps(torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device))
                if len(maps) != 4:
                    raise ValueError(f"the discriminator looks at 4 maps, and {name} has {len(maps)}")
                self.feature_networks[name] = Projection([m.cpu() for m in maps], width)
                mixed = self.feature_networks[name]([m.cpu() for m in maps])
            self.discriminators[name] = nn.ModuleDict(dict(mini_discs=nn.ModuleList(head(m.shape[1], m.shape[2], width) for m in mixed)))

    def requires_grad_(self, requires_grad=True):
        """Of the heads only: the rest stays frozen."""
        self.discriminators.requires_grad_(requires_grad)
        return self

    def forward(self, images, augment=None):
        logits = []
        for name, network in self.networks.items():
            mixed = self.feature_networks[name](network.maps(augment(images) if augment else images))
            heads = self.discriminators[name]["mini_discs"]
            logits.append(torch.cat([judge(m).flatten(1) for judge, m in zip(heads, mixed)], 1))    # (B, n)
        return logits


FEATURE_NETWORKS = (DeiT, EfficientNet)


# ------------------------------------------------------------------------------------------------ the FID Inception (Szegedy et al. 2015)
def resize_tensorflow1(x, size):
    """Bilinear, source coordinate = i * in / out without the half pixel, no antialiasing. (B, C, H, W) float -> (B, C, size, size)."""
    def neighbours(n):
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (n / size)   # float32, like the original: the last bits count here
        low = at.long()
        return low, (low + 1).clamp(max=n - 1), at - low
    low, high, share = neighbours(x.shape[3])
    x = x[..., low] * (1 - share) + x[..., high] * share                       # (B, C, H, size)
    low, high, share = neighbours(x.shape[2])
    return x[:, :, low] * (1 - share[:, None]) + x[:, :, high] * share[:, None]


class Inception(nn.Module):
    """The feature network of FID and of the Inception Score, Google's of 2015-12-05: timm's Inception-v3 but for how two kinds of blocks pool.

    forward(images (B, 3, H, W) uint8) -> features (B, 2048), logits (B, 1008). The two paths are not interchangeable:
    path "pytorch-fid"   torch's bilinear resize to 299, [-1, 1]
         "legacy"        TensorFlow 1's resize and scaling, logits without bias: torch-fidelity, DiMO and the ADM references
    """
    def __init__(self):
        super().__init__()
        self.net = import_timm().create_model("inception_v3", num_classes=1008)

    @torch.no_grad()
    def forward(self, images, path="pytorch-fid"):
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception wants uint8 images: rounding to 8 bits is part of the score; got {images.dtype}")
        x = images.to(self.net.fc.weight.device).float()
        if path == "pytorch-fid":
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        elif path == "legacy":
            x = (resize_tensorflow1(x, 299) - 128) / 128
        else:
            raise ValueError(f"path should be 'pytorch-fid' or 'legacy', got {path!r}")
        for name, block in self.net.named_children():
            if name == "global_pool":                                            # all that follows: features and logits
                break
            if not hasattr(block, "branch_pool"):
                x = block(x)
                continue
            if name == "Mixed_7c":                                               # a slip of the original in its last block, now part of FID
                pooled = F.max_pool2d(x, 3, stride=1, padding=1)
            else:                                                                # TensorFlow averages without the padding
                pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            x = torch.cat([*block._forward(x)[:-1], block.branch_pool(pooled)], 1)             # the last branch is timm's own pooling
        features = x.mean((2, 3))                                                # (B, 2048)
        return features, F.linear(features, self.net.fc.weight, self.net.fc.bias if path == "pytorch-fid" else None)


INCEPTION = "pt_inception-2015-12-05-6726825d.pth"                               # ends in the beginning of its own sha256


def find_inception(given):
    """Path of the FID Inception's weights: the user's own, else weights/. They are on GitHub, not on the hub."""
    if given and not Path(given).is_file():
        raise ValueError(f"--inception-weights {given}: no such file")
    path = Path(given or f"weights/{INCEPTION}")
    if not path.is_file():
        raise ValueError(f"no weights for inception: put the file {INCEPTION} of https://github.com/mseitzer/pytorch-fid (release fid_weights) "
                         f"at {path}, or name it with --inception-weights")
    return path


def load_inception(src):
    """The FID Inception, frozen, from pt_inception-2015-12-05-6726825d.pth (releases of mseitzer/pytorch-fid; torch-fidelity's is equal).

    src: a path or a state dict; keys must match exactly. ValueError in one line otherwise.
    """
    torch.backends.cudnn.allow_tf32 = False                                    # its 10 bits would move the score
    model, what = Inception(), "the FID Inception"
    load_strictly(model.net, read_weights(src, what), source_name(src, what))
    return model.eval().requires_grad_(False)
