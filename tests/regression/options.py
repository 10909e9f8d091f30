"""The words by which cases differ, in tables. ``{texts}`` is a file of records made for the run."""

from collections.abc import Mapping

Table = Mapping[str, str]

SERVERS: Table = {
    "fedadam": "strategy/server_optimizer=fedadam",
    "fedavgm": "strategy/server_optimizer=fedavgm",
}
SHRINK = (
    "strategy.prune=true strategy.gamma=0.5 strategy.penalty_weight=10 client.lr=0.02 "
    "federation.lr_decay=0.1 federation.lr_decay_round=1"
)
"""A tail that grew in the first round shrinks in the next, so that ranks are pruned."""
PRUNES = f"{SHRINK} rounds=3 population.clients=9 population.per_round=6"
EQUAL = "ranks=homogeneous ranks.rank=8"
U_SHAPE = "strategy.tail=1 strategy.cut=1"
MESSAGES = "strategy.transport=messages"

OF_STRATEGIES: Mapping[str, Table] = {
    "fedavg": SERVERS | {"uniform": "strategy.weights=uniform"},
    "fedit": SERVERS
    | {
        "uniform": "strategy.weights=uniform",
        "bfloat16": "federation.wire=bfloat16",
        "float64": "federation.wire=float64",
    },
    "flexlora": SERVERS
    | {
        "uniform": "strategy.weights=uniform",
        "covered": "strategy.weighting=covered",
        "split-a": "strategy.svd_split=a",
        "split-balanced": "strategy.svd_split=balanced",
        "carry": "strategy.residual=carry rounds=3",
        "carry-covered": "strategy.residual=carry strategy.weighting=covered rounds=3",
        "dense": "strategy.backend=dense",
        "core": "strategy.backend=core",
        "gram": "strategy.backend=gram",
        "random": "strategy.backend=random",
        "bfloat16": "federation.wire=bfloat16",
    },
    "heterolora": {
        "prune": PRUNES,
        "prune-fused": f"{PRUNES} engine=fused engine.tokens=160 engine.slots=4",
        "prune-min-rank": f"{PRUNES} strategy.min_rank=2 strategy.uncovered=zero",
        "examples": "strategy.weights=examples",
        "examples-sparsity": "strategy.weights=examples_sparsity",
        "model-norm": "strategy.norm_scope=model",
        "raw": "strategy.scale=raw",
        "zero": "strategy.uncovered=zero",
    },
    "slora": {
        "coverage": "strategy.sparse_average=coverage",
        "code": "strategy.density=code",
        "constant": "strategy.density=0.05 strategy.stage1_rounds=2",
        "uniform": "strategy.weights=uniform strategy.stage1_lr_scale=0.5",
        "fedit": "strategy@strategy.aggregator=fedit",
        "heterolora": "strategy@strategy.aggregator=heterolora",
        "lora-alone": "strategy.stage1_rounds=0",
    },
    "splitlora": {
        "messages": f"{MESSAGES} rounds=3",
        "messages-graphs": f"{MESSAGES} strategy.keep_graphs=true",
        "labels-stay": "strategy.tail=0",
        "u-shape": U_SHAPE,
        "u-shape-messages": f"{U_SHAPE} {MESSAGES}",
        "u-shape-per-client": f"{U_SHAPE} strategy.rule.update=per_client",
        "tiers": "+strategy.tier_cuts={T1:2,T4:4} strategy@strategy.aggregator=flexlora",
        "in-turn": "strategy.rule.update=sequential",
        "shuffled": "strategy.rule.update=sequential strategy.rule.order=shuffle",
        "per-client": "strategy.rule.update=per_client",
        "joint-examples": "strategy.rule.gradient=joint strategy.rule.weights=examples",
        "tokens": "strategy.rule.weights=tokens strategy.rule.tokens=200",
        "average-each-step": "strategy.average_every=1",
        "int8": "strategy.activations.kind=int8 strategy.gradients.kind=int8",
        "int8-stochastic": "strategy.activations.kind=int8 strategy.activations.stochastic=true "
        "strategy.activations.keep=2 strategy.gradients.kind=fp16",
        "topk": "strategy.activations.kind=bf16 strategy.gradients.kind=topk",
        "noise": "strategy.noise.clip=1.0 strategy.noise.sigma=0.05 strategy.activations.kind=int8",
        "smoothing": "strategy.label_smoothing=0.1 strategy.server_lr=0.001 "
        "strategy.client_schedule=constant strategy.horizon=6",
        "fresh": "strategy.memory=fresh strategy.server_rank=3 strategy.cut=2",
        "flexlora": "strategy@strategy.aggregator=flexlora",
        "heterolora": "strategy@strategy.aggregator=heterolora strategy.aggregator.prune=false",
        "sgd": "client=sgd client.momentum=0.9 client.loss=response",
        "gpt2": "model=tiny_gpt2",
    },
    "switchlora": {
        "product": "strategy.mode=sync_product",
        "dense": f"strategy.mode=dense {EQUAL} rounds=3",
        "dense-random": f"strategy.mode=dense {EQUAL} client.technique.choice=random "
        "client.technique.count_frozen=false client.technique.freeze=1 client.technique.interval=2",
        "often": f"{EQUAL} client.technique.freeze=1 client.technique.interval=2 "
        "client.technique.ratio=1.0 strategy.hash_every=1 client.dropout=0.0 rounds=3",
        "random": f"{EQUAL} client.technique.freeze=0 client.technique.interval=2 "
        "client.technique.choice=random strategy.replicas=false",
        "uniform": "strategy.weights=uniform client=switchlora client.optimizer=sgd",
    },
    "spp": {
        "beta-only": "strategy.mode=beta_only",
        "separate": "strategy.mode=separate",
        "stack": "strategy.mode=stack",
        "merged": "strategy.merge_every=2 rounds=3",
        "schedule": "strategy.schedule=[beta,beta,alpha] rounds=3",
        "uniform": "strategy.weights=uniform client.dropout=0.0",
        "magnitude": "model.method=magnitude rounds=1",
        "sparsegpt": "model.method=sparsegpt rounds=1",
        "block-by-block": "model.sequential=true model.pattern=0.5 rounds=1",
        "bfloat16": "federation.wire=bfloat16",
        "gpt2": "model@model.base=tiny_gpt2 model.base.targets=all-linear",
    },
}

