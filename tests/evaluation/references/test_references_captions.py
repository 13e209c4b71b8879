"""CIDEr-D, BLEU-4, ROUGE-L and the tokeniser against pycocoevalcap, COCO's caption evaluation."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latent_t2i.evaluation.nlg import bleu_4, cider_d, rouge_l, tokenise

pytest.importorskip("pycocoevalcap", reason="see .ci/references")
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

WORDS = ["a", "dog", "cat", "on", "the", "red", "ball", "runs", "near", "two", "of", "man"]
Captions = list[list[str]]


def random_captions(seed: int, num: int = 40) -> tuple[Captions, list[Captions]]:
    """Candidates, and one to five references each, that share many n-grams."""
    rng = random.Random(seed)

    def sentence(least: int) -> list[str]:
        return [rng.choice(WORDS) for _ in range(rng.randint(least, 12))]

    references = [[sentence(1) for _ in range(rng.randint(1, 5))] for _ in range(num)]
    candidates = []
    for image in references:
        words = list(rng.choice(image))
        for _ in range(rng.randint(0, 2)):
            words.insert(rng.randint(0, len(words)), rng.choice(WORDS))
        candidates.append(words if rng.random() < 0.8 else sentence(1))
    return candidates, references


def coco_captions(folder: Path) -> tuple[Captions, list[Captions]]:
    """One caption of each photograph as the candidate, the others as references."""
    by_image = captions_by_image(folder)
    images = [[tokenise(text) for text in texts] for texts in by_image.values()]
    return [image[0] for image in images], [image[1:] for image in images]


def captions_by_image(folder: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in sorted((folder / "annotations").glob("captions_*.json")):
        for annotation in json.loads(path.read_text())["annotations"]:
            found.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return found


@pytest.fixture(params=[0, 1, 2, "photographs"])
def captions(request: pytest.FixtureRequest) -> tuple[Captions, list[Captions]]:
    if request.param == "photographs":
        return coco_captions(request.getfixturevalue("coco_mini"))
    return random_captions(request.param)


def as_theirs(captions: tuple[Captions, list[Captions]]) -> tuple[dict, dict]:
    candidates, references = captions
    texts = {n: [" ".join(r) for r in image] for n, image in enumerate(references)}
    return texts, {n: [" ".join(tokens)] for n, tokens in enumerate(candidates)}


def test_cider_equals_the_reference(captions: tuple[Captions, list[Captions]]) -> None:
    mean, each = Cider().compute_score(*as_theirs(captions))
    ours = cider_d(*captions)
    assert ours == pytest.approx(list(each), rel=1e-9, abs=1e-12)
    assert sum(ours) / len(ours) == pytest.approx(float(mean))


def test_bleu_equals_the_reference(captions: tuple[Captions, list[Captions]]) -> None:
    theirs, _ = Bleu(4).compute_score(*as_theirs(captions), verbose=0)
    assert bleu_4(*captions) == pytest.approx(theirs[3], rel=1e-6)


def test_rouge_equals_the_reference(captions: tuple[Captions, list[Captions]]) -> None:
    _, each = Rouge().compute_score(*as_theirs(captions))
    ours = [rouge_l(tokens, image) for tokens, image in zip(*captions, strict=True)]
    assert ours == pytest.approx(list(each))


@pytest.mark.skipif(shutil.which("java") is None, reason="the reference's tokeniser needs Java")
def test_tokens_of_cocos_captions_equal_the_references(coco_mini: Path) -> None:
    texts = [text for image in captions_by_image(coco_mini).values() for text in image]
    texts += ["They can't, it's 5:30 p.m.!", 'The dogs\' T-shirt (black/white) -- "XL" & 3,000']
    reference: Callable[..., dict[int, list[str]]] = PTBTokenizer().tokenize
    expected = reference({n: [{"caption": text}] for n, text in enumerate(texts)})
    assert len(texts) > 700
    for number, text in enumerate(texts):
        assert " ".join(tokenise(text)) == expected[number][0], text
