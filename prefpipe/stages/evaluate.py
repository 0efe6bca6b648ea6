"""checkpoint and held-out data → numbers with confidence intervals."""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.errors import ConfigError, DataError
from prefpipe.generators import Generator, Skipped
from prefpipe.records import Completion, EvalResult, Pair, Prompt, ScoredCompletion, Split
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.tasks import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyUnderTest:
    """A model folder as tasks see it (prefpipe.tasks.Policy)."""

    model: ModelConfig
    folder: Path
    generator: Generator
    training: TrainingConfig
    hardware: HardwareConfig
    seed: int

    def sample(
        self, prompts: Iterable[Prompt], *, num_samples: int, temperature: float, max_new_tokens: int | None = None
    ) -> list[Completion]:
        """Completions in the order of the prompts. Raises DataError where a prompt cannot be answered at all."""
        if not self.generator.samples_policy:
            raise ConfigError(
                f"generator={self.generator.name} does not sample the checkpoint, so its completions would say nothing "
                f"about it; evaluate with generator=hf, in a loop by leaving evaluate out of recipe.before and "
                f"recipe.stages"
            )
        tokens = self.generator.max_new_tokens if max_new_tokens is None else max_new_tokens
        generator = replace(self.generator, num_samples=num_samples, temperature=temperature, max_new_tokens=tokens)
        answers = generator.generate(
            list(prompts), model=self.model, folder=self.folder, hardware=self.hardware, seed=self.seed, round_=-1
        )
        completions = []
        for answer in answers:
            if isinstance(answer, Skipped):
                raise DataError(
                    f"held-out prompt {answer.prompt_id} cannot be answered ({answer.reason}); a score without it "
                    f"would not be comparable, so take it out of the data"
                )
            completions.append(answer)
        return completions

    def pair_logps(self, pairs: list[Pair]) -> list[tuple[float, int, float, int]]:
        """Log-probabilities of each pair, truncated as in training. Raises DataError where a pair cannot be encoded."""
        import torch

        from prefpipe.training.batches import encode
        from prefpipe.training.engine import choose_engine

        device = models.device_of(self.hardware)
        template = models.load_template(self.model, self.folder)
        examples, counts = encode(pairs, template, self.training, pairwise=True, split=Split.heldout)
        if len(examples) < len(pairs):
            log.warning(
                "pair accuracy: %d of %d pairs cannot be encoded: %s", len(pairs) - len(examples), len(pairs), counts
            )
        self.generator.close()  # a GPU may not hold both
        weights = models.load_weights(self.model, self.folder, dtype=torch.float32, device=device).eval()
        engine = choose_engine(self.training, weights, examples, device=device)
        logps = engine.all_logps(weights, examples, self.training)
        columns = (logps.chosen, logps.chosen_tokens, logps.rejected, logps.rejected_tokens)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def pair_rewards(self, pairs: list[Pair]) -> list[tuple[float, float] | None]:
        """Rewards of each pair, truncated as in training; None where its template refuses it."""
        import torch

        from prefpipe.reward_models import load_reward_model
        from prefpipe.training.batches import encode
        from prefpipe.training.rewards import all_rewards, choose_reward_engine

        device = models.device_of(self.hardware)
        self.generator.close()  # a GPU may not hold both
        weights = load_reward_model(self.model, self.folder, dtype=torch.float32, device=device).eval()
        template = models.load_template(self.model, self.folder, rewards=True)
        examples, _ = encode(pairs, template, self.training, pairwise=True, split=Split.heldout)
        engine = choose_reward_engine(self.training, weights, examples, device=device)
        found = all_rewards(engine, weights, examples, self.training)
        rewards: list[tuple[float, float] | None] = [None] * len(pairs)
        for example, chosen, rejected in zip(examples, found.chosen.tolist(), found.rejected.tolist(), strict=True):
            rewards[example.row] = (chosen, rejected)
        return rewards


def evaluate(
    prompts: Sequence[Path],
    pairs: Sequence[Path],
    out: Path,
    *,
    tasks: dict[str, Task],
    model: ModelConfig,
    folder: Path,
    generator: Generator,
    training: TrainingConfig,
    hardware: HardwareConfig,
    seed: int,
    overwrite: bool = False,
) -> None:
    """Measure a model on the held-out prompts and pairs; `out` gets the results, `<out>_samples` what they rest on.

    Held-out data never enters training: the split is a hash of the prompt (prepare), and generate, pair and train leave
    it out.
    """
    if not tasks:
        raise ConfigError("task=[] leaves nothing to evaluate; choose one or more of conf/task, e.g. task=[accuracy]")
    uses = {
        "task": tasks,
        "model": models.model_uses(model, folder),
        "generator": generator,
        "lengths": {"max_tokens": training.max_tokens, "max_prompt_tokens": training.max_prompt_tokens},
        "seed": seed,
    }
    identities = {name: task.identity() for name, task in tasks.items()}
    if any(identities.values()):
        uses["identity"] = identities
    parents = {"prompts": list(prompts), "pairs": list(pairs)}
    samples_out = out.with_name("eval_samples")
    plan = Plan("evaluate", EvalResult.schema, uses=uses, parents=parents)
    with artifacts.draft(out, plan, overwrite=overwrite) as draft, contextlib.closing(generator):
        if draft.is_current:
            return
        heldout = [
            p
            for path in prompts
            for p in artifacts.read(path, Prompt, key="inputs.prompts")
            if p.split == Split.heldout
        ]
        heldout_pairs = [
            p for path in pairs for p in artifacts.read(path, Pair, key="inputs.pairs") if p.split == Split.heldout
        ]
        policy = PolicyUnderTest(model, folder, generator, training, hardware, seed)
        results: list[EvalResult] = []
        samples: list[ScoredCompletion] = []
        for task in tasks.values():
            found, written = task.evaluate(policy, heldout[: task.max_prompts], heldout_pairs[: task.max_prompts])
            results += found
            samples += [replace(sample, meta={**sample.meta, "task": task.name}) for sample in written]
            for result in found:
                log.info("%s %.4f [%.4f, %.4f] n=%d", result.metric, result.value, result.low, result.high, result.n)
        of_samples = Plan("evaluate", ScoredCompletion.schema, uses=uses, parents=parents)
        with artifacts.draft(samples_out, of_samples, overwrite=True) as draft_samples:
            draft_samples.commit_stream(samples)
        draft.commit_stream(results)
