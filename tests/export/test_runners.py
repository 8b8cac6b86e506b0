"""One exported file, the same 100 greedy tokens everywhere: Python, C++, node, headless Chromium, onnxruntime-genai.

In CI a missing tool is a failure; on a machine of one's own, a skip that says what to install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linearize
from linearize.export.runner import OnnxModel

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT, COUNT = list(range(3, 40)), 100


def need(found, what):
    """Without it: fail in CI, skip elsewhere."""
    if not found and os.environ.get("CI"):
        pytest.fail(f"CI needs {what}")
    if not found:
        pytest.skip(f"needs {what}")


def compiled_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=None,
        initializer_range=0.15,
    )  # fmt: skip
    return linearize.compile(LlamaForCausalLM(config).eval(), "gated-deltanet", tokens=0, progress=False)


@pytest.fixture(scope="module")
def compiled():
    return compiled_model()


@pytest.fixture(scope="module")
def directory(compiled, tmp_path_factory):
    return linearize.export(compiled, tmp_path_factory.mktemp("runners") / "onnx", genai=True)


@pytest.fixture(scope="module")
def expected(compiled):
    tokens = compiled.generate(torch.tensor([PROMPT]), COUNT)[0, len(PROMPT) :].tolist()
    assert len(set(tokens)) > 5
    return tokens


def run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_the_projects_own_runner(directory, expected):
    assert OnnxModel(directory, threads=1).generate([PROMPT], COUNT)[0, len(PROMPT) :].tolist() == expected


def test_python_with_io_binding(directory, expected):
    assert run(sys.executable, EXAMPLES / "python" / "generate.py", directory, COUNT, *PROMPT) == expected


def test_cpp_with_onnxruntimes_c_interface(directory, expected, tmp_path):
    import onnxruntime

    need(shutil.which("g++"), "g++")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*"), None)
    need(library, "an onnxruntime wheel with libonnxruntime.so")
    local = tmp_path / "libonnxruntime.so.1"
    local.symlink_to(library)
    source, program = EXAMPLES / "cpp" / "generate.cpp", tmp_path / "generate"
    run("g++", "-std=c++17", "-O1", "-Wall", "-Werror", source, "-o", program, local, f"-Wl,-rpath,{tmp_path}")
    assert run(program, directory, COUNT, *PROMPT) == expected


def packages():
    """The folder whose node_modules .ci/run filled."""
    folder = os.environ.get("LINEARIZE_NODE", "")
    wanted = "node and LINEARIZE_NODE, a folder with onnxruntime-node, onnxruntime-web and playwright-core from npm"
    need(shutil.which("node") and folder and (Path(folder) / "node_modules" / "onnxruntime-node").is_dir(), wanted)
    return Path(folder)


def test_javascript_in_node(directory, expected):
    modules = packages() / "node_modules"
    script = EXAMPLES / "javascript" / "node.mjs"
    assert run("node", script, directory, COUNT, *PROMPT, NODE_PATH=str(modules)) == expected


def test_the_page_in_headless_chromium(directory, expected):
    folder = packages()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    need(chromium, "chromium")
    script = EXAMPLES / "javascript" / "browser.mjs"
    assert run("node", script, folder, directory, COUNT, *PROMPT, CHROMIUM=chromium) == expected


def test_genais_own_loop(directory, expected):
    import numpy as np
    import onnxruntime_genai as genai

    model = genai.Model(str(directory))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(PROMPT) + COUNT)
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = list(generator.get_sequence(0))[len(PROMPT) :]
    end = expected.index(95) if 95 in expected else COUNT  # without an end token genai is told the last id
    assert end > 20
    assert found[:end] == expected[:end]


# ---- what torch writes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced(compiled, tmp_path_factory):
    return linearize.export(compiled, tmp_path_factory.mktemp("runners") / "ts", format="torchscript")


def continue_in_python(step, compiled, count, first=1):
    """Greedy tokens by a step program of torch alone, the prompt fed `first` tokens at a time."""
    states = [spec.zeros(1) for spec in compiled.state_specs]
    tokens, seen, at = list(PROMPT), 0, 0
    with torch.no_grad():
        while len(tokens) < len(PROMPT) + count:
            piece = tokens[at : at + first] if at < len(PROMPT) else tokens[at:]
            ids = torch.tensor([piece])
            positions = torch.arange(seen, seen + len(piece))[None]
            logits, *states = step(ids, torch.ones_like(ids), positions, *states)
            at, seen = at + len(piece), seen + len(piece)
            if at >= len(PROMPT):
                tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_torchscript_in_python(compiled, traced, expected):
    step = torch.jit.load(str(traced / "step.pt"))
    assert continue_in_python(step, compiled, COUNT) == expected


@pytest.mark.slow
def test_torchscript_in_libtorch(traced, expected, tmp_path):
    need(shutil.which("g++"), "g++")
    folder = Path(torch.__file__).parent
    include, library = folder / "include", folder / "lib"
    api = include / "torch" / "csrc" / "api" / "include"
    source, program = EXAMPLES / "cpp" / "torchscript.cpp", tmp_path / "torchscript"
    flags = [f"-I{include}", f"-I{api}", f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run("g++", "-std=c++20", "-O0", source, "-o", program, *flags)
    assert run(program, traced, COUNT, *PROMPT) == expected


def test_a_pt2_archive_in_python(compiled, expected, tmp_path):
    path = linearize.export(compiled, tmp_path / "pt2", format="pt2")
    step = torch.export.load(path / "model.pt2").module()
    assert continue_in_python(step, compiled, COUNT, first=16) == expected
