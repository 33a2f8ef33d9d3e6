"""Every door a model comes in by, offline."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from sartor.errors import UserError
from sartor.model import resolve
from sartor.model.load import load


def test_a_hub_id_is_fetched_and_named_in_its_adapter(tiny_folder: Path, monkeypatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(resolve, "snapshot_download", lambda name, **_: asked.append(name) or str(tiny_folder))
    model = load("org/model", "float32", lora_r=2)
    assert asked == ["org/model"]
    assert model.path == tiny_folder
    model.save(tmp_path / "adapter")
    assert '"base_model_name_or_path": "org/model"' in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_an_unreachable_hub_is_one_line(monkeypatch) -> None:
    def offline(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(resolve, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"model 'org/model': no such folder .* the Hub cannot be reached"):
        load("org/model")


def test_gguf(tmp_path: Path) -> None:
    """A small GGUF written by the format's own library loads as the model that it was written from."""
    gguf = pytest.importorskip("gguf")
    source = tiny_model("llama")
    config = source.core.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(word for word, _ in words[:-1]), "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in source.core.state_dict().items():
        theirs = name.replace("model.layers", "blk")
        for ours, other in names.items():
            theirs = theirs.replace(ours, other)
        values = tensor.clone()
        if "attn_q" in theirs or "attn_k" in theirs:  # GGUF keeps rotary pairs side by side
            heads = config.num_attention_heads if "attn_q" in theirs else config.num_key_value_heads
            values = values.view(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(theirs, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = load(str(tmp_path / "tiny.gguf"), "float32")
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        torch.testing.assert_close(model.core(ids).logits, source.core(ids).logits, atol=1e-5, rtol=1e-5)
    assert model.needs_base
    model.save(tmp_path / "folder")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "folder") is not None


def test_the_templates_own_end_of_turn_ends_a_completion(tmp_path: Path) -> None:
    model = tiny_model()
    model.tokenizer.eos_token = "<|user|>"  # as a base model whose EOS is not what its template closes turns with
    model.core.generation_config.eos_token_id = None
    assert model.end_tokens == set(model.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"]))


def test_a_stand_in_template_is_not_taken_for_the_models_own(tmp_path: Path) -> None:
    """A run saves what it trained; the next stage has to read plain strings as this one did."""
    own = tiny_model()
    own.tokenizer.chat_template = None
    own.has_template = False
    own.save(tmp_path / "base")
    first = load(str(tmp_path / "base"))
    assert not first.has_template
    assert first.tokenizer.chat_template  # conversations can be rendered all the same
    first.save(tmp_path / "trained")
    assert first.tokenizer.chat_template
    assert not load(str(tmp_path / "trained")).has_template
