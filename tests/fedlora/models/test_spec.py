"""Specs: found wherever the package is, described without weights, refused in a sentence."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

import fedlora
from fedlora.core import package, variables
from fedlora.core.config import build, describe
from fedlora.core.errors import ConfigError, ModelError
from fedlora.models.folder import find_assets
from fedlora.models.modules import kind
from fedlora.models.spec import HuggingFace, ModelSpec, Tiny, TinyGPT2
from simulations.app.compose import load
from tests.fedlora.models.mapped import pages, ranges, use
from tests.fedlora.models.networks import adapter, gpt2, llama, logits, tokenizer

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="mappings need /proc")
CONF = Path(fedlora.__file__).parents[1] / "conf" / "model"
SALUTE = "To the Senate and House of Representatives:"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "little-llama"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(saved, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def test_a_description_agrees_with_the_loaded_model(saved):
    spec = HuggingFace(path=str(saved))
    info, model = spec.describe(), spec.load(CPU)
    assert model.info == info
    assert info.name == "little-llama"
    assert info.parameters == sum(p.numel() for p in llama().parameters())
    assert info.context == 32
    for m in info.modules:
        assert model.layers[m.path].weight.shape == (m.d_out, m.d_in)
    assert torch.equal(logits(model.network), logits(llama().eval()))


def test_conv1d_shapes_are_not_transposed(tmp_path):
    gpt2().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    modules = {m.path: m for m in HuggingFace(path=str(tmp_path)).describe().modules}
    qkv, up = modules["transformer.h.0.attn.c_attn"], modules["transformer.h.0.mlp.c_fc"]
    assert (qkv.d_out, qkv.d_in, qkv.kind) == (48, 16, "attention")
    assert (up.d_out, up.d_in, up.kind) == (64, 16, "mlp")
    assert "lm_head" not in modules


def test_a_split_projection_is_described_and_loaded_alike(tmp_path):
    gpt2().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    whole = HuggingFace(path=str(tmp_path))
    spec = HuggingFace(path=str(tmp_path), split_qkv=True, targets=["q_attn", "v_attn"])
    info, model = spec.describe(), spec.load(CPU)
    assert model.info == info
    c_attn = "transformer.h.{}.attn.c_attn.{}_attn"
    assert [m.path for m in info.modules] == [c_attn.format(i, x) for i in (0, 1) for x in "qv"]
    assert [(m.d_out, m.d_in, m.kind) for m in info.modules] == [(16, 16, "attention")] * 4
    assert info.parameters == whole.describe().parameters
    assert info.fingerprint != whole.describe().fingerprint
    torch.testing.assert_close(
        logits(model.network), logits(whole.load(CPU).network), rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ConfigError, match=r"'q_attn' is the end of no .*c_attn"):
        HuggingFace(path=str(tmp_path), targets=["q_attn"]).describe()
    with pytest.raises(ConfigError, match=r"'c_attn' is the end of no .*q_attn"):
        HuggingFace(path=str(tmp_path), targets=["c_attn"], split_qkv=True).describe()


def test_only_gpt2_has_a_projection_to_split(saved):
    with pytest.raises(ModelError, match=r"split_qkv=true.*'llama'.*\['gpt2'\]"):
        HuggingFace(path=str(saved), split_qkv=True).describe()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.0.self_attn.o_proj", "attention"),
        ("transformer.h.3.attn.c_proj", "attention"),
        ("gpt_neox.layers.1.attention.dense", "attention"),
        ("transformer.h.3.mlp.c_proj", "mlp"),
        ("model.layers.0.mlp.down_proj", "mlp"),
    ],
)
def test_kinds_of_modules(path, expected):
    assert kind(path) == expected


def test_targets_choose_layers_in_model_order(saved):
    chosen = HuggingFace(path=str(saved), targets=["v_proj", "layers.1.self_attn.q_proj"])
    assert [m.path for m in chosen.describe().modules] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens", "proj"])
def test_a_target_that_names_nothing_is_refused_by_name(saved, target):
    with pytest.raises(ConfigError, match=rf"model\.targets: '{target}'.*q_proj"):
        HuggingFace(path=str(saved), targets=[target]).describe()


def test_bfloat16_is_the_type_of_the_base(saved):
    model = HuggingFace(path=str(saved), dtype="bfloat16").load(CPU)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.float32


def test_padding_exists_even_if_the_tokenizer_defines_none(saved):
    assert tokenizer().pad_token is None
    assert HuggingFace(path=str(saved)).tokenizer().pad_token == "w0"


def test_identities_follow_content_not_place(model_folder, saved):
    a, b = HuggingFace(path=str(saved)), HuggingFace(path=str(model_folder))
    assert a.tokenizer_id() == b.tokenizer_id()
    assert a.describe().fingerprint == b.describe().fingerprint
    weights = load_file(model_folder / "model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, model_folder / "model.safetensors")
    assert a.describe().fingerprint != b.describe().fingerprint
    words = model_folder / "tokenizer.json"
    words.write_text(words.read_text().replace("w39", "w40"))
    assert a.tokenizer_id() != b.tokenizer_id()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_incomplete_folder_is_refused_with_what_it_has(model_folder, file):
    (model_folder / file).unlink()
    with pytest.raises(ModelError, match=rf"{model_folder.name} lacks .*it has: .*generation_conf"):
        HuggingFace(path=str(model_folder)).describe()


def test_weights_that_would_be_random_are_refused(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.*would be random"):
        HuggingFace(path=str(model_folder)).load(CPU)


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"BertForMaskedLM.*not a causal"):
        HuggingFace(path=str(tmp_path)).describe()


def test_a_broken_config_is_refused(model_folder):
    (model_folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        HuggingFace(path=str(model_folder)).describe()


@pytest.mark.parametrize("path", ["/no/such/folder", "a/b/c", "./nowhere"])
def test_a_path_that_is_nothing_is_refused(path):
    with pytest.raises(ModelError, match="neither a folder here nor a hub id"):
        HuggingFace(path=path).describe()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "float16"}, r"model\.dtype='float16'.*bfloat16"),
        ({"quantization": "int2"}, r"model\.quantization='int2'.*int4"),
        ({"targets": []}, r"model\.targets"),
        ({"targets": [3]}, r"model\.targets"),
        ({"path": ""}, r"model\.path=''"),
        ({"rank": 8}, "unknown key 'rank'"),
        ({"split_qkv": True, "quantization": "int4"}, r"split_qkv=true .*quantization=none"),
    ],
)
def test_impossible_values_are_refused_by_name(wrong, message):
    node = {"_target_": "fedlora.models.spec.HuggingFace", "path": "x/y"} | wrong
    with pytest.raises(ConfigError, match=message):
        build(node, ModelSpec, "model")


def test_gpt2_comes_from_the_folder_that_the_environment_names(monkeypatch):
    for variable, stem in (("FEDLORA_GPT2", "gpt2"), ("FEDLORA_GPT2_MEDIUM", "gpt2_medium")):
        monkeypatch.delenv(variable, raising=False)
        hub = build(load([f"model={stem}"]).model, ModelSpec, "model")
        assert hub.path == f"openai-community/{stem.replace('_', '-')}"
        monkeypatch.setenv(variable, "/models/mine")
        mine = build(load([f"model={stem}"]).model, ModelSpec, "model")
        assert mine == dataclasses.replace(hub, path="/models/mine")


def test_quantization_says_what_to_install(saved):
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        HuggingFace(path=str(saved), quantization="int8").load(CPU)


def test_every_yaml_builds():
    for file in sorted(CONF.glob("*.yaml")):
        named = ["model.path=some/model"] if file.stem == "hf" else []
        node = load([f"model={file.stem}", *named]).model
        assert isinstance(build(node, ModelSpec, "model"), ModelSpec), file


def test_a_resolved_spec_survives_json_and_another_directory(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(saved.parent)
    spec = HuggingFace(path=saved.name, targets=("q_proj",)).resolved()
    sent = build(json.loads(json.dumps(describe(spec))), ModelSpec, "model")
    assert sent == spec
    monkeypatch.chdir(tmp_path)
    assert sent.folder() == saved


class TestAssets:
    """The bundle that Flower ships has no binaries: they are found where they are."""

    @pytest.fixture
    def bundle(self, monkeypatch, tmp_path) -> Path:
        """A copy of the package without assets, not installed, in a strange directory."""
        monkeypatch.delenv(variables.ASSETS, raising=False)
        monkeypatch.delenv(variables.ROOT, raising=False)
        monkeypatch.setattr(package, "ROOT", tmp_path / "bundle")
        monkeypatch.setattr(package.metadata, "distributions", lambda **_: [])
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        return tmp_path

    def test_nowhere_lists_where_it_looked(self, bundle):
        with pytest.raises(ModelError) as caught:
            find_assets("tiny")
        for place in ("bundle", "elsewhere"):
            assert str(bundle / place / "fedlora/models/assets/tiny") in str(caught.value)

    def test_the_variable_wins(self, bundle, monkeypatch):
        monkeypatch.setenv(variables.ASSETS, str(bundle / "mine"))
        _asset(bundle / "mine" / "tiny")
        _asset(bundle / "bundle/fedlora/models/assets/tiny")
        assert find_assets("tiny") == bundle / "mine" / "tiny"

    def test_the_launchers_word_comes_before_the_bundle(self, bundle, monkeypatch):
        monkeypatch.setenv(variables.ROOT, str(bundle / "checkout"))
        _asset(bundle / "bundle/fedlora/models/assets/tiny")
        assert find_assets("tiny") == bundle / "bundle/fedlora/models/assets/tiny"
        _asset(bundle / "checkout/fedlora/models/assets/tiny")
        assert find_assets("tiny") == bundle / "checkout/fedlora/models/assets/tiny"

    def test_an_editable_install_points_to_its_checkout(self, bundle, monkeypatch):
        checkout = bundle / "a checkout"
        origin = json.dumps({"url": checkout.as_uri(), "dir_info": {"editable": True}})

        class Distribution:
            def read_text(self, name):
                return origin if name == "direct_url.json" else None

            def locate_file(self, path):
                return bundle / "site-packages" / path

        monkeypatch.setattr(package.metadata, "distributions", lambda **_: [Distribution()])
        _asset(bundle / "site-packages/fedlora/models/assets/tiny")
        assert find_assets("tiny") == bundle / "site-packages/fedlora/models/assets/tiny"
        _asset(checkout / "fedlora/models/assets/tiny")
        assert find_assets("tiny") == checkout / "fedlora/models/assets/tiny"

    def test_the_current_directory_comes_last(self, bundle):
        _asset(bundle / "elsewhere/fedlora/models/assets/tiny")
        assert Tiny().resolved().path == str(bundle / "elsewhere/fedlora/models/assets/tiny")


def test_the_shipped_model_loads():
    try:
        find_assets("tiny")
    except ModelError:
        pytest.skip("fedlora/models/assets/tiny is not there")
    spec = Tiny().resolved()
    model = spec.load(CPU)
    assert model.info == spec.describe()
    assert Path(spec.path).is_absolute()
    ids = model.tokenizer(SALUTE, return_tensors="pt")
    loss = model.network(input_ids=ids.input_ids, labels=ids.input_ids).loss
    assert float(loss) < 6, "a random model of 2,048 tokens has 7.6"


@pytest.mark.parametrize("split", [False, True])
def test_the_shipped_gpt2_loads(split):
    try:
        find_assets("tiny_gpt2")
    except ModelError:
        pytest.skip("fedlora/models/assets/tiny_gpt2 is not there")
    targets = ["q_attn", "v_attn"] if split else ["c_attn"]
    spec = TinyGPT2(targets=targets, split_qkv=split).resolved()
    model = spec.load(CPU)
    assert model.info == spec.describe()
    assert len(model.info.modules) == len(targets) * model.network.config.n_layer
    assert spec.tokenizer_id() == Tiny().tokenizer_id(), "they share what is cached of tokens"
    ids = model.tokenizer(SALUTE, return_tensors="pt")
    assert torch.equal(ids.input_ids, Tiny().tokenizer()(SALUTE, return_tensors="pt").input_ids)
    loss = model.network(input_ids=ids.input_ids, labels=ids.input_ids).loss
    assert float(loss) < 6, "a random model of 2,048 tokens has 7.6"


@LINUX
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("network", "split"),
    [(llama, False), (gpt2, False), (gpt2, True)],
    ids=["llama", "gpt2", "split"],
)
def test_weights_stay_pages_of_their_file(network, split, dtype, tmp_path):
    """However the model is used; a write is seen by this process alone."""
    network().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model = HuggingFace(path=str(tmp_path), dtype=dtype, split_qkv=split).load(CPU)
    model.mount(adapter(model.info.modules, 2))
    use(model)
    model.unmount()
    mapped = ranges(file)
    for name, p in model.network.named_parameters():
        assert any(low <= p.data_ptr() < high for low, high in mapped), name
    assert pages(file)["Anonymous"] == 0
    shared = {p.data_ptr() for p in model.network.parameters()}
    assert model.network.get_output_embeddings().weight.data_ptr() in shared  # still tied
    stored, whole = load_file(file), file.read_bytes()
    for name, tensor in stored.items():
        found = {n: t for n, t in model.base_state().items() if n.endswith(name)}
        assert all(torch.equal(t, tensor) for t in found.values()) and found
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    assert pages(file)["Anonymous"] > 0
    assert file.read_bytes() == whole


@pytest.mark.slow
@LINUX
def test_two_processes_hold_the_weights_once(tmp_path):
    config = llama().config
    config.update({"hidden_size": 256, "intermediate_size": 1024})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size / 1024
    command = [sys.executable, "-m", "tests.fedlora.models.mapped", str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(2)]

    def ask(worker):
        worker.stdin.write("\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    try:
        for worker in workers:
            ask(worker)  # both have loaded
        for found in map(ask, workers):
            assert found["Rss"] > 0.9 * size
            assert found["Pss"] < 0.6 * size
            assert found["Anonymous"] == 0
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait()
            worker.stdout.close()


def _asset(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
