"""`import flash_attn` served by flashtile: by install(), by `flashtile run`, and by the distribution in shims/."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from law import PACKAGE, ROOT
from process import fresh_process

IMPORTABLE = PACKAGE / "integrations" / "flash_attn" / "importable"
SHIM = ROOT / "shims" / "flash-attn"

INSTALLED = """
import importlib.metadata, importlib.util, sys
import flashtile
from flashtile.integrations import flash_attn as ours
assert "flash_attn" not in sys.modules
ours.install()
ours.install()
assert sys.path.count(str(ours.FOLDER)) == 1

import flash_attn, flash_attn_2_cuda
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn import flash_attn_interface, bert_padding
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _get_block_size_n, FlashAttnVarlenFunc
from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward, flash_attn_gpu, round_multiple
from flash_attn.bert_padding import pad_input, unpad_input, index_first_axis
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb_qkv_
from flash_attn.ops.triton.rotary import apply_rotary
assert flash_attn_func is flashtile.flash_attn_func
assert flash_attn_with_kvcache is flash_attn_interface.flash_attn_with_kvcache is flashtile.flash_attn_with_kvcache
assert flash_attn_2_cuda.fwd is flash_attn_gpu.fwd
assert flash_attn.__all__[0] == "__version__" and len(flash_attn.__all__) == 8
assert all(hasattr(flash_attn, name) for name in flash_attn.__all__)
assert importlib.util.find_spec("flash_attn") is not None
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
assert importlib.metadata.version("flash-attn") == flash_attn.__version__ == ours.VERSION
try:
    import flash_attn.losses
except ModuleNotFoundError as error:
    print(error)
"""


def test_install_serves_every_module() -> None:
    assert fresh_process(INSTALLED) == "No module named 'flash_attn.losses'"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A folder on the import path where another flash_attn lies."""
    package = tmp_path / "original" / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.6.0'\n")
    (package / "losses.py").write_text("from flash_attn import __version__ as beside\n")
    return package.parent


def test_what_flashtile_does_not_serve_comes_from_the_original(original: Path) -> None:
    code = (
        "from flashtile.integrations.flash_attn import install; install(); import flash_attn.losses\n"
        "import importlib.metadata; print(flash_attn.losses.beside, flash_attn.SERVED_BY_FLASHTILE)"
    )
    assert fresh_process(code, PYTHONPATH=path_with(original)) == "2.8.4 True"


def test_install_after_the_original_was_imported_is_refused(original: Path) -> None:
    code = (
        "import flash_attn\nfrom flashtile.integrations.flash_attn import install\n"
        "try:\n    install()\nexcept RuntimeError as error:\n    print(error)"
    )
    printed = fresh_process(code, PYTHONPATH=path_with(original))
    assert printed.startswith("flash_attn: got ")
    assert "original" in printed
    assert printed.endswith("expected install() before the first import of it")


def path_with(folder: Path) -> str:
    """An import path with a folder on it, and flashtile as these tests see it."""
    return f"{folder}:{PACKAGE.parent}"


