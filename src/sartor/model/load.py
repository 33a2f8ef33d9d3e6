"""A causal language model with its tokenizer, ready to train or to sample from."""

import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from sartor.data.chat import end_of_turn, plain_template
from sartor.errors import UserError
from sartor.model.flops import count_flops
from sartor.model.resolve import resolve

# What transformers, PEFT and safetensors raise for files that are damaged, incomplete or of another kind.
UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
FROZEN = ""  # in place of an adapter's name: the weights under all of them
NAMES_AND_VERSIONS = ("_name_or_path", "transformers_version", "dtype", "architectures")


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    ``path`` is what was loaded: a folder, a snapshot of the Hub. ``shares_prompts`` says whether trees may run packed
    (``sartor.model.forward`` checks it on first use); ``own_attention`` what the model ran on when it came;
    ``needs_base`` that no file holds the weights under an adapter, which must then be kept beside it;
    ``has_template`` that the chat template is the tokenizer's own. Several may stand on one network, each with an
    ``adapter`` of its own; ``head`` is a scalar head beside a network that has none.
    """

    network: Any  # PreTrainedModel or PeftModel: both types lack useful annotations
    tokenizer: Any
    name: str
    path: Path = Path()
    shares_prompts: bool | None = None
    needs_base: bool = False
    has_template: bool = True
    adapter: str | None = None
    head: torch.nn.Module | None = None
    own_attention: str = field(init=False)

    def __post_init__(self) -> None:
        self.own_attention = self.core.config._attn_implementation
        count_flops(self.core)

    def __str__(self) -> str:
        kind = "LoRA on frozen weights" if self.is_adapted else "all weights"
        dtype = str(self.core.dtype).removeprefix("torch.")
        return f"{self.name}: {self.parameters / 1e6:.3g}M parameters, {dtype} on {self.device}, training {kind}"

    @property
    def core(self) -> Any:
        """The Hugging Face model itself, with adapter layers inside where there are any."""
        return self.network.get_base_model() if self.is_adapted else self.network

    @property
    def is_adapted(self) -> bool:
        """Whether a trainable LoRA adapter stands on frozen weights."""
        return isinstance(self.network, PeftModel)

    def beside(self, **changes: Any) -> "LanguageModel":
        """Another role on the same network, or the same role on another."""
        other = replace(self, **changes)
        other.own_attention = self.own_attention  # the network may run on ours by now
        return other

    def activate(self) -> None:
        """Have this model's own adapter answer, where several stand on the network; or the frozen weights alone."""
        if self.adapter is None:
            return
        if self.adapter == FROZEN:
            self.network.base_model.disable_adapter_layers()
            return
        self.network.base_model.enable_adapter_layers()
        if self.network.active_adapter != self.adapter:
            self.network.set_adapter(self.adapter)

    @property
    def scalar(self) -> torch.nn.Module:
        """The head that makes a reward or a value of a hidden state."""
        return self.core.score if self.head is None else self.head

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

    @property
    def context(self) -> int | None:
        """Longest sequence that the model has positions for, where its configuration says."""
        return getattr(self.core.config.get_text_config(), "max_position_embeddings", None)

    @property
    def end_tokens(self) -> set[int]:
        """Token ids that end a completion: EOS, the template's end of turn, those of the generation settings."""
        more = getattr(getattr(self.core, "generation_config", None), "eos_token_id", None) or []
        return {self.tokenizer.eos_token_id, end_of_turn(self.tokenizer), *([more] if isinstance(more, int) else more)}

    def reads_as_chat(self, choice: str) -> bool:
        """Whether plain strings become turns: ``always``, ``never``, or ``auto``, with a chat template of its own."""
        return self.has_template if choice == "auto" else choice == "always"

    def save(self, folder: Path) -> None:
        """Write Hugging Face format, or PEFT format for an adapter; both load in transformers and vLLM."""
        only = {"selected_adapters": ["default"]} if self.is_adapted else {}
        stand_in = None if self.has_template else self.tokenizer.chat_template
        with quiet():
            self.network.save_pretrained(folder, **only)
            self.tokenizer.chat_template = None if stand_in else self.tokenizer.chat_template
            self.tokenizer.save_pretrained(folder)
        self.tokenizer.chat_template = stand_in or self.tokenizer.chat_template

    def keep_base_if_needed(self, folder: Path) -> None:
        """Write the frozen weights under an adapter that no file holds, and have the adapter name them as its base."""
        if not (self.is_adapted and self.needs_base):
            return
        if not (folder / "config.json").is_file():
            base = load(str(self.path), str(self.core.dtype).removeprefix("torch."))
            base.save(folder)
        self.network.peft_config["default"].base_model_name_or_path = str(folder.resolve())


