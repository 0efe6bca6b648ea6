"""scorer=combined: a weighted sum, by hand."""

import pytest
from completions import completion, scored

from prefpipe.errors import ConfigError, DataError
from prefpipe.scorers import Missing
from prefpipe.scorers.combined import Combined


def test_a_weighted_sum_of_what_is_there(context):
    """1.0 x 1 + 0.1 x -3 = 0.7; and 0.1 x 0.5 = 0.05 more is not made of a score that is missing."""
    rows = [scored("a", exact_answer=1.0, length=-3.0, other=9.0), scored("b", exact_answer=1.0)]
    scorer = Combined(weights={"exact_answer": 1.0, "length": 0.1})
    assert scorer.score(rows, context) == [pytest.approx(0.7), Missing("no_length")]
    negative = Combined(weights={"logprob.perplexity": -2})
    assert negative.score([scored("a", logprob__perplexity=1.5)], context) == [-3.0]


def test_what_cannot_be_meant_is_refused(context):
    with pytest.raises(ConfigError, match=r"scorer\.weights=null names no score"):
        Combined().score([scored("a")], context)
    with pytest.raises(ConfigError, match=r"scorer\.weights\.length=0 must be a number other than 0"):
        Combined(weights={"length": 0})
    with pytest.raises(ConfigError, match=r"scorer\.weights=\[1\] must be a mapping"):
        Combined(weights=[1])
    with pytest.raises(DataError, match=r"has no scores to combine; run stage=score with scorer=length first"):
        Combined(weights={"length": 1.0}).score([completion("a")], context)
