"""Trains the embedded CLIP: a stock `CLIPModel` of 1.7 M weights with its own small tokenizer.

Plain contrastive training learns colours and stops: telling shapes or relations apart hardly lowers
its loss. So the text tower first learns to say, from the end-of-text token's hidden state through
one linear layer, what the caption says: every object's shape, colour and size in reading order, the
layout, the place, the background. What a linear layer can read, a denoiser's cross-attention can
read. Then that tower is locked (LiT, Zhai et al. 2022) and the image tower learns the same
description and the contrastive loss (Radford et al. 2021), against hard negatives: each caption
with a shape replaced, a colour replaced, the colours swapped or the relation turned round.

    python -m scenes.train_encoders --only clip
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from latent_t2i.scenes.captions import Caption, caption, vocabulary
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    PLACES,
    SHAPES,
    SIZES_PX,
    WORLDS,
    Scene,
    Thing,
    World,
    stream,
)

MAX_TOKENS = 77
NUM_TOKENS = 24
"""Every caption of the grammar fits; towers train at this length and, now and then, at 77."""
WIDTH = 128
LAYOUTS = ("single", "row", "column", "one above two", "two above one")
UNTOLD = -100
"""What cross-entropy ignores: an attribute that the caption does not tell."""

Distortion = Literal["shape_replaced", "colour_replaced", "colours_swapped", "relation_flipped"]
DISTORTIONS: tuple[Distortion, ...] = (
    "shape_replaced", "colour_replaced", "colours_swapped", "relation_flipped"
)  # fmt: skip

FIELDS: dict[str, int] = {
    **{f"shape{i}": len(SHAPES) for i in range(3)},
    **{f"colour{i}": len(COLOURS) for i in range(3)},
    **{f"size{i}": len(SIZES_PX) for i in range(3)},
    "layout": len(LAYOUTS),
    "place": len(PLACES),
    "background": len(BACKGROUNDS),
}
"""A description's fields and how many values each can take."""


def make_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in CLIP's own format: each word of the grammar is one token, and any other
    text is still spelled out byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(vocabulary())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    pairs: Any = merges  # annotated as strings; `tokenizers` takes pairs
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) that make each word one token, most frequent first.

    `tokenizers.BpeTrainer` breaks ties in the order of a hash map, so its ids differ from run to
    run; here the first pair in alphabetical order wins.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The two towers with random weights."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    vision = tower | {"image_size": 64, "patch_size": 8}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH, **ids)
    )


