"""What of the Hopper backend can be seen without one: which calls it serves, its table, and its descriptors."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from flashtile import dispatch
from flashtile.backends import hopper
from flashtile.backends.hopper import backward_configs, configs
from flashtile.problem import Call, Problem

SHARED_MEMORY = 227 * 1024

PLAIN = Problem(
    batch=2, q_len=4096, k_len=4096, q_heads=16, kv_heads=4, qk_dim=128, v_dim=128, dtype=torch.bfloat16,
    device="cuda", capability=(9, 0), scale=128**-0.5,
)  # fmt: skip


def test_it_serves_16_bit_calls_on_its_device_before_triton_does() -> None:
    assert hopper.supports(PLAIN) is None
    assert dispatch.choose(PLAIN) == "hopper"
    assert dispatch.choose(replace(PLAIN, dtype=torch.float16, qk_dim=33, v_dim=7)) == "hopper"


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(PLAIN, dtype=torch.float32), "16-bit"),
        (replace(PLAIN, capability=(8, 0)), "9.0 only"),
        (replace(PLAIN, capability=(10, 0)), "9.0 only"),
        (replace(PLAIN, capability=None), "9.0 only"),
        (replace(PLAIN, device="cpu", capability=None), "9.0 only"),
        (replace(PLAIN, qk_dim=256, dropout_p=0.1, softcap=3.0, alibi=True, bias="additive"), "registers"),
    ],
)
def test_what_it_does_not_serve_goes_to_the_next(problem: Problem, reason: str) -> None:
    found = hopper.supports(problem)
    assert found is not None
    assert reason in found
    if problem.device == "cuda":
        assert dispatch.choose(problem) == "triton"
    with pytest.raises(NotImplementedError, match=reason):
        dispatch.choose(problem, "hopper")


@pytest.mark.parametrize(
    ("dim", "causal", "length"), [*product((32, 64, 96, 128, 192, 256), (False, True), (512, 16384))]
)
def test_every_row_fits_shared_memory_and_the_register_file(dim: int, causal: bool, length: int) -> None:
    problem = replace(PLAIN, qk_dim=dim, v_dim=dim, q_len=length, k_len=length, window_right=0 if causal else None)
    config = configs.forward(problem)
    assert config is not None
    width = max(32, 1 << (dim - 1).bit_length())
    tiles = config.query_stages * config.groups * 64 + 2 * config.stages * config.block_n
    tiles += 0 if config.shared else config.groups * 64
    assert tiles * width * 2 + 1024 <= SHARED_MEMORY
    # The default partition, a consumer, has what the others leave of 504 registers, or 512 with three consumers.
    consumer, producer = config.registers
    assert config.groups * consumer + producer <= (512 if config.groups == 3 else 504)


@pytest.mark.parametrize(
    ("dim", "v_dim", "keys", "widths"),
    [(64, 64, 192, (64, 64)), (33, 64, 192, (64, 64)), (128, 128, 128, (128, 128)),
     (128, 64, 128, (128, 64)), (192, 192, 64, (256, 256)), (256, 40, 64, (256, 128))],
)  # fmt: skip
def test_tiles_of_the_backward(dim: int, v_dim: int, keys: int, widths: tuple[int, int]) -> None:
    problem = replace(PLAIN, qk_dim=dim, v_dim=v_dim, window_right=0)
    config = backward_configs.pick(problem)
    assert config.block_n == keys
    assert backward_configs.widths(problem) == widths
    own = keys * sum(widths) + keys * widths[0] * config.rotates
    ring = config.stages * config.block_m * sum(widths)
    scores = 2 * config.groups * 64 * config.block_m
    leaving = 2 * config.slots * 64 * backward_configs.exit_columns(problem)  # float32
    rows = 4 * config.stages * config.block_m
    assert 2 * (own + ring + scores + leaving + rows) + 1024 <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("changes", "launches"),
    [
        ({}, ["values", "keys"]),
        ({"qk_dim": 136, "v_dim": 72, "dtype": torch.float16, "dropout_p": 0.1}, ["values", "keys"]),
        ({"alibi": True, "sinks": True, "deterministic": True, "window_left": 100}, ["values", "keys"]),
        ({"varlen": True, "total_q": 9, "total_k": 9}, ["values", "keys"]),
        ({"table": True}, ["values", "keys"]),
        ({"softcap": 3.0}, ["both"]),
        ({"bias": "boolean", "bias_shape": (1, 1, 1, 4096)}, ["both"]),
        ({"bias": "additive", "bias_shape": (2, 16, 4096, 4096)}, ["both"]),
        ({"qk_dim": 128}, ["both"]),
        ({"qk_dim": 193}, ["both"]),
        ({"v_dim": 64}, ["both"]),
        ({"v_dim": 129}, ["both"]),
    ],
)
def test_dv_of_narrower_values_has_a_launch_of_its_own(changes: dict[str, Any], launches: list[str]) -> None:
    problem = replace(PLAIN, **{"qk_dim": 192, "v_dim": 128, **changes})
    assert [launch.makes for launch in backward_configs.launches(problem)] == launches
    assert {backward_configs.pick(problem, makes=makes).panels for makes in launches} == {launches != ["both"]}
    if launches != ["both"]:
        assert backward_configs.accumulator_columns(problem) == 192
        assert backward_configs.exit_columns(problem) == 64


@pytest.mark.parametrize(("makes", "keys"), [("keys", 128), ("values", 192)])
def test_tiles_of_the_backward_in_two_launches(makes: str, keys: int) -> None:
    problem = replace(PLAIN, qk_dim=192, v_dim=128)
    config = backward_configs.pick(problem, makes=makes)
    assert config.block_n == keys
    assert config.block_m == backward_configs.pick(problem).block_m, "what lies between the kernels is ordered by it"
    tiles = (keys + config.stages * config.block_m) * (192 + 128)  # where no values come to, dV leaves
    rows = 4 * config.stages * config.block_m
    scores_and_leaving = 2 * keys * config.block_m + 2 * config.slots * 64 * 64 if makes == "keys" else 0
    assert 2 * (tiles + rows + scores_and_leaving) + 1024 <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("changes", "rotates"),
    [
        ({}, True),
        ({"window_right": None}, False),
        ({"window_right": None, "varlen": True, "total_q": 9, "total_k": 9}, True),
        ({"window_right": None, "table": True}, True),
        ({"v_dim": 72}, True),
        ({"v_dim": 64}, False),
        ({"qk_dim": 64, "v_dim": 64}, False),
        ({"qk_dim": 256, "v_dim": 256}, False),
    ],
)
def test_keys_and_values_of_short_items_come_in_turns(changes: dict[str, Any], rotates: bool) -> None:
    assert backward_configs.pick(replace(PLAIN, **{"window_right": 0, **changes})).rotates == rotates


def test_a_bias_takes_the_memory_of_the_third_tile() -> None:
    assert not backward_configs.pick(replace(PLAIN, window_right=0), True).rotates


@pytest.mark.parametrize(
    ("dim", "width", "read"),
    [(40, 64, 64), (64, 64, 64), (72, 128, 80), (80, 128, 80), (96, 128, 96), (120, 128, 128), (128, 128, 128),
     (160, 256, 160), (192, 256, 192), (224, 256, 224), (250, 256, 256), (16, 32, 16)],
)  # fmt: skip
def test_products_read_no_more_columns_than_the_head_dim_needs(dim: int, width: int, read: int) -> None:
    from flashtile.backends.hopper import tiles

    pieces = tiles.pieces(configs.columns(dim), width)
    assert sum(size for _, size in pieces) == read >= min(dim, width)
    end = 0
    for start, size in pieces:
        assert start == end and start % 64 == 0, "a piece begins where a line of shared memory does"
        assert size & (size - 1) == 0
        end = start + size


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_a_bias_finds_shared_memory_in_the_backward(dim: int) -> None:
    config = backward_configs.pick(replace(PLAIN, qk_dim=dim, v_dim=dim), True)
    assert config.block_m == backward_configs.pick(replace(PLAIN, qk_dim=dim, v_dim=dim)).block_m == 64
    own = config.block_n * 2 * dim
    ring = config.stages * (64 * 2 * dim + 64 * config.block_n + 4 * 64)
    scores = 2 * config.block_n * 64
    leaving = 2 * config.slots * 64 * min(dim, 64)  # float32
    assert 2 * (own + ring + scores + leaving) + 1024 <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"q_len": 64, "k_len": 64, "qk_dim": 64, "v_dim": 64}, "triton"),
        ({"q_len": 64, "k_len": 65, "qk_dim": 64, "v_dim": 64}, "hopper"),
        ({"q_len": 32, "k_len": 32, "qk_dim": 128, "v_dim": 128}, "hopper"),
    ],
)
def test_calls_of_one_small_tile_go_to_triton(changes: dict[str, int], chosen: str) -> None:
    problem = replace(PLAIN, batch=70000, **changes)
    assert dispatch.choose(problem) == chosen
    assert dispatch.choose(problem, "hopper") == "hopper"
    assert dispatch.choose(replace(problem, capability=(8, 0))) == "triton"


@pytest.mark.parametrize(("batch", "heads", "groups"), [(2, 10, 2), (1, 16, 4), (64, 16, 4), (1, 2, 2)])
def test_few_items_of_256_rows_become_items_of_128(batch: int, heads: int, groups: int) -> None:
    problem = replace(PLAIN, batch=batch, q_heads=heads, kv_heads=heads, qk_dim=64, v_dim=64)
    config = configs.forward(problem)
    assert config is not None and config.groups == groups


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"window_right": 0}, False),
        ({"window_right": 0, "qk_dim": 256, "v_dim": 256}, True),
        ({"qk_dim": 256, "v_dim": 256}, False),
        ({"window_right": 0, "window_left": 100}, True),
        ({"window_right": 0, "window_left": 100, "q_len": 512, "k_len": 512}, False),
        ({"table": True}, True),
        ({"varlen": True, "total_q": 64, "total_k": 64, "q_len": 64, "k_len": 64}, True),
    ],
)
def test_uneven_items_come_from_a_counter(changes: dict[str, Any], expected: bool) -> None:
    from flashtile.backends.hopper import forward_pass

    assert forward_pass.counted(replace(PLAIN, **changes)) is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"k_len": 4096 + 128}, True),
        ({"k_len": 4096 + 64}, False),
        ({"window_right": 128}, True),
        ({"window_right": 1}, False),
        ({"qk_dim": 64, "v_dim": 64, "k_len": 4096 + 64}, True),
        ({"qk_dim": 256, "v_dim": 256, "k_len": 4096 + 64}, True),
        ({"qk_dim": 256, "v_dim": 256, "k_len": 4096 + 32}, False),
    ],
)
def test_the_diagonal_crosses_one_tile_where_it_begins_at_a_tile(changes: dict[str, Any], expected: bool) -> None:
    from flashtile.backends.hopper import forward_pass

    problem = replace(PLAIN, **{"window_right": 0, **changes})
    config = configs.forward(problem)
    assert config is not None
    assert forward_pass._one_tile_on_diagonal(problem, config) is expected


@pytest.mark.parametrize(
    ("changes", "panels"),
    [
        ({}, True),
        ({"window_right": 0}, True),
        ({"qk_dim": 136, "v_dim": 80}, True),
        ({"qk_dim": 193}, False),
        ({"v_dim": 64}, False),
        ({"v_dim": 192}, False),
        ({"softcap": 3.0}, False),
        ({"window_right": 0, "window_left": 100}, False),
    ],
)
def test_wide_keys_with_narrower_values_come_in_panels(changes: dict[str, Any], panels: bool) -> None:
    config = configs.forward(replace(PLAIN, **{"qk_dim": 192, "v_dim": 128, **changes}))
    assert config is not None
    assert config.panels == panels


def test_panels_are_the_way_out() -> None:
    with pytest.raises(ValueError, match="panels: got True without shared"):
        configs.Config(2, 128, 2, (240, 24), panels=True)


@pytest.mark.parametrize(
    ("changes", "ptxas_13", "expected"),
    [
        ({"dtype": torch.bfloat16, "dropout_p": 0.1}, True, "narrow"),
        ({"dtype": torch.float16}, True, "bounded"),
        ({"dtype": torch.float16, "dropout_p": 0.1}, False, "bounded"),
        ({"dtype": torch.float16, "dropout_p": 0.1}, True, "wide"),
        ({"dtype": torch.float16, "dropout_p": 0.1, "qk_dim": 64, "v_dim": 64}, False, "wide"),
    ],
)
def test_products_of_16_bits_where_they_are_safe_and_pay(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ptxas_13: bool, expected: str
) -> None:
    from triton.experimental.gluon import language as gl

    from flashtile.backends.hopper import backward_prologue, dialect

    monkeypatch.setattr(dialect, "PTXAS_13", gl.constexpr(ptxas_13))
    assert backward_prologue.products(replace(PLAIN, **changes)) == expected


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"window_right": 0}, 0),
        ({"window_right": 0, "window_left": 99}, 1),
        ({"dtype": torch.float16}, 0),
        ({"dtype": torch.float16, "window_right": 0}, 0),
    ],
)
def test_weights_take_their_scores_place_where_that_pays(changes: dict[str, Any], pieces: int) -> None:
    config = configs.forward(replace(PLAIN, qk_dim=64, v_dim=64, **changes))
    assert config is not None and config.pieces == pieces


def test_heavier_calls_get_smaller_tiles() -> None:
    plain = configs.forward(PLAIN)
    heavy = configs.forward(replace(PLAIN, bias="additive", bias_shape=(1, 1, 4096, 4096)))
    assert plain is not None and heavy is not None
    assert heavy.block_n < plain.block_n


def test_descriptors_of_dense_and_packed_tensors() -> None:
    from flashtile.backends.hopper import descriptors

    q = torch.empty(2, 300, 3, 40, dtype=torch.float16)
    dense = descriptors.rows(q, 64, 64, varlen=False)
    assert list(dense.block_shape) == [1, 64, 1, 64]
    assert list(dense.shape) == [2, 300, 3, 40]
    packed = descriptors.rows(q.flatten(0, 1), 64, 64, varlen=True)
    assert list(packed.block_shape) == [1, 1, 64, 1, 64]
    # Stepping 2**30 times along the first dimension undoes as many steps along the third, modulo 2**64 bytes.
    first, second, third = packed.strides[:3]
    assert second == third == 120
    assert (first + third) * 2**30 * 2 % 2**64 == 0


@pytest.mark.parametrize("length", [1, 300])
def test_what_tma_cannot_address_is_copied(length: int) -> None:
    from flashtile.backends.hopper import descriptors

    good = torch.randn(2, length, 3, 40).half()
    assert descriptors.aligned(good) is good
    odd = torch.randn(2, length, 3, 33).half()
    for tensor in (
        odd,
        good[..., 1:9],
        good.transpose(-1, -2).contiguous().transpose(-1, -2),
        good[:1].expand(2, -1, -1, -1),
    ):
        copied = descriptors.aligned(tensor)
        assert torch.equal(copied, tensor)
        assert descriptors.fits(copied)
        assert not descriptors.fits(tensor)


BIASED = replace(PLAIN, batch=2, q_len=40, k_len=24, q_heads=3, kv_heads=3, bias="additive", bias_shape=(2, 3, 40, 24))


def bias_call(bias: torch.Tensor) -> Call:
    return Call(q=torch.empty(0), k=None, v=None, bias=bias)


@pytest.mark.parametrize(
    ("bias", "shape"),
    [
        (torch.empty(2, 3, 40, 24).bfloat16(), (2, 3, 40, 24)),
        (torch.empty(3, 40, 24).bfloat16(), (1, 3, 40, 24)),
        (torch.empty(40, 24).bfloat16().expand(2, 3, 40, 24), (1, 1, 40, 24)),
        (torch.empty(2, 1, 40, 24).bfloat16().expand(2, 3, 40, 24), (2, 1, 40, 24)),
        (torch.empty(2, 3, 40, 32).bfloat16()[..., :24], (2, 3, 40, 24)),
    ],
)
def test_a_bias_that_tma_can_address_keeps_its_memory(bias: torch.Tensor, shape: tuple[int, ...]) -> None:
    from flashtile.backends.hopper import bias_tiles

    found = bias_tiles.matrices(BIASED, bias_call(bias))
    assert found is not None
    assert found.shape == shape
    assert found.data_ptr() == bias.data_ptr()
    box = bias_tiles.boxes(found, 64, 64)
    assert list(box.shape) == list(shape)
    assert box.strides[2:] == [bias.stride(-2), 1]
    assert all(stride > 0 and stride % 8 == 0 for stride in box.strides[:3])


@pytest.mark.parametrize(
    "bias",
    [
        torch.empty(2, 3, 40, 24),
        torch.empty(2, 3, 40, 24).bool(),
        torch.empty(2, 3, 1, 24).bfloat16(),
        torch.empty(2, 3, 1, 24).bfloat16().expand(2, 3, 40, 24),
        torch.empty(2, 3, 40, 1).bfloat16(),
        torch.empty(24).bfloat16(),
        torch.empty(2, 3, 40, 25).bfloat16()[..., :24],
        torch.empty(2, 3, 40, 32).bfloat16()[..., 1:25],
    ],
)
def test_other_biases_go_by_pointers(bias: torch.Tensor) -> None:
    from flashtile.backends.hopper import bias_tiles

    assert bias_tiles.matrices(BIASED, bias_call(bias)) is None


def test_a_bias_by_tma_finds_shared_memory() -> None:
    for dim in (64, 128, 256):
        biased = replace(PLAIN, qk_dim=dim, v_dim=dim, bias="additive", bias_shape=(2, 16, 4096, 4096))
        for problem in (biased, replace(biased, window_left=100), replace(biased, varlen=True)):
            config = configs.forward(problem, True)
            if config is not None:
                rows = 64 * config.groups
                tiles = config.query_stages * rows * dim + 2 * config.stages * config.block_n * dim
                tiles += config.stages * config.block_n * rows + (0 if config.shared else rows * dim)
                assert tiles * 2 + 1024 <= SHARED_MEMORY
