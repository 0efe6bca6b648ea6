"""What identifies a completion in the reference cache: its content, so no order, subset or run makes it another."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 32


def completion_key(prompt_ids: NDArray[np.integer[Any]], completion_ids: NDArray[np.integer[Any]]) -> bytes:
    """What identifies a completion after its prompt: sha256 over the lengths and the token ids of both.

    Args:
        prompt_ids: [P] integers, the prompt as the model sees it, cut or not.
        completion_ids: [C] integers, the completion before its end was cut, so that all cuts share one key.

    Raises:
        TypeError: the ids are not integers.
    """
    prompt, completion = (ids.astype("<i4", casting="same_kind") for ids in (prompt_ids, completion_ids))
    lengths = np.array([len(prompt), len(completion)], dtype="<i8")
    return hashlib.sha256(lengths.tobytes() + prompt.tobytes() + completion.tobytes()).digest()
