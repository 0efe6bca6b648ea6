"""PairLogps keeps sums and counts together."""

import torch

from prefpipe.logps import PairLogps


def test_per_token_divides_by_the_tokens_summed():
    logps = PairLogps(torch.tensor([-6.0]), torch.tensor([-4.0]), torch.tensor([4]), torch.tensor([2]))
    chosen, rejected = logps.per_token()
    assert (chosen.item(), rejected.item()) == (-1.5, -2.0)
