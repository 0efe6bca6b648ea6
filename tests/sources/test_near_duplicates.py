"""Near-duplicates and overlaps, against comparing every two texts in a plain loop."""

import random

import pytest

from prefpipe.sources.near_duplicates import Near, NgramOverlap, Sketches
from prefpipe.words import jaccard, ngram_hashes, words

VOCABULARY = [f"w{i}" for i in range(400)]


def shingles(text: str, size: int = 3) -> set[tuple[str, ...]]:
    found = words(text)
    size = min(size, len(found))
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)} if found else set()


def edited(text: str, rng: random.Random, number: int) -> str:
    found = text.split()
    for place in rng.sample(range(len(found)), number):
        found[place] = rng.choice(VOCABULARY)
    return " ".join(found)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """300 texts of 60 words, and 300 edits of them by 0 to 6 words."""
    rng = random.Random(0)
    first = [" ".join(rng.choices(VOCABULARY, k=60)) for _ in range(300)]
    mixed = [*first, *(edited(text, rng, rng.randrange(7)) for text in first)]
    rng.shuffle(mixed)
    return mixed


def near(texts: list[str], threshold: float, **kwargs) -> dict[int, Near]:
    sketches = Sketches()
    for text in texts:
        sketches.add(words(text))
    return sketches.near(threshold, texts.__getitem__, **kwargs)


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_removed_texts_are_near_to_a_kept_one_and_few_are_missed(texts, threshold):
    found = near(texts, threshold)
    sets = [shingles(text) for text in texts]
    kept: list[int] = []
    expected = 0
    for number, mine in enumerate(sets):
        closest = [other for other in kept if jaccard(mine, sets[other]) >= threshold]
        expected += bool(closest)
        if number in found:
            assert found[number].place in closest
            assert found[number].similarity == pytest.approx(jaccard(mine, sets[found[number].place]))
        else:
            kept.append(number)
    assert expected > 100
    assert len(found) > 0.97 * expected


def test_equal_texts_are_always_found_and_texts_without_words_never():
    found = near(["One two three four!", " \n", "one  TWO three four!", "", "五 六 七 八", "五六七八"], 0.9)
    assert found == {2: Near(0, 1.0), 5: Near(4, 1.0)}


def test_fixed_texts_stay_and_the_others_are_compared_with_them_alone():
    same = "a b c d e f g"
    texts = [same, same, same, "h i j k", "h i j k"]
    assert near(texts, 0.9, fixed=2).keys() == {2, 4}
    assert near(texts, 0.9, fixed=2, among=False).keys() == {2}
    assert near(texts, 0.9, without={0, 3}).keys() == {2}


def test_the_first_of_many_equal_texts_stays_without_comparing_all_with_all():
    assert near(["the same words over again"] * 3000, 0.8) == {number: Near(0, 1.0) for number in range(1, 3000)}


def test_ngrams_are_numbers_of_words_in_order():
    found = words("a b c a b c")
    hashes = ngram_hashes(found, 3)
    assert len(hashes) == 4
    assert hashes[0] == hashes[3]
    assert len({*hashes.tolist()}) == 3
    assert ngram_hashes(words("b a"), 2)[0] != ngram_hashes(words("a b"), 2)[0]
    assert len(ngram_hashes(words("a b"), 5)) == 1
    assert len(ngram_hashes([], 5)) == 0


def test_overlap_is_the_share_of_a_test_prompts_runs_of_words():
    """10 words hold 3 runs of 8. A text with 9 of them in a row has 2 of 3, one with 8 has 1 of 3."""
    test = [f"t{i}" for i in range(10)]
    prompts = [(7, test), (8, ["short", "one"]), (9, [])]
    overlap = NgramOverlap(prompts, size=8, share=0.5)
    assert overlap.find(["before", *test, "after"]) == Near(7, 1.0)
    assert overlap.find(["before", *test[:9], "after"]) == Near(7, 2 / 3)
    assert overlap.find(["before", *test[:8], "after"]) is None
    assert NgramOverlap(prompts, size=8, share=0.3).find(test[:8]) == Near(7, 1 / 3)
    assert overlap.find(["short", "one"]) == Near(8, 1.0)
    assert overlap.find(["a", "short", "one"]) is None
    assert overlap.find([]) is None
    assert NgramOverlap([], size=8, share=0.5).find(test) is None


def test_overlap_agrees_with_a_plain_loop():
    rng = random.Random(1)
    tests = [[rng.choice("abcd") for _ in range(rng.randrange(3, 12))] for _ in range(30)]
    overlap = NgramOverlap(enumerate(tests), size=3, share=0.6)
    hits = 0
    for _ in range(300):
        text = [rng.choice("abcd") for _ in range(rng.randrange(3, 30))]
        mine = shingles(" ".join(text))
        shares = {n: len(shingles(" ".join(t)) & mine) / len(shingles(" ".join(t))) for n, t in enumerate(tests)}
        best = max(shares.values())
        found = overlap.find(text)
        assert (found is not None) == (best >= 0.6)
        if found is not None:
            hits += 1
            assert found.similarity == best == shares[found.place]
    assert 20 < hits < 300
