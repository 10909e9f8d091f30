"""Strategies in Flower's own loop, with clients that know nothing of this project."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.core.errors import RunError
from fedlora.robust.bound import Bound
from fedlora.robust.coordinate import Median, Trimmed
from fedlora.robust.geometric import Geometric
from fedlora.robust.krum import Krum, MultiKrum
from fedlora.robust.rule import NO_RULE
from fedlora.server.plain_flower import PlainFlower, from_arrays, to_arrays
from simulations.app.grid import InProcessGrid
from strategies.alternate import Alternate
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.slora import SLoRA

ALPHA, PATHS = 8.0, ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
SHAPES = dict(zip(PATHS, ((6, 5), (7, 6)), strict=True))
NAME = "base_model.model.{}.lora_{}.weight"
CONFIG = ConfigRecord({"lora_alpha": ALPHA})


def adapter(rank, seed, b=True):
    """Arrays of an adapter, as PEFT would name them."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, (d_out, d_in) in SHAPES.items():
        for part, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            values = rng.normal(size=shape) * (part == "A" or b)
            arrays[NAME.format(path, part)] = Array(values.astype(np.float32))
    return ArrayRecord(arrays)


def app_of(ranks, seen, answer=None):
    """Clients that cut what they are sent to their own rank and answer with their own factors."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        i = int(context.node_config["partition-id"])
        got = message.content["arrays"]
        seen.setdefault(i, []).append({k: v.numpy() for k, v in got.items()})
        assert message.content["config"]["lora_alpha"] == ALPHA
        content = RecordDict(
            {
                "arrays": adapter(ranks[i], seed=100 + i),
                "metrics": MetricRecord({"num-examples": i + 1, "loss": float(i)}),
            }
        )
        if answer is not None:
            content = answer(i, content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        i = int(context.node_config["partition-id"])
        metrics = {"num-examples": i + 1, "sum": float(len(message.content["arrays"]))}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def deltas(arrays):
    return {path: f.delta().double() for path, f in from_arrays(arrays, ALPHA).items()}


def expected(ranks):
    """The mean of the clients' products, weighted by their examples."""
    total = sum(range(1, len(ranks) + 1))
    found = {path: torch.zeros(shape, dtype=torch.float64) for path, shape in SHAPES.items()}
    for i, rank in enumerate(ranks):
        for path, d in deltas(adapter(rank, seed=100 + i)).items():
            found[path] += (i + 1) / total * d
    return found


def test_arrays_come_back_as_they_went():
    arrays = adapter(3, seed=1)
    again = to_arrays(from_arrays(arrays, ALPHA))
    assert list(again) == list(arrays)
    assert all((again[k].numpy() == arrays[k].numpy()).all() for k in arrays)


def test_flexlora_averages_products_of_unequal_ranks():
    ranks, seen = [1, 2, 4], {}
    grid = InProcessGrid(app_of(ranks, seen), nodes=3)
    result = FlexLoRA().start(grid, adapter(5, 0, b=False), num_rounds=2, train_config=CONFIG)
    found, mean = deltas(result.arrays), expected(ranks)
    for path in PATHS:  # rank 5 holds everything that these small layers can be
        u, s, v = torch.linalg.svd(mean[path], full_matrices=False)
        best = u[:, :5] @ torch.diag(s[:5]) @ v[:5]
        assert torch.allclose(found[path], best, atol=1e-5)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert result.evaluate_metrics_clientapp[2]["sum"] == 2 * len(PATHS)


def test_a_client_is_sent_the_largest_rank_first_and_its_own_from_then_on():
    ranks, seen = [1, 2, 4], {}
    grid = InProcessGrid(app_of(ranks, seen), nodes=3)
    FlexLoRA().start(grid, adapter(5, 0, b=False), num_rounds=2, train_config=CONFIG)
    name = NAME.format(PATHS[0], "A")
    for i, rank in enumerate(ranks):
        assert [len(got[name]) for got in seen[i]] == [5, rank]


def test_fedit_averages_factors_of_one_rank_and_names_who_has_another(caplog):
    ranks, seen = [3, 3, 2], {}
    grid = InProcessGrid(app_of(ranks, seen), nodes=3)
    result = FedIT().start(grid, adapter(3, 0, b=False), num_rounds=1, train_config=CONFIG)
    a = [adapter(3, 100 + i)[NAME.format(PATHS[0], "A")].numpy() for i in range(2)]
    mean = (a[0] + 2 * a[1]) / 3
    assert np.allclose(result.arrays[NAME.format(PATHS[0], "A")].numpy(), mean, atol=1e-6)
    assert "rank 2" in caplog.text


