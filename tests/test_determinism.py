"""The settings are set, read back as set, and restored: nested, after an exception, and whatever they were before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from cp_debug.backends.determinism import deterministic, read_settings


@pytest.mark.parametrize("general", ["none", "tf32", "ieee"])
def test_everything_is_restored_even_after_an_exception(general: str) -> None:
    torch.backends.fp32_precision = general
    try:
        before, state = read_settings(), torch.random.get_rng_state()
        with pytest.raises(RuntimeError, match="shape"), deterministic(tf32=general != "tf32"):
            torch.rand(3).reshape(2)
        assert read_settings() == before
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.slow
def test_what_followed_the_general_setting_still_does() -> None:
    # In a process of its own: some of torch's own code writes cuDNN's setting, which then follows no more.
    script = """
import sys, torch
from cp_debug.backends.determinism import deterministic
def show():
    for general in ("ieee", "tf32", "none"):
        torch.backends.fp32_precision = general
        print(torch.backends.cudnn.conv.fp32_precision, torch.backends.mkldnn.conv.fp32_precision)
    print(torch.backends.cudnn.allow_tf32)
show()
for general in ("ieee", "tf32", "none"):
    torch.backends.fp32_precision = general
    for tf32 in (False, True):
        with deterministic(tf32=tf32):
            pass
print("then")
show()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, _, after = done.stdout.partition("then\n")
    assert before == after != ""


def test_settings_are_read_back_from_torch() -> None:
    with deterministic() as settings:
        assert {k: v for k, v in settings.items() if k != "seed"} == read_settings()
        assert settings["backends.cudnn.conv.fp32_precision"] == "ieee"
        assert settings["backends.cuda.matmul.fp32_precision"] == "ieee"
        assert settings["backends.cudnn.benchmark"] is False
        assert settings["deterministic_algorithms"] is True
        assert settings["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.is_grad_enabled()
    assert json.loads(json.dumps(settings)) == settings


def test_nested_use_follows_the_inner_one() -> None:
    with deterministic() as outer:
        with deterministic(tf32=True) as inner:
            assert inner["backends.cudnn.conv.fp32_precision"] == "tf32"
            assert inner["backends.mkldnn.conv.fp32_precision"] == "ieee"
        assert {k: v for k, v in outer.items() if k != "seed"} == read_settings()


def test_the_seed_decides_what_is_random() -> None:
    draws = []
    for seed in (1, 1, 2):
        with deterministic(seed=seed):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.slow
def test_the_compiler_is_only_imported_where_something_is_compiled() -> None:
    """Importing it takes 1.7 s; where it is loaded, compiled modules are deterministic, too."""
    script = """
import sys, torch
from cp_debug.backends.determinism import deterministic
with deterministic() as settings:
    print(settings["deterministic_algorithms"], settings["deterministic_algorithms_warn_only"])
print("torch._inductor" in sys.modules, torch.are_deterministic_algorithms_enabled())
import torch._dynamo, torch._inductor.config
with deterministic():
    print(torch._inductor.config.deterministic)
print(torch._inductor.config.deterministic, torch.are_deterministic_algorithms_enabled())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "False", "True", "False", "False"]
