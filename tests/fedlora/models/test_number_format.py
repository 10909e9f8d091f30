"""``model.dtype=auto`` follows the device, and nothing else."""

from pathlib import Path

import pytest
import torch

from fedlora.models import number_format
from fedlora.models.spec import Tiny
from fedlora.prune.spec import Pruned

FASTER = "and multiplies bfloat16 faster"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Pretends that the processor has these flags, and that it multiplies bfloat16 so much faster
    than float32."""

    def pretend(flags: str, speed: float = 2.0) -> None:
        monkeypatch.setattr(number_format, "speed", lambda: speed)
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} avx2\n", encoding="utf-8")
        monkeypatch.setattr(number_format, "CPUINFO", file)

    return pretend


@pytest.mark.parametrize(
    ("flags", "speed", "dtype", "reason"),
    [
        ("amx_tile amx_bf16 avx512_bf16", 4.0, "bfloat16", f"amx_bf16, {FASTER}"),
        ("avx512f avx512_bf16", 2.0, "bfloat16", f"avx512_bf16, {FASTER}"),
        ("avx512f avx512_bf16", 0.5, "float32", "avx512_bf16, but multiplies bfloat16 no faster"),
        ("avx512f amx_tile", 4.0, "float32", "none of amx_bf16, avx512_bf16"),
    ],
)
def test_processors(processor, flags, speed, dtype, reason):
    processor(flags, speed)
    reason = f"the processor has {reason}"
    assert number_format.number_format(CPU) == (dtype, reason)
    assert Tiny(dtype="auto").settled(CPU).dtype == dtype


def test_a_system_that_does_not_say_computes_in_float32(monkeypatch):
    monkeypatch.setattr(number_format, "CPUINFO", Path("/nowhere/cpuinfo"))
    assert number_format.number_format(CPU)[0] == "float32"


def test_the_speed_is_a_ratio_and_leaves_the_number_of_threads():
    threads = torch.get_num_threads()
    assert 0 < number_format.speed.__wrapped__(size=64, repeats=2) < float("inf")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_accelerators(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert number_format.number_format(GPU)[0] == dtype


def test_a_stated_format_is_kept(processor):
    processor("amx_bf16")
    assert Tiny(dtype="float32").settled(CPU) == Tiny(dtype="float32")


def test_what_is_loaded_without_a_run_follows_the_device_too(processor):
    processor("avx512_bf16")
    assert Tiny(dtype="auto").network(CPU).dtype is torch.bfloat16


def test_a_pruned_base_has_one_format():
    with pytest.raises(ValueError, match=r"model\.dtype=auto: the zeros of a pruned model"):
        Pruned(base=Tiny(), dtype="auto", method="magnitude")