class Describer(nn.Module):
    """One linear layer from a hidden state to every field of a description. Not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in FIELDS.items()})

    def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits per field.  # (B, D) -> (B, values)"""
        return {name: head(states) for name, head in self.heads.items()}

    def loss(self, states: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the fields that are told."""
        losses = [
            F.cross_entropy(logits, targets[name], ignore_index=UNTOLD, reduction="sum")
            / (targets[name] != UNTOLD).sum().clamp(min=1)
            for name, logits in self(states).items()
        ]
        return torch.stack(losses).mean()


def describe(scene: Scene, mentions: frozenset[str] | None = None) -> dict[str, int]:
    """The scene's description, objects in reading order; what is not in `mentions` is UNTOLD.

    `mentions=None` tells all, as a picture does.
    """
    things, layout = _reading_order(scene)
    told = {"size", "place", "background"} if mentions is None else mentions
    row = dict.fromkeys(FIELDS, UNTOLD)
    for i, thing in enumerate(things):
        row[f"shape{i}"] = SHAPES.index(thing.shape)
        row[f"colour{i}"] = list(COLOURS).index(thing.colour)
        if "size" in told:
            row[f"size{i}"] = list(SIZES_PX).index(thing.size)
    row["layout"] = LAYOUTS.index(layout)
    if "place" in told and scene.place is not None:
        row["place"] = PLACES.index(scene.place)
    if "background" in told:
        row["background"] = list(BACKGROUNDS).index(scene.background)
    return row


def _reading_order(scene: Scene) -> tuple[tuple[Thing, ...], str]:
    first, *rest = scene.things
    if not rest:
        return scene.things, "single"
    leads = scene.relation in ("left of", "above")
    order = (first, *rest) if leads else (*rest, first)
    if len(rest) == 2:
        return order, "one above two" if leads else "two above one"
    return order, "row" if scene.relation in ("left of", "right of") else "column"


def distort(scene: Scene, kind: Distortion, world: World, rng: np.random.Generator) -> Scene | None:
    """The scene with one thing told wrongly, or None where that would change nothing."""
    things = list(scene.things)
    if kind == "relation_flipped":
        if scene.relation is None or _alike(things[0], things[1]):
            return None
        return replace(scene, relation=INVERSE[scene.relation])
    if kind == "colours_swapped":
        if len(things) != 2 or things[0].colour == things[1].colour or (
            things[0].shape == things[1].shape
        ):  # fmt: skip
            return None
        colours = things[0].colour, things[1].colour
        things = [replace(things[0], colour=colours[1]), replace(things[1], colour=colours[0])]
        return replace(scene, things=tuple(things))
    which = int(rng.integers(len(things)))
    options = world.shapes if kind == "shape_replaced" else world.colours
    now = things[which].shape if kind == "shape_replaced" else things[which].colour
    other = str(rng.choice([option for option in options if option != now]))
    things[which] = (
        replace(things[which], shape=other) if kind == "shape_replaced"
        else replace(things[which], colour=other)
    )  # fmt: skip
    return replace(scene, things=tuple(things))


def _alike(a: Thing, b: Thing) -> bool:
    return (a.shape, a.colour, a.size) == (b.shape, b.colour, b.size)


def captioned(
    world: World, split: Literal["train", "val"], seed: int
) -> Iterator[tuple[Scene, Caption, dict[Distortion, str]]]:
    """Endless scenes with one caption each and that caption distorted in every possible way."""
    for scene, rng in stream(world, split, seed):
        template, words = int(rng.integers(5)), int(rng.integers(2**31))
        told = caption(scene, world, template, np.random.default_rng(words))
        wrong = {}
        for kind in DISTORTIONS:
            other = distort(scene, kind, world, rng)
            if other is not None:
                wrong[kind] = caption(other, world, template, np.random.default_rng(words)).text
        yield scene, told, wrong


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str], num_tokens: int) -> torch.Tensor:
    """Token ids padded as Stable Diffusion pads.  # (N, num_tokens)"""
    return tokenizer(
        list(texts), padding="max_length", max_length=num_tokens, truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip


def targets(rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
    """Descriptions as one tensor per field.  # (B,)"""
    return {name: torch.tensor([row[name] for row in rows]) for name in FIELDS}


def train_text(
    model: CLIPModel, tokenizer: CLIPTokenizer, num_steps: int, seed: int, batch_size: int = 128
) -> None:
    """The text tower on descriptions, read from the end-of-text token and from the last padding."""
    torch.manual_seed(seed)
    tower, head = model.text_model, Describer()
    weights = [*tower.parameters(), *head.parameters()]
    optimizer, schedule = _optimizer(weights, 1.5e-3, num_steps)
    data = captioned(WORLDS["full"], "train", seed)
    started = time.perf_counter()
    for step in range(1, num_steps + 1):
        pairs = [next(data) for _ in range(batch_size)]
        wanted = targets([describe(scene, told.mentions) for scene, told, _ in pairs])
        length = MAX_TOKENS if step % 16 == 0 else NUM_TOKENS
        ids = encode(tokenizer, [told.text for _, told, _ in pairs], length)
        with torch.autocast("cpu", torch.bfloat16):
            out = tower(input_ids=ids)
            padding = out.last_hidden_state[:, int(torch.randint(NUM_TOKENS - 4, length, ()))]
            loss = head.loss(out.pooler_output, wanted) + 0.3 * head.loss(padding, wanted)
        _update(loss, weights, optimizer, schedule)
        if step % 100 == 0 or step == num_steps:
            _report("text", step, num_steps, loss, started)
    accuracy = description_accuracy(tower, head, tokenizer, seed + 1)
    worst = min(accuracy, key=accuracy.__getitem__)
    print(f"text tower describes held-out captions: worst field {worst} {accuracy[worst]:.1%}")


@torch.inference_mode()
def description_accuracy(
    tower: CLIPTextModel, head: Describer, tokenizer: CLIPTokenizer, seed: int, num: int = 1000
) -> dict[str, float]:
    """Share of told fields that one linear layer reads right from the end-of-text token."""
    data = captioned(WORLDS["full"], "val", seed)
    pairs = [next(data) for _ in range(num)]
    wanted = targets([describe(scene, told.mentions) for scene, told, _ in pairs])
    ids = encode(tokenizer, [told.text for _, told, _ in pairs], NUM_TOKENS)
    logits = head(tower(input_ids=ids).pooler_output)
    return {
        name: float((logits[name].argmax(1) == wanted[name])[wanted[name] != UNTOLD].float().mean())
        for name in FIELDS
    }


def train_image(
    model: CLIPModel, tokenizer: CLIPTokenizer, num_steps: int, seed: int, batch_size: int = 64
) -> None:
    """The image tower and both projections, against a locked text tower."""
    torch.manual_seed(seed)
    model.text_model.requires_grad_(False)
    head = Describer()
    weights = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer, schedule = _optimizer(weights, 1e-3, num_steps)
    data = captioned(WORLDS["full"], "train", seed + 2)
    started = time.perf_counter()
    for step in range(1, num_steps + 1):
        triples = [next(data) for _ in range(batch_size)]
        scenes = [scene for scene, _, _ in triples]
        texts, owners = _with_negatives(triples)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.vision_model(pixel_values=to_pixels(render(scenes))).pooler_output
            with torch.no_grad():
                read = model.text_model(input_ids=encode(tokenizer, texts, NUM_TOKENS))
            images = F.normalize(model.visual_projection(seen).float(), dim=-1)
            words = F.normalize(model.text_projection(read.pooler_output).float(), dim=-1)
            told = head.loss(seen, targets([describe(scene) for scene in scenes]))
        loss = told + _contrast(images, words, owners, model.logit_scale)
        _update(loss, weights, optimizer, schedule)
        if step % 100 == 0 or step == num_steps:
            _report("image", step, num_steps, loss, started)
    model.requires_grad_(True)


def _with_negatives(
    triples: Sequence[tuple[Scene, Caption, dict[Distortion, str]]],
) -> tuple[list[str], torch.Tensor]:
    """Every true caption, then the distorted ones, and which picture each was made from."""
    texts = [told.text for _, told, _ in triples]
    wrong = [(i, text) for i, (_, _, d) in enumerate(triples) for text in d.values()]
    owners = [*range(len(triples)), *(i for i, _ in wrong)]
    return texts + [text for _, text in wrong], torch.tensor(owners)


def _contrast(
    images: torch.Tensor, words: torch.Tensor, owners: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric loss over the batch, and each picture's own caption against its distortions.

    The second term has few candidates, so it does not drown in the easy ones of other pictures.
    """
    num = len(images)
    scores = logit_scale.exp().clamp(max=100.0) * images @ words.T  # (B, B + W)
    own = torch.arange(num)
    batch = F.cross_entropy(scores, own) + F.cross_entropy(scores[:, :num].T, own)
    mine = owners[None, :] == own[:, None]
    hard = F.cross_entropy(scores.masked_fill(~mine, float("-inf")), own)
    return batch / 2 + hard


@torch.inference_mode()
def forced_choice(
    model: CLIPModel, tokenizer: CLIPTokenizer, seed: int, num: int = 1000
) -> dict[Distortion, float]:
    """Of scenes of the full world never trained on: how often a picture's own caption scores above
    the same caption distorted in one thing."""
    data = captioned(WORLDS["full"], "val", seed)
    triples = [next(data) for _ in range(num)]
    texts, owners = _with_negatives(triples)
    pixels = to_pixels(render([scene for scene, _, _ in triples]))
    images = F.normalize(
        model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1
    )
    states = model.text_model(input_ids=encode(tokenizer, texts, NUM_TOKENS)).pooler_output
    words = F.normalize(model.text_projection(states), dim=-1)
    scores = (images[owners] * words).sum(-1)
    kinds = [kind for _, _, wrong in triples for kind in wrong]
    right = (scores[owners[num:]] > scores[num:]).tolist()
    return {
        kind: float(np.mean([ok for ok, of in zip(right, kinds, strict=True) if of == kind]))
        for kind in DISTORTIONS
    }


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) as the image tower wants it, CLIP's mean and scale.  # (B, 3, H, W)"""
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A stock folder: float16 weights, tokenizer and image processor."""
    model.half().save_pretrained(folder)
    model.float()
    # Calling a fast tokenizer leaves its last padding and length in the file that it writes.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt: transformers 4
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)


def _optimizer(
    weights: list[nn.Parameter], rate: float, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=num_steps + 1, pct_start=0.08
    )
    return optimizer, schedule


def _update(
    loss: torch.Tensor,
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def _report(name: str, step: int, total: int, loss: torch.Tensor, started: float) -> None:
    minutes = (time.perf_counter() - started) / 60
    print(f"{name} step {step}/{total}  loss {loss.item():.4f}  {minutes:.1f} min", flush=True)
