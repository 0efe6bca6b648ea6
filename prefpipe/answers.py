"""Final answers out of worked solutions: which number a text ends in, and whether two are the same.

The rules are those in use for GSM8K, which disagree; name one and it is recorded in the manifest.
"""

import re
from fractions import Fraction

from prefpipe.errors import ConfigError

NUMBER = r"\-?[0-9\.\,]+"
RULES: dict[str, tuple[re.Pattern[str], int]] = {
    "last_hash": (re.compile(rf"#+ ({NUMBER})"), -1),
    "first_hash": (re.compile(rf"#### ({NUMBER})"), 0),
    "the_answer_is": (re.compile(r"The answer is (\-?\$?[0-9\.\,]*[0-9]+)\."), 0),
    "last_number": (re.compile(r"(-?[$0-9.,]{2,}|-?[0-9]+)"), -1),
}
"""name → (pattern, which match counts). last_hash: DPO-ST. first_hash: OpenAI's own, and lm-eval's strict-match.
the_answer_is: lm-eval's gsm8k_cot. last_number: lm-eval's flexible-extract."""


def extract(text: str, rule: str) -> str | None:
    """The answer as written, or None where the text has none (which is wrong, never an error)."""
    pattern, which = RULES[rule]
    matches = pattern.findall(text)
    return matches[which] if matches else None


def normalized(answer: str) -> Fraction | None:
    """The number an answer means: 1,200 = 1200 = 1200.0 = $1200 = "1200."; None when it is none."""
    try:
        return Fraction(answer.replace(",", "").replace("$", "").rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None


def final_answer(text: str, rule: str) -> Fraction | None:
    """The number that a solution ends in under a rule."""
    found = extract(text, rule)
    return None if found is None else normalized(found)


def gold_answer(text: str) -> Fraction | None:
    """The number of a reference: after its last "####", or the whole text when it is a number alone."""
    return final_answer(text, "last_hash") if "#" in text else normalized(text.strip())


def check_rule(key: str, rule: str) -> None:
    """Raise ConfigError unless `rule` is known."""
    if rule not in RULES:
        raise ConfigError(f"{key}={rule} must be one of {', '.join(RULES)}")
