"""transformers models of a few thousand random weights, one of each kind of attention, and what goes into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
LENGTH = 17

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 5


@dataclass(frozen=True)
class Model:
    """A model and its inputs; `decoder` models generate, `padded` ones take an attention_mask."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: {"input_ids": tokens()})
    decoder: bool = False
    padded: bool = True


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def padding(side: str, length: int = LENGTH) -> Tensor:
    """The first sequence is five tokens shorter."""
    seen = torch.ones(2, length, dtype=torch.long)
    seen[0, (slice(None, 5) if side == "left" else slice(-5, None))] = 0
    return seen


def _decoder(config: Any, model: Any, **options: Any) -> Model:
    return Model(lambda: model(config(**DECODER, **options)), decoder=True)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=4, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=12,
            max_target_positions=64, num_mel_bins=8, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
            decoder_start_token_id=1, bos_token_id=1, eos_token_id=None, pad_token_id=0, suppress_tokens=[],
            begin_suppress_tokens=[],
        )
    )  # fmt: skip


def _translation() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


def _speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": tokens(7)}


MODELS: dict[str, Model] = {
    "bert": Model(_bert),
    "gpt2": Model(_gpt2, decoder=True),
    "llama": _decoder(transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": _decoder(transformers.MistralConfig, transformers.MistralForCausalLM, sliding_window=WINDOW),
    "gemma2": _decoder(
        transformers.Gemma2Config, transformers.Gemma2ForCausalLM, head_dim=8, query_pre_attn_scalar=8,
        sliding_window=WINDOW, attn_logit_softcapping=2.0,
    ),
    "gpt-oss": _decoder(
        transformers.GptOssConfig, transformers.GptOssForCausalLM, head_dim=8, sliding_window=WINDOW,
        num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "t5": Model(_t5, _translation),
    "vit": Model(_vit, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}, padded=False),
    "whisper": Model(_whisper, _speech, padded=False),
}  # fmt: skip


def make(name: str) -> nn.Module:
    """The model with weights large enough that attention is far from uniform; the same ones every time."""
    torch.manual_seed(5)
    model = MODELS[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    if name == "gpt-oss":
        model.set_experts_implementation("eager")  # the others have no float64
    return model
