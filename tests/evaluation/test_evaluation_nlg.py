"""CIDEr-D, BLEU-4, ROUGE-L and the tokeniser on captions whose scores are known."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.evaluation.nlg import bleu_4, cider_d, rouge_l, tokenise

CAPTIONS = [
    "a man rides a brown horse on the beach",
    "two dogs play with a red ball in the park",
    "a plate of food with rice and green beans",
    "a train stops at an old station at night",
]
TOKENS = [tokenise(text) for text in CAPTIONS]
sentences = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man rides a horse.", "a man rides a horse"),
        ("It's a dog, isn't it?", "it 's a dog is n't it"),
        ("They can't, won't and cannot.", "they ca n't wo n't and can not"),
        ("She\u2019s here \u2013 \u201cnow\u201d", "she 's here \u2013 now"),
        ("a T-shirt; black/white -- striped", "a t-shirt black/white striped"),
        ("at 5:30 p.m. for $2.50", "at 5:30 p.m. for $ 2.50"),
        ("the dogs' bowls ... (two)", "the dogs bowls -lrb- two -rrb-"),
        ("3,000 people & a #1 sign", "3,000 people & a # 1 sign"),
        ("I'm gonna say they've gone, we'll see", "i 'm gon na say they 've gone we 'll see"),
        ("He's at 5 o'clock, ma'am..", "he 's at 5 o'clock ma'am"),
        ("U.S.A. or U.S.A, St. Louis etc.", "u.s.a. or u.s.a st. louis etc."),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_captions_are_split_as_the_treebank_does(text: str, tokens: str) -> None:
    assert " ".join(tokenise(text)) == tokens


@settings(max_examples=50)
@given(st.text("aAbt'.,-?/ \n(5\u2019\u00e9", max_size=30))
def test_every_text_has_lower_case_tokens_without_blanks(text: str) -> None:
    tokens = tokenise(text)
    assert all(token and token == token.lower() and not set(token) & set(" \n") for token in tokens)
    letters = "".join(tokens).replace("-lrb-", "")
    assert letters.count("a") == text.lower().count("a"), "no letter is lost"


def test_a_perfect_caption_has_the_highest_scores() -> None:
    references = [[tokens] for tokens in TOKENS]
    assert cider_d(TOKENS, references) == pytest.approx([10.0] * 4)
    assert bleu_4(TOKENS, references) == pytest.approx(1.0)
    assert [rouge_l(tokens, [tokens]) for tokens in TOKENS] == pytest.approx([1.0] * 4)


def test_a_caption_without_a_common_word_scores_zero() -> None:
    others = [tokenise("purple elephants never dance")] * 4
    references = [[tokens] for tokens in TOKENS]
    assert cider_d(others, references) == [0.0] * 4
    assert bleu_4(others, references) == 0.0
    assert rouge_l(others[0], [TOKENS[0]]) == 0.0


def test_cider_of_known_counts() -> None:
    # "x" is in the references of one of two images: weight log 2. "a" is in both: weight 0.
    references = [[["a", "x"]], [["a", "y"]]]
    first, second = cider_d([["x"], ["a"]], references)
    # The 1-grams agree fully, the three other orders have none; lengths differ by one 2-gram.
    assert first == pytest.approx(10 / 4 * math.exp(-1 / 72))
    assert second == 0.0
    assert cider_d([["a"]], [[["a"]]]) == [0.0], "a single image has no rare n-grams"


def test_cider_punishes_repetition_and_length() -> None:
    references = [[tokens] for tokens in TOKENS]
    perfect, doubled = TOKENS[0], [*TOKENS[0], *TOKENS[0]]
    repeated = cider_d([doubled, *TOKENS[1:]], references)[0]
    assert repeated < 0.5 * cider_d([perfect, *TOKENS[1:]], references)[0]


def test_bleu_of_known_counts() -> None:
    candidate = ["the", "cat", "sat", "on", "the", "mat", "today"]
    reference = ["the", "cat", "sat", "on", "the", "mat"]
    expected = (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    assert bleu_4([candidate], [[reference]]) == pytest.approx(expected)
    # The shorter candidate is perfect but for its brevity.
    brief = bleu_4([reference], [[candidate]])
    assert brief == pytest.approx(math.exp(1 - 7 / 6))


def test_bleu_clips_counts_and_takes_the_closest_length() -> None:
    assert bleu_4([["a", "a", "a", "a", "a"]], [[["a", "a", "b", "c", "d", "e"]]]) == 0.0
    candidate = ["a", "b", "c", "d", "e"]
    references = [
        ["a", "b", "c", "d", "e", "f", "g", "h"],
        ["a", "b", "c", "d", "e", "x"],
        ["a", "b", "c", "d"],
    ]
    # 4 and 6 are equally close to 5: the shorter one counts, so there is no penalty.
    assert bleu_4([candidate], [references]) == pytest.approx(1.0)


def test_rouge_of_known_counts() -> None:
    # The longest common subsequence of 4: precision 4/5, recall 4/6.
    value = rouge_l(["a", "b", "x", "c", "d"], [["a", "b", "c", "d", "e", "f"]])
    precision, recall, beta = 4 / 5, 4 / 6, 1.44
    assert value == pytest.approx((1 + beta) * precision * recall / (recall + beta * precision))
    assert rouge_l([], [["a"]]) == 0.0


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=5
    )
)
def test_scores_are_bounded_and_do_not_depend_on_the_order(
    pairs: list[tuple[list[str], list[list[str]]]],
) -> None:
    candidates, references = [c for c, _ in pairs], [r for _, r in pairs]
    ciders = cider_d(candidates, references)
    assert all(-1e-9 <= value <= 10 + 1e-9 for value in ciders)
    assert cider_d(candidates[::-1], references[::-1]) == pytest.approx(ciders[::-1])
    bleu = bleu_4(candidates, references)
    assert 0 <= bleu <= 1 + 1e-9
    assert bleu_4(candidates[::-1], references[::-1]) == pytest.approx(bleu)
    for candidate, image in pairs:
        assert 0 <= rouge_l(candidate, image) <= 1 + 1e-9
        assert rouge_l(image[0], image) == pytest.approx(1.0)