PROGRAM = """
import subprocess, sys
import flash_attn
from beside import word
child = "import flash_attn; print(flash_attn.SERVED_BY_FLASHTILE)"
told = subprocess.run([sys.executable, "-c", child], cwd="/", capture_output=True, text=True, check=True).stdout.strip()
print(__name__, sys.argv[1:], word, flash_attn.SERVED_BY_FLASHTILE, told)
sys.exit(3)
"""
TEST = """
import pytest
import torch
from flash_attn import flash_attn_func

@pytest.mark.parametrize("causal", [False, True])
def test_one_key(causal):
    v = torch.randn(1, 1, 2, 8)
    torch.testing.assert_close(flash_attn_func(v, v, v, causal=causal), v)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's folder with a program, a test, and a flash_attn of its own that must not win."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('not built')\n")
    (tmp_path / "beside.py").write_text("word = 'beside'\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "test_one.py").write_text(TEST)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashtile", "run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("program", [["program.py"], ["-m", "program"]], ids=["script", "module"])
def test_run_is_python_with_flash_attn(project: Path, program: list[str]) -> None:
    done = run(project, *program, "--json", "-m", "x")
    assert done.stdout.strip() == "__main__ ['--json', '-m', 'x'] beside True True", done.stderr
    assert done.returncode == 3


def test_run_runs_tests_of_others(project: Path) -> None:
    done = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_one.py")
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "usage: flashtile run"), (["no.py"], "SCRIPT: got no.py"), (["-m"], "usage")]
)
def test_nothing_to_run(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashtile.cli.app import main

    monkeypatch.setattr(sys, "argv", ["flashtile", "run", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_run_needs_no_package_of_the_command_line(project: Path) -> None:
    code = (
        "import sys; sys.modules['typer'] = sys.modules['rich'] = None\n"
        "from flashtile.cli.app import main\n"
        f"sys.argv = ['flashtile', 'run', {str(project / 'program.py')!r}]\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    print(ended.code)"
    )
    assert fresh_process(code, PYTHONPATH=str(PACKAGE.parent)).splitlines() == ["__main__ [] beside True True", "3"]


def test_the_distribution_has_the_package_s_own_files() -> None:
    for name in ("flash_attn/__init__.py", "flash_attn_2_cuda.py"):
        assert (SHIM / name).read_text() == (IMPORTABLE / name).read_text()


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install ./shims/flash-attn` puts into site-packages."""
    folder = tmp_path_factory.mktemp("shim")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = folder / "flash-attn"
    copy.mkdir()
    for path in SHIM.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".toml", ".md"):
            target = copy / path.relative_to(SHIM)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    subprocess.run([*pip, "-w", str(folder), str(copy)], check=True, capture_output=True, text=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


BY_NAME = """
import importlib.metadata
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
assert importlib.metadata.version("flash-attn") == "2.8.4"
import flash_attn
assert callable(flash_attn.flash_attn_interface._flash_attn_forward)
from flash_attn import flash_attn_varlen_func
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.bert_padding import unpad_input
import flash_attn_2_cuda, flashtile
assert flash_attn_varlen_func is flashtile.flash_attn_varlen_func
print("served")
"""


def test_the_distribution_is_found_by_name(distribution: Path) -> None:
    assert fresh_process(BY_NAME, PYTHONPATH=path_with(distribution)) == "served"


# transformers asks for a CUDA device too; where there is none, it is told that there is.
FOUND = """
import torch
torch.cuda.is_available = lambda: True
from transformers.utils import is_flash_attn_2_available
print(is_flash_attn_2_available())
"""
# A padded batch through a small model, then one more token with its cache: how far two ways are from each other.
MODEL = """
from transformers import MistralConfig, MistralForCausalLM
torch.manual_seed(0)
config = MistralConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=128, sliding_window=8, initializer_range=0.1)
model = MistralForCausalLM(config).bfloat16()
ids, shown = torch.randint(0, 97, (3, 21)), torch.ones(3, 21, dtype=torch.int64)
shown[1, :6] = shown[2, :11] = 0
results = []
for name in ("eager", "flash_attention_2"):
    model.set_attn_implementation(name)
    model.zero_grad()
    first = model(ids, attention_mask=shown, use_cache=True)
    logits = first.logits.float() * shown[..., None]
    logits.square().mean().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.float()
    longer = torch.cat([shown, shown[:, -1:]], 1)
    with torch.no_grad():
        step = model(ids[:, :1], attention_mask=longer, past_key_values=first.past_key_values).logits.float()
    results.append((logits.detach(), gradient.clone(), step))
print(*(float((a - b).norm() / a.norm()) for a, b in zip(*results)))
"""

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@needs_transformers
def test_transformers_finds_the_distribution(distribution: Path) -> None:
    assert fresh_process(FOUND, PYTHONPATH=path_with(distribution)) == "True"


@needs_transformers
def test_transformers_finds_nothing_where_nothing_is() -> None:
    assert fresh_process(FOUND) == "False"


@needs_transformers
def test_a_model_of_transformers_runs_on_it_unchanged() -> None:
    """attn_implementation="flash_attention_2" against "eager" in bfloat16: a window, left padding, a cache."""
    code = "from flashtile.integrations.flash_attn import install; install()" + FOUND + MODEL
    found, numbers = fresh_process(code).splitlines()
    assert found == "True"
    logits, gradient, step = map(float, numbers.split())
    assert logits < 0.02
    assert step < 0.02
    assert gradient < 0.05
