"""Answers with citations, and other citations for each of their statements."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from prefpipe.citations import CITE, Range, citation_text, cited, with_citation
from prefpipe.components import register
from prefpipe.errors import ConfigError
from prefpipe.generators import Generator, Skipped
from prefpipe.records import Completion, Message, Prompt, completion_id, prompt_id
from prefpipe.sampling import Answers, Ask, Sampling

_WRITTEN = re.compile(r">(.*?)</cite>", re.DOTALL)


@register("sampling")
@dataclass
class CitationBranches(Sampling):
    """Candidates for the best of N citations, SelfCite, Chuang et al. 2025, arXiv:2502.09604, section 3.

    generator.num_samples answers are sampled with the generator's settings. At each `<cite>` of an answer the text up
    to there is gone on with num_branches times, until `</cite>`. Each citation that differs from the answer's own and
    from the ones before it (as ranges, not as text) makes a completion: the answer with that one citation in place of
    its own. So does the answer's own, which SelfCite leaves out, so that nothing worse can replace it. A citation of
    nothing makes none, as it has no reward; nor does a statement without other citations.

    Writes meta.is_original, true for answers. For branches also meta.statement, the number of the <cite>; branch, 0 for
    the answer's own citation; citation and original_citation, what stands in the <cite>; branch_of, the answer's
    completion id. scorer=context_ablation scores a branch by that one statement, and pairer=original_best puts the
    best of each statement together. Their token_ids and logp are empty, as their texts were not sampled as a whole.

    Counts, where an answer is there all the same: citation_unopened and citation_unclosed, for text that is no <cite>
    of at most max_citation_tokens; citation_unreadable, one without a range [a-b]; citation_empty.

    The text goes on behind `<cite`, and the model writes the `>`: tokenizers often make one token of it and what
    follows (`>[`), which no text that ends in `>` could go on with.

    num_branches, temperature, top_p: of the citations; the generator's other settings hold for them, too.
    max_citation_tokens: how long one may be, both marks included.
    """

    name: str = "citation_branches"
    num_branches: int = 10
    temperature: float = 1.2
    top_p: float = 0.9
    max_citation_tokens: int = 24

    def __post_init__(self) -> None:
        for key in ("num_branches", "max_citation_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"sampling.{key}={getattr(self, key)} must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"sampling.temperature={self.temperature} must be at least 0; 0 is greedy")
        if self.temperature == 0 and self.num_branches > 1:
            raise ConfigError(
                f"sampling.temperature=0 with sampling.num_branches={self.num_branches} would write the same citation "
                f"{self.num_branches} times; set num_branches=1 or a temperature above 0"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p} must be in (0, 1]; 1 switches it off")

    def check(self, generator: Generator) -> None:
        super().check(generator)
        if not generator.can_continue:
            raise ConfigError(
                f"sampling={self.name} needs a generator that can go on with a text, and generator={generator.name} "
                f"cannot; use generator=hf"
            )

    def sample(self, prompts: Sequence[Prompt], generator: Generator, ask: Ask, *, seed: int, round_: int) -> Answers:
        answers = list(ask(generator, prompts))
        originals = [answer for answer in answers if isinstance(answer, Completion)]
        # By id: answers of one prompt that begin alike share what follows.
        openings = {opening.prompt_id: opening for answer in originals for opening in _openings(answer)}
        writer = replace(
            generator,
            num_samples=self.num_branches,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_citation_tokens,
        )
        branches: dict[str, list[Completion | Skipped]] = {}
        for branch in ask(writer, list(openings.values())):
            branches.setdefault(branch.prompt_id, []).append(branch)
        # Branches may have the text of their answer, so they are told apart from it, and from each other, by number.
        numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(generator.num_samples))
        for answer in answers:
            if isinstance(answer, Skipped):
                yield answer
            else:
                yield from _branched(answer, branches, numbers[answer.prompt_id])


def _branched(
    answer: Completion, branches: Mapping[str, Sequence[Completion | Skipped]], numbers: Iterator[int]
) -> Answers:
    """An answer, its branches, and what is lacking.

    branches: by the id of what was gone on with. numbers: of the branches, among all completions of the prompt.
    """
    yield replace(answer, meta=answer.meta | {"is_original": True})
    lacking: dict[str, None] = {}
    openings, own = _openings(answer), CITE.findall(answer.text)
    for statement, (opening, ranges) in enumerate(zip(openings, cited(answer.text), strict=True)):
        found: dict[tuple[Range, ...], tuple[str, Completion]] = {}
        for written in branches.get(opening.prompt_id, []):
            candidate = written.reason if isinstance(written, Skipped) else _candidate(written.text)
            if isinstance(candidate, str):
                lacking[candidate] = None
            elif candidate != tuple(ranges):
                assert isinstance(written, Completion)
                found.setdefault(candidate, (citation_text(candidate), written))
        if not found:
            continue
        # The answer's own is branch 0, where it cites anything.
        written_first = [(own[statement], answer)] if ranges else []
        for branch, (citation, source) in enumerate([*written_first, *found.values()], start=0 if ranges else 1):
            text = with_citation(answer.text, statement, citation)
            yield replace(
                answer,
                completion_id=completion_id(answer.prompt_id, text, next(numbers), answer.round),
                text=text,
                token_ids=[],
                logp=None,
                seed=source.seed,
                meta={
                    **answer.meta,
                    "is_original": False,
                    "branch_of": answer.completion_id,
                    "statement": statement,
                    "branch": branch,
                    "citation": citation,
                    "original_citation": own[statement],
                },
            )
    yield from (Skipped(answer.prompt_id, reason) for reason in lacking)


def _openings(answer: Completion) -> list[Prompt]:
    """What is to be gone on with: the prompt, and the answer up to the last character of each `<cite>`."""
    made = []
    for found in CITE.finditer(answer.text):
        begun = Message(role="assistant", content=answer.text[: found.start(1) - 1])
        messages = [*answer.messages, begun]
        made.append(Prompt(prompt_id=prompt_id(messages), messages=messages, source=answer.source, split=answer.split))
    return made


def _candidate(text: str) -> tuple[Range, ...] | str:
    """The ranges of a citation that was gone on with, or the reason why it is none."""
    found = _WRITTEN.match(text)
    if found is None:
        return "citation_unclosed" if text.startswith(">") else "citation_unopened"
    (ranges,) = cited(f"<cite>{found[1]}</cite>")
    return tuple(ranges) or ("citation_unreadable" if found[1].strip() else "citation_empty")
