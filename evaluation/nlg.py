"""Scores of captions against reference captions: CIDEr-D, BLEU-4, ROUGE-L, without Java.

The figures are those of pycocoevalcap, which COCO's caption evaluation uses: its scorers are tested
against on random captions, and its tokeniser (Stanford's, in Java) on COCO's captions. The package
itself is 104 MB, and needs Java. `tokenise` follows the Penn Treebank's rules as far as captions
need them; the main trade-off is that rare abbreviations with a full stop lose it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from statistics import fmean

Tokens = Sequence[str]
Ngram = tuple[str, ...]
Ngrams = Counter[Ngram]

MAX_ORDER = 4
PUNCTUATION = frozenset("'`\".?!,:-;")
"""Tokens that COCO's evaluation leaves out, and runs of full stops or hyphens."""
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
"""Typographic quotation marks to plain ones."""
_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,}(?![a-z]) | (?:[a-z]\.)+[a-z]\b   # u.s., p.m., u.s.a
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.(?=\s|$)
    | \d+(?:[.,:/]\d+)+ | \.\d+                         # 2.5, 3,000, 5:30, 1/2
    | n't\b | '(?:s|re|ve|ll|d|m|em)\b | 'n'
    | [^\W_]+?(?=n't\b)
    | [^\W\d_]+'(?!(?:s|re|ve|ll|d|m)\b)[^\W\d_]+        # o'clock
    | [^\W_]+(?:[-_/&.@][^\W_]+)*                       # t-shirt, black/white, at&t
    | \.{2,} | -{2,} | [?!]{2,} | \S
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}


def tokenise(text: str) -> list[str]:
    """Returns the lower-case words of a caption as the Penn Treebank splits them.

    Contractions are split (do n't, it 's), brackets get names, and punctuation is left out.
    """
    found = _TOKEN.findall(text.translate(_QUOTES).lower())
    tokens = chain.from_iterable(_JOINED.get(token, (token,)) for token in found)
    kept = (token for token in tokens if token not in PUNCTUATION and token.strip(".-"))
    return [_BRACKETS.get(token, token) for token in kept]


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Returns CIDEr-D of each candidate, 0 to 10 (Vedantam et al. 2015, 1411.5726, equation 6).

    N-grams are weighted by how few of the images' references have them. The value of an image
    therefore depends on all others, and is 0 if there is only one.
    """
    log_num = math.log(max(len(references), 1))
    weights: dict[Ngram, float] = {}
    for order in range(1, MAX_ORDER + 1):  # one after the other, to save memory
        counts = Counter(
            chain.from_iterable(_ngrams_of_image(image, order) for image in references)
        )
        # An n-gram of a single image weighs as much as one of none, so it need not be kept.
        weights |= {g: log_num - math.log(count) for g, count in counts.items() if count > 1}
    return [
        _cider_of_image(_count(candidate), map(_count, image), weights, log_num)
        for candidate, image in zip(candidates, references, strict=True)
    ]


def _ngrams_of_image(references: Iterable[Tokens], order: int) -> set[Ngram]:
    return {ngram for tokens in references for ngram in _ngrams(tokens, order)}


def _cider_of_image(
    candidate: Ngrams, references: Iterable[Ngrams], weights: Mapping[Ngram, float], rare: float
) -> float:
    own = _Weighted(candidate, weights, rare)
    return 10 * fmean(own.similarity(_Weighted(other, weights, rare)) for other in references)


class _Weighted:
    """The n-grams of a caption, weighted by term and inverse document frequency."""

    def __init__(self, counts: Ngrams, weights: Mapping[Ngram, float], rare: float) -> None:
        self.vectors: list[dict[Ngram, float]] = [{} for _ in range(MAX_ORDER)]
        for ngram, count in counts.items():
            self.vectors[len(ngram) - 1][ngram] = count * weights.get(ngram, rare)
        self.norms = [math.sqrt(sum(x * x for x in v.values())) for v in self.vectors]
        # The reference implementation measures length in 2-grams.
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def similarity(self, other: "_Weighted") -> float:
        """Returns the mean clipped cosine over n = 1 to 4, reduced if the lengths differ."""
        total = 0.0
        for mine, theirs, norm, norm_other in zip(
            self.vectors, other.vectors, self.norms, other.norms, strict=True
        ):
            shared = sum(min(x, theirs[g]) * theirs[g] for g, x in mine.items() if g in theirs)
            total += shared / (norm * norm_other) if norm and norm_other else 0.0
        difference = self.length - other.length
        return total / MAX_ORDER * math.exp(-(difference**2) / (2 * 6.0**2))


def bleu_4(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns BLEU-4 of the whole corpus, 0 to 1 (Papineni et al. 2002).

    Counts are clipped at the highest in any reference; the brevity penalty uses the reference of
    the closest length, the shorter of two. It is 0 if no 4-gram matches.
    """
    right, guessed = [0] * MAX_ORDER, [0] * MAX_ORDER
    length = expected = 0
    for candidate, image in zip(candidates, references, strict=True):
        most = _most([_count(reference) for reference in image])
        for ngram, count in _count(candidate).items():
            right[len(ngram) - 1] += min(count, most[ngram])
            guessed[len(ngram) - 1] += count
        length += len(candidate)
        expected += min(
            (len(reference) for reference in image), key=lambda n: (abs(n - len(candidate)), n)
        )
    if 0 in right:
        return 0.0
    precision = math.exp(
        sum(math.log(r / g) for r, g in zip(right, guessed, strict=True)) / MAX_ORDER
    )
    return precision * math.exp(min(0.0, 1 - expected / length))


def rouge_l(candidate: Tokens, references: Iterable[Tokens]) -> float:
    """Returns ROUGE-L of a candidate, 0 to 1 (Lin 2004): the longest common subsequence.

    Precision and recall are each the highest of any reference; beta is 1.2, as for COCO.
    """
    common = [(_longest_common(candidate, reference), len(reference)) for reference in references]
    precision = max((c / len(candidate) for c, _ in common), default=0.0) if candidate else 0.0
    recall = max((c / num for c, num in common if num), default=0.0)
    if not precision or not recall:
        return 0.0
    beta = 1.2**2
    return (1 + beta) * precision * recall / (recall + beta * precision)


def _longest_common(one: Tokens, other: Tokens) -> int:
    lengths = [0] * (len(other) + 1)
    for token in one:
        diagonal = 0
        for number, candidate in enumerate(other, start=1):
            above = lengths[number]
            longer = max(above, lengths[number - 1])
            lengths[number] = diagonal + 1 if token == candidate else longer
            diagonal = above
    return lengths[-1]


def _count(tokens: Tokens) -> Ngrams:
    """Returns how often each n-gram occurs, for n from 1 to 4."""
    return Counter(chain.from_iterable(_ngrams(tokens, order) for order in range(1, MAX_ORDER + 1)))


def _ngrams(tokens: Tokens, order: int) -> Iterator[Ngram]:
    return (tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def _most(counts: Sequence[Ngrams]) -> Ngrams:
    total: Ngrams = Counter()
    for count in counts:
        total |= count
    return total