OF_CLIENTS: Table = {
    "sgd": "client=sgd client.momentum=0.9 client.weight_decay=0.01 client.schedule=cosine",
    "epochs": "client.steps=0 client.epochs=2 client.max_examples=3 client.batch_size=2 rounds=1",
    "response": "client.loss=response",
    "micro": "client.batch_size=3 client.micro_batch_size=1 client.warmup=0.5 "
    "client.max_grad_norm=0.1",
    "decay": "client.weight_decay=0.1 client.schedule=constant client.max_grad_norm=0 "
    "client.betas=[0.8,0.95] client.eps=1e-6 federation.lr_decay=0.5 federation.lr_decay_round=1",
    "a-frozen": "client.train_a=false",
    "bf16": "client.autocast=bf16 client.steps=1 population.per_round=1 rounds=1",
    "no-dropout": "client.dropout=0.0 population.per_round=1",
}
ON_BOTH = ("sgd", "epochs", "response", "micro", "decay", "a-frozen", "bf16")

EVALUATED = (
    "evaluate=fast evaluate.clients=2 evaluate.plan.max_new_tokens=4 evaluate.plan.batch_size=3 "
    "evaluate.groups=[seen,unseen_random,participants] evaluate.adapters=[full,own,largest]"
)
BRIEF = "client.steps=1 rounds=1"
CROWD = "engine.slots=3 population.per_round=8 client.steps=0 client.batch_size=1 rounds=1"
OF_GROUPS: Mapping[str, Table] = {
    "ranks": {
        "homogeneous": f"{BRIEF} ranks=homogeneous",
        "light": f"{BRIEF} ranks=heavy_tail_light ranks.variant=code",
        "strong": f"{BRIEF} ranks=heavy_tail_strong ranks.quotas=iid",
        "strong-readme": f"{BRIEF} ranks=heavy_tail_strong ranks.variant=readme",
        "normal": f"{BRIEF} ranks=normal",
        "paper": f"{BRIEF} ranks=uniform ranks.preset=paper",
        "custom": f"{BRIEF} ranks=custom ranks.clamp=true",
        "custom-fused": f"{BRIEF} ranks=custom engine=fused engine.tokens=160 engine.slots=4",
    },
    "data": {
        "addresses": "data=sotu data.clients=40 data.max_length=48 population.clients=24",
        "cut": f"{BRIEF} data.truncation=right data.max_length=40",
        "iid": f"{BRIEF} data.partition=iid data.clients=7",
        "dirichlet": f"{BRIEF} data.partition=dirichlet data.clients=6",
        "seed": "seed=3 client.steps=1 population.fraction=0.2 population.per_round=0",
    },
    "model": {
        "gpt2": "model=tiny_gpt2",
        "fused-gpt2": "model=tiny_gpt2 model.targets=all-linear",
        "gpt2-split": "model=tiny_gpt2 model.split_qkv=true model.targets=[q_attn,v_attn]",
        "targets": "model.targets=[q_proj,v_proj] rounds=1",
        "half": "model.dtype=bfloat16 rounds=1",
        "pruned": "strategy=fedit model=pruned model.method=magnitude rounds=1",
    },
    "engine": {
        "auto": "engine=auto engine.tokens=160 engine.slots=2",
        "fused-padded": "engine.layout=padded rounds=1",
        "fused-checkpoint": "engine.checkpoint=true rounds=1",
        "fused-fifo-refill": f"engine.policy=fifo_refill {CROWD}",
        "fused-fifo-wave": f"engine.policy=fifo_wave {CROWD}",
        "fused-lpt-wave": f"engine.policy=lpt_wave {CROWD}",
        "fused-length-match": f"engine.policy=length_match {CROWD}",
        "faulty": "engine=faulty engine.raise_fraction=0.3 engine.nan_fraction=0.2 "
        "population.per_round=9 federation.min_success=0.2 rounds=1",
    },
    "evaluate": {
        "fast": f"{EVALUATED} rounds=1",
        "fused-fast": f"{EVALUATED} rounds=1",
        "heterolora": f"{EVALUATED} strategy=heterolora evaluate.adapters=[own] rounds=1",
        "slora": f"{EVALUATED} strategy=slora strategy.stage1_rounds=1 evaluate.adapters=[own] "
        "evaluate.plan.generate=false",
        "splitlora": f"{EVALUATED} strategy=splitlora evaluate.adapters=[own,full] rounds=1 "
        "evaluate.plan.generate=false",
        "spp": f"{EVALUATED} strategy=spp model.method=magnitude evaluate.groups=[seen] rounds=1",
        "switchlora": f"{EVALUATED} strategy=switchlora evaluate.groups=[seen] rounds=1",
        "full": "evaluate=full evaluate.clients=1 evaluate.plan.max_new_tokens=3 rounds=1 "
        "evaluate.plan.max_examples=2",
        "paper-code": "evaluate=paper_code evaluate.plan.max_examples=2 rounds=1",
        "unseen-task": f"evaluate=loss {BRIEF} population.unseen_categories=[upper] "
        "evaluate.groups=[unseen_task] evaluate.clients=2",
    },
    "federation": {
        "one-each": "federation.clients_per_message=1 engine=fused engine.tokens=160 "
        "engine.slots=4 rounds=1",
        "bounded": "federation.max_update_norm=0.9 federation.min_success=0.1 rounds=1",
    },
    "alone": {
        "lora": "strategy=fedit population.per_round=1 rounds=1 client.steps=4 client.warmup=0.25",
        "lora-fused": "strategy=fedit population.per_round=1 rounds=1 client.steps=4 "
        "engine=fused engine.tokens=160 engine.slots=4",
        "sparse": "strategy=slora strategy.stage1_rounds=1 population.per_round=1 rounds=1 "
        "client.steps=4",
        "pruning": f"strategy=heterolora {SHRINK} {EQUAL} population.clients=1 "
        "population.unseen_fraction=0 population.per_round=1",
        "spp": "strategy=spp strategy.mode=stack model.method=magnitude population.per_round=1 "
        "rounds=1 client.steps=4",
        "switchlora": f"strategy=switchlora strategy.mode=dense {EQUAL} population.per_round=1 "
        "client.technique.freeze=1 client.technique.interval=2 rounds=1 client.steps=6",
    },
}

