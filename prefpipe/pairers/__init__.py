"""Pairers choose preference pairs among the scored completions of one prompt. Pure functions of a group and a generator
of random numbers. To add one: a class in a module here and conf/pairer/<name>.yaml."""

import importlib
import pkgutil

from prefpipe.components import COMPONENTS
from prefpipe.pairers.base import Demonstrator, Pairer, distinct

__all__ = ["Demonstrator", "Pairer", "distinct"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# Every pairer is offered here by its class name too: `from prefpipe.pairers import BestWorst`.
globals().update({cls.__name__: cls for cls in COMPONENTS["pairer"].values()})
