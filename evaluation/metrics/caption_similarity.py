"""Caption similarity: a captioner describes each image, and the reference captions judge that.

It says whether the image shows what its captions tell, in words. CIDEr-D (0 to 10) and BLEU-4 and
ROUGE-L (0 to 1) count common n-grams; the cosine compares meaning. None is readable without its
ceiling: the row `real` has the captioner's figures for the real images, and `/human` those of
people: the first caption of each image against its others. The main trade-off is cost: a captioner
takes longer than all other networks of an evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.captioner import load_captioner
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.metrics.metric import Batch, Context, ImageMetric, NotApplicable, merge
from latent_t2i.evaluation.nlg import bleu_4, cider_d, rouge_l, tokenise
from latent_t2i.evaluation.processes import Group
from latent_t2i.evaluation.sentences import load_sentences

NUM_EXAMPLES = 12
Figures = dict[int, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Described:
    """A caption and the references that judge it."""

    key: str
    caption: str
    references: tuple[str, ...]


class CaptionSimilarity(ImageMetric):
    """Scores of the captioner's descriptions, with the values of each image except for BLEU."""

    name = "caption_similarity"
    needs = frozenset({"captions"})
    rows = ("samples", "real", "reconstruction", "shuffled")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        _refuse_scenes(context.config)
        self._captioner = load_captioner(context)
        self._sentences = load_sentences(context)
        self._described: dict[int, Described] = {}
        self._bleu: dict[str, float] = {}

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        # Reference images may have no captions; samples always have.
        known = [number for number, item in enumerate(batch.items) if item.captions]
        captions = dict(zip(known, self._captioner.describe(batch.images[known]), strict=True))
        described = {
            number: Described(
                key=batch.items[number].key, caption=text, references=batch.items[number].captions
            )
            for number, text in captions.items()
        }
        self._described |= {batch.items[n].position: found for n, found in described.items()}
        cosines = dict(zip(known, self._cosines([*described.values()]), strict=True))
        return [cosines.get(number, {}) for number in range(len(batch.items))]

    def gather(self, group: Group) -> None:
        super().gather(group)
        self._described = merge(group, self._described)
        self._add(self._described, "")
        if self.context.row == "samples":  # the captions are the same in the other rows
            self._add(_human(self._described), "/human")

    def compute(self) -> dict[str, float]:
        return super().compute() | self._bleu

    def identity(self) -> dict[str, str]:
        return self._captioner.identity() | self._sentences.identity()

    def details(self) -> dict[str, Any]:
        """Returns the first descriptions, and how many images have enough captions for `/human`."""
        shown = list(self._described.values())[:NUM_EXAMPLES]
        return {
            "examples": [
                {"image": d.key, "caption": d.caption, "references": list(d.references)}
                for d in shown
            ],
            "num_images": len(self._described),
            "num_human": len(_human(self._described)),
        }

    def _cosines(self, described: Sequence[Described]) -> list[dict[str, float]]:
        """Returns the mean cosine with the references: of the caption, and of the first of them."""
        if not described:
            return []
        texts = [text for d in described for text in (d.caption, *d.references)]
        embeddings = self._sentences.embed(texts)  # (T, D)
        ends = np.cumsum([1 + len(item.references) for item in described])
        values = []
        for own, *others in np.split(embeddings, ends[:-1]):
            cosines = {f"{self.name}/cosine": _mean_cosine(own, others)}
            if self.context.row == "samples" and len(others) > 1:
                cosines[f"{self.name}/cosine/human"] = _mean_cosine(others[0], others[1:])
            values.append(cosines)
        return values

    def _add(self, described: Mapping[int, Described], suffix: str) -> None:
        """Adds the figures that depend on the captions of all images."""
        if not described:
            return
        captions = [tokenise(item.caption) for item in described.values()]
        references = [[tokenise(r) for r in item.references] for item in described.values()]
        ciders = cider_d(captions, references)
        for position, caption, of_image, cider in zip(
            described, captions, references, ciders, strict=True
        ):
            self.values[position] |= {
                f"{self.name}/cider{suffix}": cider,
                f"{self.name}/rouge_l{suffix}": rouge_l(caption, of_image),
            }
        self._bleu[f"{self.name}/bleu_4{suffix}"] = bleu_4(captions, references)


def _mean_cosine(one: NDArray[np.float32], others: Sequence[NDArray[np.float32]]) -> float:
    """Returns the mean cosine of embeddings of length 1."""
    return float(np.mean(np.stack(others) @ one))


def _human(described: Mapping[int, Described]) -> dict[int, Described]:
    """Returns the first caption of each image, judged by its others."""
    return {
        position: Described(key=d.key, caption=d.references[0], references=d.references[1:])
        for position, d in described.items()
        if len(d.references) > 1
    }


def _refuse_scenes(config: EvaluationConfig) -> None:
    if config.oracle and config.images is None:
        raise NotApplicable(
            "--metrics caption_similarity: drawn scenes have the oracle in the captioner's place, "
            "which checks each attribute exactly; expected --no-oracle and --captions"
        )
