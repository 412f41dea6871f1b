"""Small causal models built from their configurations, and LoRA adapters on them, for APO's tests."""

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

IDS = torch.tensor([[2, 5, 9, 4], [3, 3, 8, 15]])


def causal(kind="llama", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            ids = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0)
            return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=16, n_layer=2, n_head=2, **ids))
        size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        ids = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=32, **size, **ids))


def with_adapter(seed=0, model=None, **options):
    given = dict(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(
            model or causal(seed=seed), peft.LoraConfig(task_type="CAUSAL_LM", **{**given, **options})
        )


def trained(model, seed, by=0.1):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=by)
    return model


def deltas(model):
    """The changes of the weights that the active adapter makes, in float64."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            product = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            found[name] = product.detach() * module.scaling["default"]
    return found


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
