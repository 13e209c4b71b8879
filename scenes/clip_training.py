"""Trains the embedded CLIP: a stock `CLIPModel` of 1.7 M parameters with a small tokenizer.

Contrastive training alone learns colours and then stalls. So the text tower is first trained to
classify the caption's attributes through a linear layer. It is then locked (LiT, Zhai et al. 2022),
and the image tower is trained on the same attributes and on the contrastive loss (Radford et al.
2021) with hard negatives.

    python -m scenes.train_encoders --only clip
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

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
    SceneObject,
    World,
    stream,
)

MAX_TOKENS = 77
NUM_TOKENS = 24
"""Every caption of the grammar fits; one step in 16 trains at MAX_TOKENS."""
WIDTH = 128
LAYOUTS = ("single", "row", "column", "one above two", "two above one")
IGNORE_INDEX = -100
"""The class index of an attribute that the caption does not mention."""

NegativeKind = Literal["shape_replaced", "colour_replaced", "colours_swapped", "relation_flipped"]
NEGATIVE_KINDS: tuple[NegativeKind, ...] = get_args(NegativeKind)

FIELDS: dict[str, int] = {
    **{f"shape{i}": len(SHAPES) for i in range(3)},
    **{f"colour{i}": len(COLOURS) for i in range(3)},
    **{f"size{i}": len(SIZES_PX) for i in range(3)},
    "layout": len(LAYOUTS),
    "place": len(PLACES),
    "background": len(BACKGROUNDS),
}
"""The attributes of a scene and the number of classes of each, objects in reading order."""


def make_tokenizer() -> CLIPTokenizer:
    """Makes a byte-level BPE tokenizer with one token per word of the grammar."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(vocabulary())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    pairs: Any = merges  # annotated as strings; `tokenizers` takes pairs
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns byte-pair merges (Sennrich et al. 2016) until each word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        # `tokenizers.BpeTrainer` breaks ties in hash order, so its token ids differ between runs.
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
    """Builds the model with random weights."""
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


