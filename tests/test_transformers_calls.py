"""One layer's call as transformers makes it: arguments, what is refused, what is copied, what it costs; compilers."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from host_time import added_host_time
from oracle import close, gradients, standard
from process import fresh_process
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", minversion="5")

import transformers
from tiny_models import MODELS, make, padding, tokens

import flashtile
from flashtile.integrations.transformers import attention_forward, register
from flashtile.integrations.transformers_masks import attention_mask_for

register()


class Layer(nn.Module):
    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal


def qkv(q_len: int = 5, k_len: int = 7, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As models have them: (batch, seqlen, heads, head_dim) in memory, heads first by strides."""
    shapes = ((batch, q_len, 4, 8), (batch, k_len, 2, 8), (batch, k_len, 2, 6))
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).detach().requires_grad_() for shape in shapes]


def check(tensors: list[Tensor], seen: Tensor | None, options: dict[str, Any], **meant: Any) -> None:
    """Values and gradients of a layer with the options, against the definition with what they mean."""
    out, weights = attention_forward(options.pop("module", Layer()), *tensors, **{"attention_mask": None, **options})
    want, _ = standard(*(t.transpose(1, 2) for t in tensors), seen=seen, **meant)
    assert weights is None
    leaves = [*tensors, *(t for t in meant.values() if isinstance(t, Tensor) and t.requires_grad)]
    close(out, want)
    dout = torch.randn_like(want)
    close(gradients((out,), leaves, [dout]), gradients((want,), leaves, [dout]))


def band(q_len: int, k_len: int, left: int | None, right: int | None) -> Tensor:
    distance = torch.arange(k_len) - torch.arange(q_len)[:, None] - (k_len - q_len)
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    return seen if right is None else seen & (distance <= right)


def test_masks_of_a_layer() -> None:
    full, causal = band(5, 7, None, None), band(5, 7, None, 0)
    check(qkv(), causal, {})
    check(qkv(), causal, {"is_causal": True, "module": Layer(False)})
    check(qkv(), full, {"is_causal": False})
    check(qkv(), full, {"module": Layer(False)})
    check(qkv(), causal, {"module": nn.Identity()})
    check(qkv(), band(5, 7, 2, 0), {"sliding_window": 3})
    check(qkv(), band(5, 7, 2, 2), {"sliding_window": 3, "is_causal": False})
    check(qkv(1, 7), full[:1], {})
    seen = torch.rand(2, 1, 5, 7) > 0.3
    check(qkv(), seen, {"attention_mask": seen})
    check(qkv(), seen, {"attention_mask": seen, "sliding_window": 2})  # it is the whole mask
    added = torch.randn(2, 4, 5, 7, dtype=torch.float64).requires_grad_()
    check(qkv(), full, {"attention_mask": added}, added=added)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_padding_of_two_dimensions(dtype: torch.dtype) -> None:
    keys = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1, 1]])
    check(qkv(), keys.bool()[:, None, None] & band(5, 7, None, 0), {"attention_mask": keys.to(dtype)})
    full = {"attention_mask": keys.to(dtype), "is_causal": False}
    check(qkv(), keys.bool()[:, None, None].expand(-1, -1, 5, -1), full)


def test_changes_of_the_score() -> None:
    causal = band(5, 7, None, 0)
    sinks = torch.randn(4, dtype=torch.float64).requires_grad_()
    check(qkv(), causal, {"s_aux": sinks, "softcap": 3.0, "scaling": 0.7}, sinks=sinks, softcap=3.0, scale=0.7)
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64).requires_grad_()
    check(qkv(), causal, {"position_bias": bias}, added=bias)
    seen = torch.rand(2, 1, 5, 7) > 0.3
    check(qkv(), seen, {"position_bias": bias, "attention_mask": seen}, added=bias)
    matrix = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    bias = bias.detach()
    check(qkv(), None, {"position_bias": bias, "attention_mask": matrix}, added=bias + matrix)
    keys = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1, 1]])
    options = {"position_bias": bias, "attention_mask": keys, "is_causal": False}
    check(qkv(), keys.bool()[:, None, None].expand(-1, -1, 5, -1), options, added=bias)


