"""A model in a GGUF file is the model that was written there, and can be trained on."""

import json

import gguf
import pytest
import torch
from einops import rearrange

import metagrad as mg
from dpg.build import MODELS
from dpg.metrics import WeightNorm
from dpg.reward import MetagradReward
from dpg.target import Target, load_model

TEXTS = ["The value of the option.", "A list of names."]
# Their names in GGUF, by those of Hugging Face's Llama.
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, model, tokenizer, kind):
    """A Llama and its byte-pair tokenizer in one file, matrices in the quantization `kind`."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # Tied.
            add(writer, name, weight.numpy(), config.num_attention_heads, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer, name, weight, num_heads, kind):
    match name.removeprefix("model.").split("."):
        case ["embed_tokens", _]:
            stored = "token_embd"
        case ["norm", _]:
            stored = "output_norm"
        case ["layers", layer, *part, _]:
            stored = f"blk.{layer}.{BLOCK['.'.join(part)]}"
    if stored.endswith(("attn_q", "attn_k")):  # GGUF rotates neighbouring dimensions, Hugging Face halves of a head.
        weight = rearrange(weight, "(heads half pair) hidden -> (heads pair half) hidden", heads=num_heads, half=2)
    if weight.ndim == 1:
        writer.add_tensor(f"{stored}.weight", weight)
    else:
        writer.add_tensor(f"{stored}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)


@pytest.fixture
def shipped():
    return load_model(str(MODELS / "generator"))


def test_a_gguf_file_is_the_model_written_there(tmp_path, shipped):
    write_gguf(tmp_path / "model.gguf", *shipped, gguf.GGMLQuantizationType.F32)
    model, tokenizer = load_model(str(tmp_path / "model.gguf"))
    wanted = shipped[0].state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    ids = shipped[1](TEXTS)["input_ids"]
    assert tokenizer(TEXTS)["input_ids"] == ids
    assert (tokenizer.eos_token_id, tokenizer.decode(ids[0])) == (shipped[1].eos_token_id, TEXTS[0])
    same = torch.tensor([ids[0]])
    assert torch.equal(model(input_ids=same).logits, shipped[0](input_ids=same).logits)


def test_a_quantised_model_is_trained_on_in_float32(tmp_path, shipped):
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "model.gguf", *shipped, kind)
    model, tokenizer = load_model(str(tmp_path / "model.gguf"), untie=True)
    weight = shipped[0].get_input_embeddings().weight.detach().numpy()
    wanted = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(wanted))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    target = Target(model, tokenizer, mg.optim.adamw(lr=1e-3, eps_root=1e-4), inner_batch_size=2, sequence_length=16)
    rewards = MetagradReward(target, WeightNorm())(TEXTS)
    assert rewards.shape == (2,) and bool(rewards.isfinite().all()) and bool(rewards.any())


def test_a_damaged_gguf_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not much more")
    with pytest.raises(ValueError, match="model.gguf"):
        load_model(str(tmp_path / "model.gguf"))