class DescriptionHead(nn.Module):
    """Linear classifiers from a hidden state to every field; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in FIELDS.items()})

    def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the logits per field.  # (B, D) -> (B, classes)"""
        return {name: head(states) for name, head in self.heads.items()}

    def loss(self, states: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the mean over fields of the cross-entropy of the mentioned attributes."""
        losses = [
            F.cross_entropy(logits, targets[name], ignore_index=IGNORE_INDEX, reduction="sum")
            / (targets[name] != IGNORE_INDEX).sum().clamp(min=1)
            for name, logits in self(states).items()
        ]
        return torch.stack(losses).mean()


def describe(scene: Scene, mentions: frozenset[str] | None = None) -> dict[str, int]:
    """Returns the class of each field, or IGNORE_INDEX for attributes not in `mentions`.

    `mentions=None` includes every attribute.
    """
    objects, layout = _reading_order(scene)
    included = {"size", "place", "background"} if mentions is None else mentions
    row = dict.fromkeys(FIELDS, IGNORE_INDEX)
    for i, item in enumerate(objects):
        row[f"shape{i}"] = SHAPES.index(item.shape)
        row[f"colour{i}"] = list(COLOURS).index(item.colour)
        if "size" in included:
            row[f"size{i}"] = list(SIZES_PX).index(item.size)
    row["layout"] = LAYOUTS.index(layout)
    if "place" in included and scene.place is not None:
        row["place"] = PLACES.index(scene.place)
    if "background" in included:
        row["background"] = list(BACKGROUNDS).index(scene.background)
    return row


def _reading_order(scene: Scene) -> tuple[tuple[SceneObject, ...], str]:
    first, *rest = scene.objects
    if not rest:
        return scene.objects, "single"
    comes_first = scene.relation in ("left of", "above")
    order = (first, *rest) if comes_first else (*rest, first)
    if len(rest) == 2:
        return order, "one above two" if comes_first else "two above one"
    return order, "row" if scene.relation in ("left of", "right of") else "column"


def make_negative(
    scene: Scene, kind: NegativeKind, world: World, rng: np.random.Generator
) -> Scene | None:
    """Returns the scene with one attribute changed, or None if `kind` does not apply to it."""
    objects = list(scene.objects)
    looks = [(item.shape, item.colour, item.size) for item in objects]
    if kind == "relation_flipped":
        if scene.relation is None or looks[0] == looks[1]:
            return None
        return replace(scene, relation=INVERSE[scene.relation])
    if kind == "colours_swapped":
        if len(objects) != 2:
            return None
        a, b = objects
        if a.colour == b.colour or a.shape == b.shape:
            return None
        return replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    index = int(rng.integers(len(objects)))
    field = "shape" if kind == "shape_replaced" else "colour"
    options = world.shapes if field == "shape" else world.colours
    current = getattr(objects[index], field)
    changed = {field: str(rng.choice([option for option in options if option != current]))}
    objects[index] = replace(objects[index], **changed)  # type: ignore[arg-type]
    return replace(scene, objects=tuple(objects))


def caption_stream(
    world: World, split: Literal["train", "val"], seed: int
) -> Iterator[tuple[Scene, Caption, dict[NegativeKind, str]]]:
    """Yields endless scenes, each with one caption and its hard negatives by kind."""
    for scene, rng in stream(world, split, seed):
        # A caption and its negatives share the template and the synonyms.
        template, word_seed = int(rng.integers(5)), int(rng.integers(2**31))
        true = caption(scene, world, template, np.random.default_rng(word_seed))
        negatives = {}
        for kind in NEGATIVE_KINDS:
            changed = make_negative(scene, kind, world, rng)
            if changed is not None:
                words = np.random.default_rng(word_seed)
                negatives[kind] = caption(changed, world, template, words).text
        yield scene, true, negatives


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str], num_tokens: int) -> torch.Tensor:
    """Returns token ids, padded as in Stable Diffusion.  # (N, num_tokens)"""
    return tokenizer(
        list(texts), padding="max_length", max_length=num_tokens, truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip


def targets(rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
    """Stacks the rows of `describe` into one tensor per field.  # (B,)"""
    return {name: torch.tensor([row[name] for row in rows]) for name in FIELDS}


def train_text(
    model: CLIPModel, tokenizer: CLIPTokenizer, num_steps: int, seed: int, batch_size: int = 128
) -> None:
    """Trains the text tower to encode the fields in the end-of-text and the padding tokens."""
    torch.manual_seed(seed)
    tower, head = model.text_model, DescriptionHead()
    data = caption_stream(WORLDS["full"], "train", seed)

    def loss_of(step: int) -> torch.Tensor:
        pairs = [next(data) for _ in range(batch_size)]
        labels = targets([describe(scene, true.mentions) for scene, true, _ in pairs])
        length = MAX_TOKENS if step % 16 == 0 else NUM_TOKENS
        ids = encode(tokenizer, [true.text for _, true, _ in pairs], length)
        with torch.autocast("cpu", torch.bfloat16):
            out = tower(input_ids=ids)
            padding = out.last_hidden_state[:, int(torch.randint(NUM_TOKENS - 4, length, ()))]
            return head.loss(out.pooler_output, labels) + 0.3 * head.loss(padding, labels)

    _fit("text", [*tower.parameters(), *head.parameters()], 1.5e-3, num_steps, loss_of)
    accuracy = description_accuracy(tower, head, tokenizer, seed + 1)
    worst = min(accuracy, key=accuracy.__getitem__)
    print(f"text tower on validation captions: worst field {worst} at {accuracy[worst]:.1%}")


@torch.inference_mode()
def description_accuracy(
    tower: CLIPTextModel,
    head: DescriptionHead,
    tokenizer: CLIPTokenizer,
    seed: int,
    num: int = 1000,
) -> dict[str, float]:
    """Returns the head's accuracy per field on the end-of-text token, mentioned attributes only."""
    data = caption_stream(WORLDS["full"], "val", seed)
    pairs = [next(data) for _ in range(num)]
    labels = targets([describe(scene, true.mentions) for scene, true, _ in pairs])
    ids = encode(tokenizer, [true.text for _, true, _ in pairs], NUM_TOKENS)
    logits = head(tower(input_ids=ids).pooler_output)
    accuracy = {}
    for name, label in labels.items():
        mentioned = label != IGNORE_INDEX
        accuracy[name] = float((logits[name].argmax(1) == label)[mentioned].float().mean())
    return accuracy


def train_image(
    model: CLIPModel, tokenizer: CLIPTokenizer, num_steps: int, seed: int, batch_size: int = 64
) -> None:
    """Trains the image tower and both projections with a locked text tower."""
    torch.manual_seed(seed)
    model.text_model.requires_grad_(False)
    head = DescriptionHead()
    data = caption_stream(WORLDS["full"], "train", seed + 2)

    def loss_of(step: int) -> torch.Tensor:
        triples = [next(data) for _ in range(batch_size)]
        scenes = [scene for scene, _, _ in triples]
        texts, owners = _with_negatives(triples)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.vision_model(pixel_values=to_pixels(render(scenes))).pooler_output
            with torch.no_grad():
                out = model.text_model(input_ids=encode(tokenizer, texts, NUM_TOKENS))
            images = F.normalize(model.visual_projection(seen).float(), dim=-1)
            captions = F.normalize(model.text_projection(out.pooler_output).float(), dim=-1)
            attribute_loss = head.loss(seen, targets([describe(scene) for scene in scenes]))
        return attribute_loss + _contrastive_loss(images, captions, owners, model.logit_scale)

    weights = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    _fit("image", weights, 1e-3, num_steps, loss_of)
    model.requires_grad_(True)


def _with_negatives(
    triples: Sequence[tuple[Scene, Caption, dict[NegativeKind, str]]],
) -> tuple[list[str], torch.Tensor]:
    """Returns all true captions, then all negatives, and the index of each one's image."""
    texts = [true.text for _, true, _ in triples]
    negatives = [(i, text) for i, triple in enumerate(triples) for text in triple[2].values()]
    owners = [*range(len(triples)), *(i for i, _ in negatives)]
    return texts + [text for _, text in negatives], torch.tensor(owners)


def _contrastive_loss(
    images: torch.Tensor, captions: torch.Tensor, owners: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric loss over the batch plus each image's caption against its own negatives."""
    num = len(images)
    scores = logit_scale.exp().clamp(max=100.0) * images @ captions.T  # (B, B + N)
    own = torch.arange(num)
    batch = F.cross_entropy(scores, own) + F.cross_entropy(scores[:, :num].T, own)
    # The image's own negatives get a term of their own: among the batch's easy negatives they
    # would hardly count.
    others = owners[None, :] != own[:, None]
    hard = F.cross_entropy(scores.masked_fill(others, float("-inf")), own)
    return batch / 2 + hard


@torch.inference_mode()
def forced_choice(
    model: CLIPModel, tokenizer: CLIPTokenizer, seed: int, num: int = 1000
) -> dict[NegativeKind, float]:
    """Returns the accuracy at ranking the true caption above its hard negative, by kind."""
    data = caption_stream(WORLDS["full"], "val", seed)
    triples = [next(data) for _ in range(num)]
    texts, owners = _with_negatives(triples)
    pixels = to_pixels(render([scene for scene, _, _ in triples]))
    seen = model.vision_model(pixel_values=pixels).pooler_output
    images = F.normalize(model.visual_projection(seen), dim=-1)
    states = model.text_model(input_ids=encode(tokenizer, texts, NUM_TOKENS)).pooler_output
    captions = F.normalize(model.text_projection(states), dim=-1)
    scores = (images[owners] * captions).sum(-1)
    kinds = np.array([kind for _, _, negatives in triples for kind in negatives])
    correct = (scores[owners[num:]] > scores[num:]).numpy()
    return {kind: float(correct[kinds == kind].mean()) for kind in NEGATIVE_KINDS}


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Normalises uint8 images (B, H, W, 3) for the image tower.  # (B, 3, H, W)"""
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Saves float16 weights, tokenizer and image processor as a stock transformers folder."""
    model.half().save_pretrained(folder)
    model.float()
    # A fast tokenizer would save the padding and truncation settings of its last call.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt: transformers 4
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)


def _fit(
    name: str,
    weights: list[nn.Parameter],
    learning_rate: float,
    num_steps: int,
    loss_of: Callable[[int], torch.Tensor],
) -> None:
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=num_steps + 1, pct_start=0.08
    )
    started = time.perf_counter()
    for step in range(1, num_steps + 1):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == num_steps:
            minutes = (time.perf_counter() - started) / 60
            print(
                f"{name} step {step}/{num_steps}  loss {loss.item():.4f}  {minutes:.1f} min",
                flush=True,
            )
