"""Completions for tests."""

from typing import Any

from prefpipe.records import Completion, ScoredCompletion, completion_id, prompt_id


def completion(text: str, question: str = "What is 2 + 2?", **values: Any) -> Completion:
    messages = values.pop("messages", [{"role": "user", "content": question}])
    prompt = prompt_id(messages)
    return Completion(
        prompt_id=prompt,
        completion_id=completion_id(prompt, text, 0, 0),
        messages=messages,
        source="test",
        text=text,
        **values,
    )


def scored(text: str, **scores: float) -> ScoredCompletion:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    return ScoredCompletion(
        prompt_id=prompt_id(messages),
        completion_id=completion_id(prompt_id(messages), text, 0, 0),
        messages=messages,
        source="test",
        text=text,
        scores={name.replace("__", "."): value for name, value in scores.items()},
    )


def some(count: int = 9) -> list[Completion]:
    """Of varying length; three to a prompt."""
    questions = [f"Tom has {i} apples and buys {i + 1} more. " * (1 + i % 3) for i in range(count)]
    return [
        completion(f"{i} + {i + 1} = {2 * i + 1}\n" * (i % 4 + 1) + f"#### {i}", questions[i // 3])
        for i in range(count)
    ]
