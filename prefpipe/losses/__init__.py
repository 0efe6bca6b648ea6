"""Losses as pure functions of log-probabilities. To add one: a class in a module here and conf/loss/<name>.yaml.

A PairLoss (a BetaLoss, if it has a beta) defines `compare` and gets an NLL term; a Loss defines `__call__` itself.

In the formulas, l is a completion's log-probability under the policy, summed over its tokens, r the same under the
reference, n the number of its tokens, a = l / n, h = l - r; _w marks the chosen, _l the rejected completion, and
D = h_w - h_l. s is the score that came with a completion. sigma is the logistic function and ls(x) = -log sigma(x).
"""

import importlib
import pkgutil

from prefpipe.components import COMPONENTS
from prefpipe.losses.base import BetaLoss, Loss, LossOutput, PairLoss, PairScores

__all__ = ["BetaLoss", "Loss", "LossOutput", "PairLoss", "PairScores"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# Every loss is offered here by its class name too: `from prefpipe.losses import DPO`.
globals().update({cls.__name__: cls for cls in COMPONENTS["loss"].values()})