RULES = (
    Bound(),
    Median(),
    Trimmed(),
    Krum(attackers=0.15),
    MultiKrum(attackers=0.15),
    Geometric(),
)
METHODS = (
    FedIT(weights="uniform"),
    FlexLoRA(residual="carry", weights="uniform"),
    HeteroLoRA(average="change", weights="uniform", prune=False),
)


def near_one_another(ranks, liar=None, spread=0.01):
    """Answers that differ little, but for a liar's, which is sent the other way and 20 times."""

    def answer(i, content):
        rng, found = np.random.default_rng(i), {}
        for name, array in adapter(ranks[i], seed=7).items():
            values = array.numpy() * (1 + spread * rng.normal(size=array.numpy().shape))
            sign = -20 if i == liar and "lora_B" in name else 1
            found[name] = Array((sign * values).astype(np.float32))
        content["arrays"] = ArrayRecord(found)
        return content

    return answer


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_a_rule_withstands_a_node_that_lies(method, rule):
    """Law: with a rule the liar moves the average by a small part of what it moves the mean; of
    answers that are all alike the rule is the mean."""
    ranks = [3] * 7 if isinstance(method, FedIT) else [3, 3, 2, 3, 3, 2, 3]
    given = {"num_rounds": 1, "train_config": CONFIG}

    def end(rule, liar, ranks=ranks, spread=0.01):
        answers = near_one_another(ranks, liar, spread)
        grid = InProcessGrid(app_of(ranks, {}, answers), nodes=7)
        run = PlainFlower(method, robust=rule)
        return deltas(run.start(grid, adapter(3, 0, b=False), **given).arrays)

    def apart(one, other):
        return sum(float((one[p] - other[p]).norm() ** 2) for p in PATHS) ** 0.5

    honest = end(NO_RULE, None)
    moved, withstood = apart(end(NO_RULE, 4), honest), apart(end(rule, 4), honest)
    assert moved > 1
    assert withstood < 0.2 * moved
    alike = {"liar": None, "ranks": [3] * 7, "spread": 0.0}
    assert apart(end(rule, **alike), end(NO_RULE, **alike)) < 1e-4


def test_a_rule_that_cannot_act_is_refused():
    with pytest.raises(ValueError, match=r"^robust=Median: .*strategy.residual=carry"):
        PlainFlower(FlexLoRA(), robust=Median())
    grid = InProcessGrid(app_of([3, 3], {}), nodes=2)
    run = PlainFlower(FedIT(), robust=Krum())
    with pytest.raises(RunError, match="round 1: robust=Krum needs at least 5 clients"):
        run.start(grid, adapter(3, 0, b=False), num_rounds=1, train_config=CONFIG)


def test_heterolora_takes_any_rank():
    ranks, seen = [1, 2, 4], {}
    grid = InProcessGrid(app_of(ranks, seen), nodes=3)
    strategy = HeteroLoRA(prune=False)
    result = strategy.start(grid, adapter(4, 0, b=False), num_rounds=2, train_config=CONFIG)
    assert result.arrays[NAME.format(PATHS[1], "A")].numpy().shape == (4, 6)


def test_a_run_begins_where_the_initial_adapter_stands():
    seen = {}
    grid = InProcessGrid(app_of([4], seen), nodes=1)
    given = adapter(4, seed=7)
    FlexLoRA().start(grid, given, num_rounds=1, train_config=CONFIG)
    first = ArrayRecord({k: Array(v) for k, v in seen[0][0].items()})
    for path, d in deltas(given).items():
        assert torch.allclose(deltas(first)[path], d, atol=1e-5)