def test_learned_queries_of_one_batch() -> None:
    query, key, value = qkv()
    query = query.detach()[:1].requires_grad_()
    out, _ = attention_forward(Layer(False), query, key, value, None)
    want, _ = standard(*(t.transpose(1, 2) for t in (query.expand(2, -1, -1, -1), key, value)))
    close(out, want)


def documents(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("given", ["both", "offsets", "tensors"])
def test_packed_sequences(dtype: torch.dtype, given: str) -> None:
    tensors, cu = qkv(12, 12, batch=1), documents(3, 4, 5).to(dtype)
    number = torch.searchsorted(cu[1:], torch.arange(12), right=True)
    same = number[:, None] == number
    lengths: dict[str, Any] = {"cu_seq_lens_q": cu}
    if given != "offsets":
        longest = 5 if given == "both" else torch.tensor(5)
        lengths.update(cu_seq_lens_k=cu, max_length_q=longest, max_length_k=longest)
    check(tensors, same & band(12, 12, None, 0), dict(lengths))
    check(tensors, same, {**lengths, "is_causal": False})
    check(tensors, same & band(12, 12, 1, 0), {**lengths, "sliding_window": 2})
    positions = torch.cat([torch.arange(n) for n in (3, 4, 5)])[None]
    check(tensors, same & band(12, 12, 1, 0), {"position_ids": positions, "sliding_window": 2})
    check(tensors, same, {"position_ids": positions, "is_causal": False})


def test_positions_are_looked_at_again_when_they_change() -> None:
    tensors, positions = qkv(6, 6, batch=1), torch.arange(6)[None].clone()
    check(tensors, band(6, 6, None, 0), {"position_ids": positions})
    positions[0, 3:] -= 3
    halves = torch.arange(6) // 3
    check(tensors, band(6, 6, None, 0) & (halves[:, None] == halves), {"position_ids": positions})
    with torch.inference_mode():
        within = positions.clone()
    check(tensors, band(6, 6, None, 0) & (halves[:, None] == halves), {"position_ids": within})


REFUSED = {
    "output_attentions": ({"output_attentions": True}, "output_attentions: got True, but flashtile never forms"),
    "paged-cache": ({"cache": object()}, "cache: got a paged cache of continuous batching"),
    "unknown": ({"block_indices": torch.zeros(1)}, "block_indices: got Tensor, an argument that .* will not ignore"),
    "integers": ({"attention_mask": torch.ones(2, 1, 5, 7).long()}, "attention_mask: got torch.int64 with shape"),
    "wrong-mask": ({"attention_mask": torch.ones(2, 1, 5, 9).bool()}, "attention_mask or position_bias: got shape"),
    "scaling": ({"scaling": torch.ones(1)}, "scaling: got Tensor, expected a number"),
    "sinks": ({"s_aux": torch.ones(3)}, r"s_aux: got shape \(3,\), expected \(4,\), one logit per query head"),
    "dropout": ({"dropout": 1.5}, "dropout: got 1.5, expected a probability"),
    "longest": (
        {"max_length_q": 2.5, "cu_seq_lens_q": documents(5), "batch": 1},
        "max_length_q: got float, expected an int",
    ),
    "packed-batch": ({"cu_seq_lens_q": documents(5)}, "cu_seq_lens_q: got sequences packed in a batch of 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    options, sentence = dict(REFUSED[name][0]), REFUSED[name][1]
    tensors = qkv(batch=options.pop("batch", 2))
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=sentence):
        attention_forward(Layer(), *tensors, **{"attention_mask": None, **options})


@pytest.mark.parametrize("beside", ["attention_mask", "position_bias"])
def test_matrices_beside_packed_sequences_are_refused(beside: str) -> None:
    options = {"attention_mask": None, beside: torch.ones(1, 1, 7, 7), "cu_seq_lens_q": documents(3, 4)}
    with pytest.raises(NotImplementedError, match=f"{beside}: got one beside cu_seq_lens_q"):
        attention_forward(Layer(), *qkv(7, 7, batch=1), **options)


def test_what_says_nothing_about_attention_is_let_through() -> None:
    tensors = qkv()
    beside = {
        "position_ids": torch.arange(5)[None],
        "use_cache": True,
        "block_indices": None,
        "output_attentions": False,
    }
    out, _ = attention_forward(Layer(), *tensors, None, **beside)
    assert torch.equal(out, attention_forward(Layer(), *tensors, None)[0])


def test_attention_weights_and_foreign_models_are_refused() -> None:
    model = make("llama")
    model.set_attn_implementation("flashtile")
    with pytest.raises((ValueError, NotImplementedError), match="attention"):
        model(tokens(), output_attentions=True)
    config = transformers.GPTJConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    with pytest.raises(ValueError, match="GPTJForCausalLM, whose code does not take its attention"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flashtile")


def test_continuous_batching_is_refused() -> None:
    class Paged:
        def update(self, *arguments: Any, **keywords: Any) -> None: ...

    with pytest.raises(NotImplementedError, match="use 'sdpa' for generate_batch"):
        attention_forward(Layer(), *qkv(), None, cache=Paged())


def test_other_implementations_are_untouched() -> None:
    model = make("llama")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
    with pytest.raises((ValueError, ImportError)):
        transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="flash_attention_2")
    register()
    register()
    again = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="flashtile")
    assert again.config._attn_implementation == "flashtile"


def test_registration_is_for_one_process_and_asked_for() -> None:
    code = """
import transformers, flashtile
config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
try:
    transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flashtile")
except Exception as error:
    print(type(error).__name__, end=" ")
flashtile.integrations.transformers.register()
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flashtile")
print(model.config._attn_implementation)
"""
    first, name = fresh_process(code).split()[-2:]
    assert first.endswith("Error") and name == "flashtile"


def test_an_unknown_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = flashtile.integrations.transformers.transformers
    monkeypatch.setattr(package, "__version__", "4.57.1")
    with pytest.raises(ImportError, match="transformers: got version 4.57.1, expected one like 5.23"):
        register()
    monkeypatch.setattr(package, "__version__", "6.0.0")
    monkeypatch.delattr(package.PreTrainedModel, "_check_and_adjust_attn_implementation")
    with pytest.raises(ImportError, match="got version 6.0.0"):
        register()
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        flashtile.integrations.nowhere  # noqa: B018


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


VIEWS = {"aten.transpose.int", "aten.alias.default", "aten.detach.default", "aten.expand.default", "aten.squeeze.dim",
         "aten.unsqueeze.default", "aten.slice.Tensor", "aten.select.int"}  # fmt: skip


def test_nothing_is_copied_or_allocated_around_the_op() -> None:
    tensors = [t.detach() for t in qkv()]
    with Operations() as seen:
        attention_forward(Layer(), *tensors, None, scaling=0.3, dropout=0.0)
    assert seen.names.count("flashtile.forward.default") == 1
    assert set(seen.names) - {"flashtile.forward.default"} <= VIEWS
    with Operations() as copying:
        attention_forward(Layer(), *(t.contiguous() for t in tensors), None)
    assert not set(copying.names) - {"flashtile.forward.default"} <= VIEWS, "a copy would be seen"


@pytest.mark.parametrize("form", ["causal", "padded", "packed"])
def test_host_time_over_the_native_call(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (t.detach() for t in qkv(4, 4, batch=1, dtype=torch.float32))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = {"scaling": 0.3, "dropout": 0.0, "position_ids": torch.arange(4)[None], "use_cache": True}
    layer, mask = Layer(), None
    native = functools.partial(flashtile.attention, q, k, v, causal=True, scale=0.3)
    if form == "padded":
        mask = attention_mask_for(1, 4, 4, attention_mask=torch.tensor([[0, 1, 1, 1]]).bool())
        assert mask is not None
    if form == "packed":
        offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
        packed = (*(t.squeeze(0) for t in (q, k, v)), offsets, offsets, 3, 3)
        native = functools.partial(flashtile.attention_varlen, *packed, causal=True, scale=0.3)
        options.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=3, max_length_k=3)
    added = added_host_time(monkeypatch, native, lambda: attention_forward(layer, query, key, value, mask, **options))
    assert added <= 15, f"{added:.1f} us"


def test_a_costly_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 4, 4, 8)

    def twice() -> None:
        flashtile.attention(q, q, q, causal=True)
        time.sleep(20e-6)

    assert added_host_time(monkeypatch, lambda: flashtile.attention(q, q, q, causal=True), twice) > 15


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models(name: str) -> None:
    """One graph, the eager results, for a padded batch too; in it masks are matrices, as for PyTorch's attention."""
    torch._dynamo.reset()
    model, inputs = make(name), MODELS[name].inputs()
    if name == "gpt-oss":
        model.set_experts_implementation("grouped_mm")  # the eager ones count tokens, which no graph can
    model.set_attn_implementation("flashtile")
    options = {} if name in ("bert", "vit") else {"use_cache": False}
    for masks in ({}, {"attention_mask": padding("right")}) if MODELS[name].padded else ({},):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got, want = (run(**inputs, **masks, **options).logits for run in (compiled, model))
        seen = masks["attention_mask"].bool() if masks and name != "t5" else slice(None)
        torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)
        leaf = next(p for p in model.parameters() if p.ndim > 1)
        dout = torch.randn_like(want[seen])
        grads = [torch.autograd.grad(t[seen], leaf, dout)[0] for t in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * float(grads[1].abs().max()))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_generation(name: str) -> None:
    """A static cache compiles the steps of generation; the tokens stay eager attention's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = transformers.CompileConfig(backend="aot_eager", fullgraph=False, mode=None)
    options._compile_all_devices = True
    model, results = make(name), []
    for implementation, compiling in (("flashtile", {"compile_config": options}), ("eager", {"disable_compile": True})):
        model.set_attn_implementation(implementation)
        torch.manual_seed(2)
        inputs = {"input_ids": tokens(), "attention_mask": padding("left"), "cache_implementation": "static"}
        results.append(model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8, **compiling))
    assert torch.equal(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_an_exported_block() -> None:
    model = make("llama")
    model.set_attn_implementation("flashtile")
    layer, rotary = model.model.layers[0], model.model.rotary_emb

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rotary = layer, rotary

        def forward(self, hidden: Tensor) -> Tensor:
            positions = torch.arange(hidden.shape[1])[None]
            return self.layer(hidden, position_ids=positions, position_embeddings=self.rotary(hidden, positions))

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Block(), (torch.randn(2, 9, 32),), dynamic_shapes=({1: length},))
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.flashtile.forward.default]
    assert len(nodes) == 1
    longer = torch.randn(2, 21, 32)
    torch.testing.assert_close(program.module()(longer), Block()(longer))


def test_autocast_and_a_gradient_scaler() -> None:
    """Mixed-precision training in float16: losses as with eager attention, every step taken."""
    losses = {}
    for implementation in ("eager", "flashtile"):
        model = make("llama").train()
        model.set_attn_implementation(implementation)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        torch.manual_seed(1)
        batch, losses[implementation] = tokens(), []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(batch, labels=batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[implementation].append(loss.item())
        assert scaler.get_scale() == 256.0, "a step with infinite gradients would have halved it"
    assert losses["flashtile"][-1] < losses["flashtile"][0] - 0.5
    assert losses["flashtile"] == pytest.approx(losses["eager"], rel=5e-3)
