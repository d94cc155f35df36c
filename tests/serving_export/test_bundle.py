"""A bundle opens as the model that was exported; one that is missing, unfinished or changed is refused in a line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from data.format.tokenizer import DialogueTokenizer
from model.bundle_files import BundleError
from model.inference.runner import RunnerError, working_bytes
from model.transformer import Transformer
from serving_export import bundle as bundle_module
from serving_export.bundle import MAX_RUNNING, open_bundle
from serving_export.export.__main__ import BUNDLE_FILES, Names, write_bundle
from serving_export.export.manifest import write_manifest


@pytest.fixture
def directory(tmp_path: Path, model: Transformer, tokenizer: DialogueTokenizer) -> Path:
    path = tmp_path / "export"
    path.mkdir()
    write_bundle(path, model, tokenizer, Names(user="Bob", character="Ada"), "float32")
    write_manifest(path, BUNDLE_FILES, model.config, 4, {}, {})
    return path


def test_opens_what_was_exported(directory: Path, model: Transformer, tokenizer: DialogueTokenizer) -> None:
    bundle = open_bundle(directory)
    assert bundle.model.config.layer_kinds == model.config.layer_kinds
    assert bundle.model.config.model_dump(exclude={"layers"}) == model.config.model_dump(exclude={"layers"})
    for name, tensor in model.state_dict().items():
        assert torch.equal(bundle.model.state_dict()[name], tensor)
    assert bundle.tokenizer.model_bytes == tokenizer.model_bytes
    assert (bundle.defaults.user, bundle.defaults.character, bundle.name) == ("Bob", "Ada", str(directory))
    assert (bundle.sampling.temperature, bundle.sampling.top_k, bundle.sampling.top_p) == (1.0, 0, 1.0)
    n_tokens = bundle.engine(cache_mib=1).cache.allocator.n_pages * 16
    assert n_tokens == 2**20 // (16 * model.config.kv_bytes_per_token(4)) * 16
    with pytest.raises(BundleError, match="0 MiB is less than one page"):
        bundle.engine(cache_mib=0)


def test_what_does_not_fit_on_a_gpu_is_refused_with_what_would(
    directory: Path, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    needed = working_bytes(model.config, MAX_RUNNING, model.config.max_length)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed + 5 * 2**20, 80 * 2**30))
    bundle_module._check_cache_fits(model.config, 5 * 2**20, gpu)
    with pytest.raises(BundleError, match=r"0\.00 GiB does not fit on cuda.* of 80\.00 GiB .*is --cache-mib 5$"):
        bundle_module._check_cache_fits(model.config, 5 * 2**20 + 1, gpu)
    n_bytes = (directory / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (n_bytes, 80 * 2**30))
    bundle_module._check_weights_fit(directory, gpu)
    with pytest.raises(BundleError, match="no cache fits"):
        bundle_module._check_cache_fits(model.config, 1, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (n_bytes - 1, 80 * 2**30))
    with pytest.raises(BundleError, match=r"of 80\.00 GiB are free on cuda: .*--device cpu"):
        bundle_module._check_weights_fit(directory, gpu)


@pytest.mark.parametrize(("path", "deterministic"), [("fused", False), ("auto", True)])
def test_a_path_that_the_cpu_does_not_have_is_refused(directory: Path, path: Any, deterministic: bool) -> None:
    bundle = open_bundle(directory, "cpu")
    with pytest.raises(RunnerError, match="fused decoding needs a CUDA device, not cpu"):
        bundle.engine(1, path, deterministic)
    assert "needs a CUDA device" in (bundle.engine(1).runner.why_plain or "")


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "dramatis.json"])
def test_missing_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(directory)


def test_changed_file(directory: Path) -> None:
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.safetensors has changed"):
        open_bundle(directory)


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_process_serves_and_stops_cleanly(directory: Path, number: signal.Signals) -> None:
    process = start("serving_export.server", str(directory), "--port", "0", "--cache-mib", "8")
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if "OpenAI API" in line)
        url = line.split()[2]
        for _ in range(200):
            try:
                health = httpx.get(f"{url.removesuffix('/v1')}/health", trust_env=False)
                break
            except httpx.ConnectError:
                continue
        assert health.json() == {"status": "ok"}
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        answer = httpx.post(f"{url}/chat/completions", json=body, trust_env=False, timeout=60).json()
        assert answer["usage"]["completion_tokens"] <= 4
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "stopped"


def test_server_errors_are_one_line(directory: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        processes = {
            f"cannot listen on 127.0.0.1:{port}": start("serving_export.server", str(directory), "--port", port),
            f"{tmp_path / 'none'} does not exist": start(
                "serving_export.server", str(tmp_path / "none"), "--port", "0"
            ),
        }
        for message, process in processes.items():
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1
            assert message in err
            assert len(err.splitlines()) == 1


def test_chat_through_pipes(directory: Path) -> None:
    process = start("serving_export.chat", str(directory), "--max-tokens", "6", "--seed", "1", "--temperature", "0")
    out, err = process.communicate("hello [b]there[/b]\n/stats\n\n/reset\nhello [b]there[/b]\n/nonsense\n", timeout=120)
    assert (process.returncode, err) == (0, "")
    replies = [line for line in out.split("\n") if line.startswith("Ada:")]
    assert len(replies) == 2
    assert replies[0] == replies[1]
    assert "prompt tokens" in out
    assert "/nonsense" in out


def test_chat_error_is_one_line(tmp_path: Path) -> None:
    process = start("serving_export.chat", str(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "manifest.json does not exist" in err


def test_defaults_come_from_generation_config(directory: Path, model: Transformer) -> None:
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9}))
    write_manifest(directory, BUNDLE_FILES, model.config, 4, {}, {})
    sampling = open_bundle(directory).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 40, 0.9)
