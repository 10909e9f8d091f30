"""Files under docs/ for a deployment: the example of plain Flower, the Compose file, the card."""

import importlib.util
import json

import pytest
import yaml
from flwr.app import Context, RecordDict

from fedlora.core.package import ROOT
from fedlora.models.folder import find_assets
from fedlora.silo.card import read_card
from simulations.app.grid import InProcessGrid
from simulations.cli import COMMANDS

EXAMPLE = ROOT / "docs" / "plain_flower"
COMPOSE = ROOT / "docs" / "silos" / "compose.yaml"


def app_of(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


class Seen(InProcessGrid):
    """Keeps the replies."""

    def pull_messages(self, message_ids):
        found = list(super().pull_messages(message_ids))
        self.replies = [*getattr(self, "replies", []), *found]
        return found


def test_the_example_trains_peft_clients_of_unequal_rank_with_flexlora(tmp_path, capsys):
    ranks, model = [2, 4, 1], str(find_assets("tiny"))
    configs = []
    for i, rank in enumerate(ranks):
        file = tmp_path / f"{i}.jsonl"
        rows = [{"instruction": f"Count to {n}.", "output": "one two three"} for n in range(4 + i)]
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        configs.append({"rank": rank, "model": model, "records": str(file)})
    grid = Seen(app_of("client_app"), 3, configs)
    config = {"model": model, "largest-rank": 4, "rounds": 2}
    app_of("server_app")(grid, Context(1, 1, {}, RecordDict(), config))
    assert not any(reply.has_error() for reply in grid.replies)
    sent = [r for r in grid.replies if r.metadata.message_type == "train"]
    assert len(sent) == 6
    for reply in sent:
        name = next(k for k in reply.content["arrays"] if ".lora_A." in k)
        rank = ranks[reply.metadata.src_node_id - 1]
        assert len(reply.content["arrays"][name].numpy()) == rank
    losses = [r.content["metrics"]["loss"] for r in sent]
    assert sum(losses[3:]) < sum(losses[:3])
    assert "num-examples" in capsys.readouterr().out or losses


def test_the_example_is_short_and_its_client_knows_nothing_of_fedlora():
    sources = [(EXAMPLE / name).read_text() for name in ("client_app.py", "server_app.py")]
    assert sum(len(s.splitlines()) for s in sources) <= 60
    imports = [line for line in sources[0].splitlines() if line.startswith(("import", "from"))]
    assert not any(word in line for line in imports for word in ("fedlora", "strategies"))


def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_the_compose_file_has_three_silos_that_see_their_own_files_alone():
    names = sorted(services().keys() - {"superlink"})
    assert names == ["hospital-a", "hospital-b", "hospital-c"]
    for name in names:
        silo = services()[name]
        mounts = [v.split(":") for v in silo["volumes"]]
        assert all(mode == "ro" for _, _, mode in mounts)
        sources = {source for source, _, _ in mounts}
        assert sources == {"./keys/ca.crt", f"./keys/{name}", f"./{name}"}
        assert silo["read_only"] and silo["cap_drop"] == ["ALL"]
        assert "ports" not in silo, "a silo calls; nobody calls it"


@pytest.mark.parametrize("name", ["superlink", "hospital-a", "hospital-b", "hospital-c"])
def test_the_commands_of_the_compose_file_are_flowers(name):
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    service = services()[name]
    parser = {
        "flower-superlink": _parse_args_run_superlink,
        "flower-supernode": _parse_args_run_supernode,
    }[service["entrypoint"][0]]()
    given = parser.parse_args(service["command"])
    inside = {v.split(":")[1] for v in service["volumes"]}
    for path in (v for v in vars(given).values() if isinstance(v, str) and v.startswith("/keys")):
        assert path in inside


def test_the_card_of_the_documents_can_be_read():
    card = read_card(ROOT / "docs" / "silos" / "hospital-a.yaml")
    assert (card.name, card.attention, card.mlp) == ("hospital-a", 8, 8)
    assert card.records == str(ROOT / "docs" / "silos" / "records.jsonl")


def test_keys_is_a_command():
    assert "keys" in COMMANDS
