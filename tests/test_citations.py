"""Citations of sentences: parsing, rebuilding, and the length balancing of SelfCite."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.citations import balanced, cited, coverage, renumbered, with_citations

NUM_SENTENCES = 60


def answer(*citations: str) -> str:
    return " ".join(f"<statement>s{i}<cite>{cites}</cite></statement>" for i, cites in enumerate(citations))


def test_answers_are_taken_apart_and_rebuilt():
    text = "Said.\n" + answer("[3-5][9-9]", "", "[7-2] [4-4]")
    assert cited(text) == [[(3, 5), (9, 9)], [], [(4, 4)]]
    assert with_citations(text, [[(1, 2)], [], [(8, 8)]]) == "Said.\n" + answer("[1-2]", "", "[8-8]")
    assert renumbered(answer("[3-5]"), lambda place: place * 10) == answer("[30-50]")


def test_balancing_leaves_equal_and_unequal_numbers_of_statements_alone():
    rng = random.Random(0)
    assert balanced(answer("[3-5]"), answer("[3-5]", ""), rng) is None
    same = answer("[3-5]", "", "[1-1][7-9]")
    assert balanced(same, same, rng) == (same, same)


def test_long_ranges_are_cut_and_touching_ones_merged():
    """12 sentences become 6, 11 stay; [20-21][22-25] is one range of 6."""
    found = balanced(
        answer("[0-11]", "[0-10]", "[22-25][20-21]"), answer("[0-5]", "[0-10]", "[20-25]"), random.Random(0)
    )
    assert found == (answer("[0-5]", "[0-10]", "[20-25]"), answer("[0-5]", "[0-10]", "[20-25]"))


def test_fewer_ranges_are_filled_up_with_made_up_ones():
    """chosen cites 3 + 1 sentences in two ranges, rejected 1 in one: a range of 3, 3 to 10 sentences away."""
    seen = set()
    for seed in range(200):
        good, bad = balanced(answer("[20-22][30-30]"), answer("[25-25]"), random.Random(seed))
        assert good == answer("[20-22][30-30]")
        ((*_,),) = (cited(bad)[0],)
        (made,) = set(cited(bad)[0]) - {(25, 25)}
        assert made[1] - made[0] == 2
        distance = 20 - made[1] if made[1] < 20 else made[0] - 30
        assert 3 <= distance <= 10
        seen.add((made[1] < 20, distance))
    assert len(seen) == 16


def test_a_longer_total_is_shortened_before_a_range_is_made_up():
    """chosen 1 + 1, rejected one range of 6: it gives up 5, and one sentence is made up."""
    for seed in range(50):
        _, bad = balanced(answer("[10-10][20-20]"), answer("[40-45]"), random.Random(seed))
        ranges = cited(bad)[0]
        assert len(ranges) == 2
        assert coverage(ranges) == 2
        assert sum(40 <= start <= 45 for start, _ in ranges) == 1


def test_outer_ends_move_and_not_onto_what_chosen_cites():
    """rejected [11-12] can become [10-12] or [11-13] to cite three, but [10-12] is what chosen cites."""
    found = {balanced(answer("[10-12]"), answer("[11-12]"), random.Random(seed))[1] for seed in range(50)}
    assert found == {answer("[11-13]")}
    found = {balanced(answer("[30-32]"), answer("[3-4][7-9]"), random.Random(seed))[1] for seed in range(200)}
    assert found == {answer("[4-4][7-8]"), answer("[3-4][7-7]")}


ranges = st.lists(st.tuples(st.integers(0, NUM_SENTENCES - 1), st.integers(0, 14)), max_size=4).map(
    lambda found: "".join(f"[{start}-{min(start + more, NUM_SENTENCES - 1)}]" for start, more in found)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(ranges, ranges), max_size=3), st.integers(0, 99))
def test_balanced_citations_are_sorted_apart_inside_the_document_and_repeatable(statements, seed):
    chosen, rejected = answer(*(good for good, _ in statements)), answer(*(bad for _, bad in statements))
    found = balanced(chosen, rejected, random.Random(seed), num_sentences=NUM_SENTENCES)
    assert found == balanced(chosen, rejected, random.Random(seed), num_sentences=NUM_SENTENCES)
    for good, bad, (_, before) in zip(cited(found[0]), cited(found[1]), statements, strict=True):
        for side in (good, bad):
            assert all(0 <= start <= end < NUM_SENTENCES for start, end in side)
            assert all(end < start for (_, end), (start, _) in itertools.pairwise(side))
        if good:
            # As many sentences as chosen, but at least one in each range, and inner ranges as they were.
            (merged,) = cited(balanced(answer(before), answer(before), random.Random(0))[0])
            least = coverage(merged[1:-1]) + min(len(merged), 2) + max(0, len(good) - len(merged))
            assert coverage(bad) <= max(coverage(good), least)
            assert len(bad) <= max(len(good), len(merged))