TUNED = (
    "data=jsonl data.path={texts} data.max_length=64 model.method=magnitude "
    "model.pattern=2:4 client.steps=3 client.batch_size=2 client.lr=0.02 --held 4 --rank 4"
)
NETWORK = (
    "--hidden 16 --intermediate 16 --layers 1 --heads 2 --positions 32 --batch 4 --length 16 "
    "--vocabulary 300 --tokens 640 --long-every 3 --warmup 2 --held-out 0.2 --lr 0.01"
)
FACTORS = "--rank 4"
COMMANDS: Mapping[str, Table] = {
    "merged": {
        "flexlora": f"strategy=flexlora {BRIEF}",
        "spp": f"strategy=spp model.method=magnitude {BRIEF}",
        "switchlora": f"strategy=switchlora {BRIEF}",
        "gpt2-split": f"model=tiny_gpt2 model.split_qkv=true model.targets=[q_attn,v_attn] {BRIEF}",
    },
    "scored": {"beams": f"{BRIEF}"},
    "finetune": {
        "none": f"--method none {TUNED}",
        "lora": f"--method lora {TUNED} client.dropout=0.1",
        "spp": f"--method spp {TUNED} client.dropout=0.1",
        "masked-lora": f"--method masked_lora {TUNED}",
        "masked-full": f"--method masked_full {TUNED}",
    },
    "pretrain": {
        "full": f"--method full {NETWORK}",
        "gpt2": f"--method full --arch gpt2 {NETWORK}",
        "lora": f"--method lora {FACTORS} {NETWORK}",
        "relora": f"--method relora {FACTORS} {NETWORK} --merge-every 4 --merge-warmup 1",
        "switchlora": f"--method switchlora {FACTORS} {NETWORK} --interval 4 --ratio 10 --freeze 2",
        "switchlora-random": f"--method switchlora {FACTORS} {NETWORK} --interval 4 --ratio 10 "
        "--freeze 2 --choice random --full-steps 2",
    },
}