def one_factor(asked, honest=True):
    """Clients that send back what they were sent, but for the factors that they are to train."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        config = message.content["config"]
        trains = {"A": config["train_a"] or not honest, "B": config["train_b"]}
        asked.append(f"{'A' * config['train_a']}{'B' * config['train_b']}")
        got = {k: v.numpy() for k, v in message.content["arrays"].items()}
        moved = {
            k: Array(v + np.float32(0.1) * trains[k.split(".")[-2][-1]]) for k, v in got.items()
        }
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


@pytest.mark.parametrize(
    ("strategy", "turns"),
    [(Alternate(), "BBB"), (Alternate(schedule="ba"), "BAB"), (FlexLoRA(train="b"), "BBB")],
)
def test_nodes_are_told_which_factor_to_train_and_held_to_it(strategy, turns, caplog):
    asked = []
    grid = InProcessGrid(one_factor(asked), nodes=2)
    strategy.start(grid, adapter(3, 0, b=False), num_rounds=3, train_config=CONFIG)
    assert "".join(asked[::2]) == turns
    driver, grid = PlainFlower(strategy), InProcessGrid(one_factor([], honest=False), nodes=2)
    with pytest.raises(RunError, match="its A has changed, which this round does not train"):
        driver.start(grid, adapter(3, 0, b=False), num_rounds=1, train_config=CONFIG)


def wrong(change):
    def answer(i, content):
        return change(content) if i == 0 else content

    return answer


def with_arrays(change):
    def changed(content):
        arrays = {k: v.numpy().copy() for k, v in content["arrays"].items()}
        content["arrays"] = ArrayRecord({k: Array(v) for k, v in change(arrays).items()})
        return content

    return changed


def set_metric(value):
    def changed(content):
        content["metrics"]["num-examples"] = value
        return content

    return changed


NAN = {NAME.format(PATHS[0], "A"): np.full((1, 5), np.nan, np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_arrays(lambda a: {k: v for k, v in a.items() if "q_proj" not in k}), "q_proj"),
        (with_arrays(lambda a: a | NAN), "NaN"),
        (with_arrays(lambda a: a | {"head.weight": np.ones(2, np.float32)}), "is no LoRA factor"),
        (set_metric(0), "num-examples"),
        (set_metric(1.5), "num-examples"),
    ],
)
def test_a_bad_answer_is_named_and_left_out(change, message, caplog):
    ranks, seen = [1, 2, 4], {}
    grid = InProcessGrid(app_of(ranks, seen, wrong(change)), nodes=3)
    driver = PlainFlower(FlexLoRA(), min_nodes=2)
    driver.start(grid, adapter(5, 0, b=False), num_rounds=1, train_config=CONFIG)
    assert message in caplog.text
    with pytest.raises(RunError, match="min_nodes=3"):
        PlainFlower(FlexLoRA(), min_nodes=3).start(
            InProcessGrid(app_of(ranks, {}, wrong(change)), nodes=3),
            adapter(5, 0, b=False),
            num_rounds=1,
            train_config=CONFIG,
        )


@pytest.mark.parametrize(
    ("strategy", "arrays", "config", "message"),
    [
        (FlexLoRA(), adapter(2, 0), None, "lora_alpha"),
        (FedSA(), adapter(2, 0), CONFIG, "FedSA leaves B with each client"),
        (FlexLoRA(), ArrayRecord({}), CONFIG, "initial_arrays"),
        (FlexLoRA(), ArrayRecord({"w": Array(np.ones(2))}), CONFIG, "is no LoRA factor"),
        (
            SLoRA(stage1_rounds=1, aggregator=FlexLoRA()),
            adapter(2, 0, b=False),
            CONFIG,
            "no PEFT adapter can hold",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(strategy, arrays, config, message):
    grid = InProcessGrid(app_of([2], {}), nodes=1)
    with pytest.raises(RunError, match=message):
        strategy.start(grid, arrays, num_rounds=1, train_config=config)


def test_a_rank_above_the_initial_arrays_is_refused(caplog):
    grid = InProcessGrid(app_of([2, 4], {}), nodes=2)
    FlexLoRA().start(grid, adapter(3, 0, b=False), num_rounds=1, train_config=CONFIG)
    assert "rank 4, above the 3" in caplog.text


def test_a_node_says_once_how_many_examples_it_holds(caplog):
    """Weights are those of its first answers; a later answer that counts others is left out."""

    def grown(i, content):
        seen[i].append(None)
        content["metrics"]["num-examples"] = 1 + i + 10**9 * (i == 1 and len(seen[i]) > 2)
        return content

    seen = {}
    grid = InProcessGrid(app_of([2, 2], seen, grown), nodes=2)
    result = FedIT().start(grid, adapter(2, 0, b=False), num_rounds=2, train_config=CONFIG)
    assert "metrics['num-examples']=1000000002, and its first answer said 2" in caplog.text
    alone = deltas(adapter(2, 100))
    found = deltas(result.arrays)
    assert all(torch.allclose(found[path].double(), alone[path], atol=1e-6) for path in PATHS)


def test_an_evaluation_counts_what_its_node_said_at_first(caplog):
    def reply(node, examples, loss):
        metrics = MetricRecord({"num-examples": examples, "loss": loss})
        message = Message(RecordDict({"metrics": metrics}), node, "evaluate")
        message.metadata._src_node_id = node  # as if it had come from there
        return message

    strategy = PlainFlower(FedIT())
    first = strategy.aggregate_evaluate(1, [reply(1, 10, 1.0), reply(2, 30, 2.0)])
    assert first["loss"] == pytest.approx((10 * 1 + 30 * 2) / 40)
    second = strategy.aggregate_evaluate(2, [reply(1, 10**9, 9.0), reply(2, 30, 2.0)])
    assert second["loss"] == pytest.approx(2.0)
    assert "its first answer said 10" in caplog.text