def pick_device() -> torch.device:
    """A CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``bfloat16``, ``float32``, or ``auto``: bfloat16 where the hardware multiplies in it, else float32."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load(
    name: str, dtype: str = "auto", lora_r: int = 0, lora_alpha: int | None = None, seed: int = 0
) -> LanguageModel:
    """Load a model for training or sampling; with ``lora_r`` it gets a fresh adapter and frozen weights.

    Dropout is off: the network stays in eval mode throughout, since the log-probs of policy and reference must differ
    by their weights alone.

    Raises:
        UserError: nothing of that name on disk, nor on a Hub that can be reached; or files that do not load.
    """
    path = resolve(name, convert_gguf)
    is_adapter = (path / "adapter_config.json").is_file()
    try:
        with quiet():
            network, tokenizer = _merged(path, dtype) if is_adapter else _plain(path, dtype)
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model {name!r}: {path} is no causal language model that loads: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: its tokenizer has no end-of-sequence token; set eos_token in its files")
    has_template = bool(tokenizer.chat_template)
    tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)
    needs_base = is_adapter or path.suffix == ".gguf"
    if lora_r:
        network = adapt(network, lora_r, 2 * lora_r if lora_alpha is None else lora_alpha, seed)
        name_base(network, name)
    network = network.to(pick_device()).eval()
    return LanguageModel(network, tokenizer, name, path, needs_base=needs_base, has_template=has_template)


def name_base(network: Any, name: str) -> None:
    """Have a fresh adapter name its base by the Hub id, where it has one, and not by this disk's copy."""
    if not Path(name).exists() and name != "smollm2":
        network.peft_config["default"].base_model_name_or_path = name


def load_shape(name: str, dtype: str = "auto") -> LanguageModel:
    """A model without its weights: what plans are made of. A folder needs its ``config.json`` only.

    The network is on the meta device; the tokenizer is None where no file has one.

    Raises:
        UserError: nothing of that name, or a configuration of no causal language model.
    """
    path = resolve(name, convert_gguf, weights=False)
    if (path / "adapter_config.json").is_file():
        return load_shape(str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path), dtype)
    source, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, local_files_only=True, **file)
            network: Any = AutoModelForCausalLM.from_config(config, dtype=pick_dtype(dtype, pick_device()))
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model {name!r}: {path} has no configuration of a causal language model: {reason}") from error
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, **file)
    except UNLOADABLE:
        return LanguageModel(network, None, name, path)
    has_template = bool(tokenizer.chat_template)
    tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)
    return LanguageModel(network, tokenizer, name, path, has_template=has_template)


def _plain(path: Path, dtype: str) -> tuple[Any, Any]:
    source, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    options: dict[str, Any] = {"dtype": pick_dtype(dtype, pick_device()), "local_files_only": True, **file}
    if file:
        options["quantization_config"] = GgufConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    network, found = loaded
    tied = set(getattr(network, "all_tied_weights_keys", None) or {})
    missing = sorted(set(found["missing_keys"]) - tied)
    if missing:  # transformers would fill them with random numbers
        raise UserError(f"{path} lacks {len(missing)} weights of a causal language model, {missing[0]} for one")
    return network, AutoTokenizer.from_pretrained(source, local_files_only=True, **file)


def _merged(path: Path, dtype: str) -> tuple[Any, Any]:
    """An adapter on its base, folded into one set of weights."""
    base = load(str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path), dtype)
    # Merging leaves the weights frozen, as they were under the adapter.
    network = PeftModel.from_pretrained(base.network, str(path)).merge_and_unload().requires_grad_(True)
    own = (path / "tokenizer_config.json").is_file()
    return network, AutoTokenizer.from_pretrained(path, local_files_only=True) if own else base.tokenizer


def adapt(
    network: Any,
    r: int,
    alpha: int,
    seed: int,
    task: str | None = "CAUSAL_LM",
    name: str = "default",
    exclude: list[str] | None = None,
) -> Any:
    """A network with a fresh LoRA adapter on all linear layers but the head, its own weights frozen.

    With the task ``SEQ_CLS``, a reward model's, the head is trained with the adapter and saved with it.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=exclude,
        task_type=task,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Adapters compute in the base's precision; the optimizer keeps an fp32 master of them like of any weight.
        with warnings.catch_warnings():  # PEFT asks transformers for a property under its old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            return get_peft_model(network, config, adapter_name=name, autocast_adapter_dtype=False)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model in Hugging Face format, bf16."""
    load(str(gguf), dtype="bfloat16").save(folder)


def fingerprint(model: LanguageModel) -> str:
    """Hash of what the frozen model computes: its configuration and every weight as loaded, adapters left out."""
    config = model.core.config.to_diff_dict()
    behaviour = {key: value for key, value in config.items() if key not in NAMES_AND_VERSIONS}
    digest = hashlib.blake2b(json.dumps(behaviour, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(model.core.state_dict().items()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or advice from transformers and its kin: Sartor says itself what it loads."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's bar listens to no setting
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
