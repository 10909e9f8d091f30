"""Pre-train `model=tiny` and `model=tiny_gpt2`, which fedlora ships, from text anyone can install.

    python -m simulations.pretraining.pretrain --output out/tiny \\
        --tokens 14000000 --seed 0
    python -m simulations.pretraining.pretrain --arch gpt2 \\
        --output out/tiny_gpt2 \\
        --intermediate 512 --positions 512 --batch 4 --tokens 3400000 --save-every 2000 --seed 0

or compare ways to train from nothing (`simulations.pretraining.learner`), by a folder each:

    python -m simulations.pretraining.pretrain method=switchlora --output out/switchlora \\
        --rank 32 --lr 2e-2

Corpus, tokenizer, packing, training, evaluation and saving are one function each. On one thread the
run is deterministic for its arguments; an interrupted run goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import math
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from fedlora.core.cache import cache_root
from fedlora.core.errors import CheckpointError, RunFolderError
from fedlora.core.files import claim, output_folder, require_own
from fedlora.data.template import prompt
from fedlora.run import checkpoint
from fedlora.techniques.switchlora.schedule import CHOICES
from simulations.pretraining.corpus import (
    SOURCES,
    Document,
    MissingSource,
)
from simulations.pretraining.learner import (
    METHODS,
    Learner,
    Method,
    learner,
    require,
)
from simulations.pretraining.recipe import (
    ARCHITECTURES,
    BOS,
    EOS,
    PAD,
    Network,
    Recipe,
    build_model,
)
from simulations.pretraining.tokens import (
    SPECIALS,
    Text,
    Tokens,
    build_text,
    count,
    packed,
)

SAMPLES = (
    "Fellow-Citizens of the Senate and House of Representatives:\n\n",
    "The commerce of the United States with",
    prompt("What does the word 'river' mean?"),
    prompt("Write the text in capital letters.", "a large ship on the sea"),
    prompt("How many words does the text have?", "the treaty was signed in the spring"),
    prompt("Answer the question with Yes or No.", "Is oak a kind of tree?"),
    prompt("What part of speech is 'quickly' in the sentence?", "he ran quickly to the house"),
    prompt("Give a synonym of 'big'."),
)


@dataclass
class Progress:
    """The progress that a checkpoint holds besides weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one per step
    curve: list[dict[str, float]] = field(default_factory=list)


# --- training ------------------------------------------------------------------------------------


def train_step(trained: Learner, block: Tokens, step: int, recipe: Recipe) -> float:
    """One optimiser step on one block; returns the mean loss per token.

    Raises:
        FloatingPointError: if that is not finite; the step is then not taken.
    """
    model, optimizer = trained.network, trained.optimizer
    long = recipe.long_every > 0 and step % recipe.long_every == recipe.long_every - 1
    length = recipe.positions if long else recipe.length
    batch = torch.from_numpy(block.astype(np.int64)).view(-1, length)
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step) * trained.rate(step)
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    if not math.isfinite(float(loss.detach())):
        raise FloatingPointError(f"loss is {float(loss.detach())} at step {step}: lower --lr")
    loss.backward()
    trained.before_step(step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    trained.after_step(step)
    optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def evaluate(model: Network, rows: Sequence[Tokens], length: int) -> float:
    """Mean loss per token of the concatenated rows, read in windows of `length` tokens."""
    stream = np.concatenate(rows).astype(np.int64)
    total = 0.0
    for at in range(0, len(stream) - 1, length * 16):
        inputs = torch.from_numpy(stream[at : at + length * 16 + 1])
        full = (len(inputs) - 1) // length * length
        pieces = [(inputs[:full], inputs[1 : full + 1], length)] if full else []
        if tail := len(inputs) - 1 - full:
            pieces.append((inputs[full:-1], inputs[full + 1 :], tail))
        for given, wanted, width in pieces:
            logits = model(input_ids=given.view(-1, width), use_cache=False).logits
            total += float(functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
    return total / (len(stream) - 1)


class Stop:
    """Becomes true at the first SIGINT or SIGTERM, so that a run ends between two steps."""

    def __init__(self) -> None:
        self.asked = False
        self._numbers = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._ask) for number in self._numbers]
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in zip(self._numbers, self._before, strict=True):
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"signal {number}: saving after this step", flush=True)


def announce(progress: Progress, recipe: Recipe, speed: float) -> None:
    """Note the mean loss of the last 50 steps in the curve, and print how far the run is."""
    recent = progress.losses[-50:]
    mean = round(sum(recent) / len(recent), 4)
    progress.curve.append({"step": progress.step, "loss": mean})
    left = (recipe.steps - progress.step) * recipe.block / speed
    print(
        f"step {progress.step}/{recipe.steps}  tokens {progress.step * recipe.block:,}  "
        f"loss {mean:.4f}  lr {recipe.rate(progress.step - 1):.2e}  "
        f"{speed:,.0f} tokens/s  {left / 60:.1f} min left",
        flush=True,
    )


# --- files ---------------------------------------------------------------------------------------


def save(
    model: Network,
    tokenizer: PreTrainedTokenizerFast,
    report: dict[str, Any],
    output: Path,
) -> None:
    """Write model, tokenizer and training.json in place of what an earlier call wrote there."""
    with output_folder(output, {"trained_from": "nothing"}) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        special = {"pad_token": SPECIALS[PAD], "bos_token": SPECIALS[BOS]}
        special["eos_token"] = SPECIALS[EOS]
        for file, content in (("special_tokens_map", special), ("training", report)):
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (draft / f"{file}.json").write_text(text, encoding="utf-8")


def state_folder(recipe: Recipe, method: Method) -> Path:
    """Where checkpoints of exactly this recipe and method are kept, outside the output."""
    what = json.dumps([asdict(recipe), asdict(method)])
    return cache_root() / "pretrain" / hashlib.sha256(what.encode()).hexdigest()[:16]


def save_state(folder: Path, trained: Learner, progress: Progress) -> None:
    """Write weights, optimizer state and progress as the checkpoint of a step."""
    state = trained.state() | {"step": progress.step, "progress": asdict(progress)}
    checkpoint.save(folder, progress.step, checkpoint.pack(state), keep=1)


def load_state(folder: Path, trained: Learner) -> Progress:
    """Take up an interrupted run, or begin a new one where there is none.

    Raises:
        CheckpointError: if there are checkpoints and none can be read.
    """
    found = checkpoint.latest(folder)
    if found is None:
        return Progress()
    state = checkpoint.unpack(found.state)
    trained.load(state)
    return Progress(**state["progress"])


# --- report --------------------------------------------------------------------------------------


def held_out_losses(
    model: Network, documents: Sequence[Document], rows: Sequence[Tokens], length: int
) -> dict[str, dict[str, float]]:
    """Loss per token and bits per character (BOS and EOS included) of each source."""
    counts = count(documents, rows)
    result = {}
    for source in SOURCES:
        own = [r for d, r in zip(documents, rows, strict=True) if d.source == source]
        loss = evaluate(model, own, length)
        bits = loss * counts[source]["tokens"] / counts[source]["characters"] / math.log(2)
        result[source] = {"loss": round(loss, 4), "bits_per_character": round(bits, 4)}
    return result


def sample(model: Any, tokenizer: PreTrainedTokenizerFast, limit: int = 60) -> list[dict[str, str]]:
    """Greedy continuations of a few texts, as they come, within the context."""
    context = model.config.max_position_embeddings
    result = []
    for text in SAMPLES:
        ids = torch.tensor([[BOS, *tokenizer.encode(text, add_special_tokens=False)]])
        start = ids.shape[1]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, min(limit, context - start)),
            do_sample=False,
        )
        answer = tokenizer.decode(out[0, start:], skip_special_tokens=True)
        result.append({"text": text, "continuation": str(answer)})
    return result


def describe(recipe: Recipe, method: Method, progress: Progress, command: str) -> dict[str, Any]:
    """The part of training.json that is known at any time."""
    adapted = {} if method.method == "full" else {"method": asdict(method)}
    return {
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "recipe": asdict(recipe),
        **adapted,
        "threads": torch.get_num_threads(),
        "complete": progress.step >= recipe.steps,
        "steps": progress.step,
        "tokens": progress.step * recipe.block,
        "seconds": round(progress.seconds, 1),
        "curve": progress.curve,
    }


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One pre-training run: its recipe, its text, and where it goes."""

    recipe: Recipe
    text: Text
    output: Path
    command: str
    save_every: int
    method: Method = field(default_factory=Method)

    def train(self, trained: Learner, progress: Progress) -> None:
        """Take the steps that are left, saving on the way; ends early on a signal."""
        recipe = self.recipe
        stream = packed(self.text.train, recipe.block, recipe.seed)
        first, before, began = progress.step, progress.seconds, time.perf_counter()
        with Stop() as stop:
            for block in islice(stream, first, recipe.steps):
                progress.losses.append(train_step(trained, block, progress.step, recipe))
                progress.step += 1
                elapsed = time.perf_counter() - began
                progress.seconds = before + elapsed
                if progress.step % 50 == 0 or progress.step == recipe.steps:
                    announce(progress, recipe, (progress.step - first) * recipe.block / elapsed)
                due = progress.step % self.save_every == 0 and progress.step < recipe.steps
                if stop.asked or due:
                    save_state(state_folder(recipe, self.method), trained, progress)
                    self.checkpoint(trained, progress)
                if stop.asked:
                    raise SystemExit("stopped; the same command goes on from here")

    def checkpoint(
        self, trained: Learner, progress: Progress, last: bool = False
    ) -> dict[str, Any]:
        """Evaluate, without merging anything, and save; the last time also at full length, and with
        samples."""
        text, recipe, model = self.text, self.recipe, trained.network
        losses = held_out_losses(model, text.held, text.held_rows, recipe.length)
        plain = trained.exported()
        report = {
            **describe(recipe, self.method, progress, self.command),
            "parameters": sum(p.numel() for p in plain.parameters()),
            "corpus": text.counts,
            "held_out": losses,
        }
        if last:
            full = held_out_losses(model, text.held, text.held_rows, recipe.positions)
            report |= {"held_out_full_length": full, "samples": sample(plain, text.tokenizer)}
            report |= trained.report()
        save(plain, text.tokenizer, report, self.output)
        print(f"saved {self.output} at step {progress.step}: {json.dumps(losses)}", flush=True)
        return report


@contextmanager
def own_pools(recipe: Recipe, method: Method) -> Iterator[Method]:
    """The method with candidate vectors in a folder of this run, removed when the run ends.

    Raises:
        RunFolderError: if the same run is under way in another process.
    """
    if not method.pools:
        yield method
        return
    folder = Path(method.pools) / state_folder(recipe, method).name
    try:
        with claim(folder):
            yield replace(method, pools=str(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pretrain(
    recipe: Recipe,
    output: Path,
    command: str,
    save_every: int = 200,
    method: Method | None = None,
    text: Text | None = None,
) -> dict[str, Any]:
    """Build, train, evaluate and save; returns what training.json holds.

    Raises:
        ValueError: for a recipe and a method that do not go together, or an output folder that
            holds anything else, before any text is read.
        FloatingPointError: if the loss is not finite.
    """
    method = method or Method()
    require(recipe, method)
    require_own(output)
    run = Run(recipe, text or build_text(recipe), output, command, save_every, method)
    print(json.dumps(run.text.counts), flush=True)
    with own_pools(recipe, method) as mine:
        trained = learner(build_model(recipe), recipe, mine)
        kept = state_folder(recipe, method)
        progress = load_state(kept, trained)
        run.train(trained, progress)
        report = run.checkpoint(trained, progress, last=True)
    shutil.rmtree(kept, ignore_errors=True)
    return report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; every field of the recipe is an option."""
    parser = argparse.ArgumentParser(
        prog="fedlora pretrain",
        description="Pre-train a tiny model that fedlora ships: a Llama (model=tiny) or a GPT-2.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Recipe()
    option = parser.add_argument
    option("--arch", choices=ARCHITECTURES, default=default.arch, help="architecture")
    option("--output", type=Path, required=True, help="directory of the model, made if missing")
    option("--tokens", type=int, default=default.tokens, help="training tokens in all")
    option("--seed", type=int, default=default.seed, help="of corpus, split, order and weights")
    option("--vocabulary", type=int, default=default.vocabulary, help="tokens of the tokenizer")
    option("--hidden", type=int, default=default.hidden, help="width of the model")
    option("--intermediate", type=int, default=default.intermediate, help="width of the MLP")
    option("--layers", type=int, default=default.layers, help="number of layers")
    option("--heads", type=int, default=default.heads, help="attention heads")
    option("--positions", type=int, default=default.positions, help="longest sequence")
    option("--batch", type=int, default=default.batch, help="sequences of a step")
    option("--length", type=int, default=default.length, help="tokens of a sequence")
    option(
        "--long-every",
        type=int,
        default=default.long_every,
        help="every n-th step packs its tokens into sequences of --positions; 0: never",
    )
    option("--lr", type=float, default=default.lr, help="peak learning rate")
    option("--warmup", type=int, default=default.warmup, help="steps of linear warm-up")
    option("--decay", type=float, default=default.decay, help="weight decay of the matrices")
    option("--clip", type=float, default=default.clip, help="largest gradient norm")
    option(
        "--instruction-share",
        type=float,
        default=default.instruction_share,
        help="share of WordNet's characters that are instruction records",
    )
    option(
        "--sotu-repeats",
        type=int,
        default=default.sotu_repeats,
        help="times that an epoch shows the addresses",
    )
    option("--held-out", type=float, default=default.held_out, help="share of the groups held out")
    option("--wordnet", default=default.wordnet, help="directory with WordNet's data.* files")
    option("--beta2", type=float, default=default.beta2, help="of AdamW")
    _method_options(parser)
    option("--threads", type=int, default=1, help="torch threads; one is reproducible")
    option("--save-every", type=int, default=200, help="steps between two checkpoints")
    # method=switchlora is --method=switchlora, as in the project's other commands
    return parser.parse_args([f"--{a}" if a.startswith("method=") else a for a in arguments])


def _method_options(parser: argparse.ArgumentParser) -> None:
    default = Method()
    option = parser.add_argument_group("what is trained").add_argument
    option("--method", choices=METHODS, default=default.method, help="all weights, or factors")
    option("--rank", type=int, default=default.rank, help="of the factors")
    option("--alpha", type=float, default=default.alpha, help="their scale is alpha / rank")
    option("--interval", type=float, default=default.interval, help="switchlora: steps of a vector")
    option("--ratio", type=float, default=default.ratio, help="switchlora: share of the run to 0.3")
    option("--freeze", type=int, default=default.freeze, help="switchlora: steps of the partners")
    option("--choice", choices=CHOICES, default=default.choice, help="switchlora: what comes next")
    option("--pools", default=default.pools, help="switchlora: folder for candidate vectors")
    option("--merge-every", type=int, default=default.merge_every, help="relora: steps")
    option("--merge-warmup", type=int, default=default.merge_warmup, help="relora: steps")
    option("--full-steps", type=int, default=default.full_steps, help="all weights before factors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parse(given))
    output, threads = options.pop("output"), options.pop("threads")
    save_every = options.pop("save_every")
    if save_every < 1:
        raise SystemExit(f"pretrain: --save-every {save_every} must be >= 1")
    try:
        method = Method(**{f.name: options.pop(f.name) for f in fields(Method)})
    except ValueError as error:
        raise SystemExit(f"pretrain: {error}") from error
    recipe = Recipe(**options)
    if recipe.long_every and recipe.block % recipe.positions:
        raise SystemExit(
            f"pretrain: --batch x --length is {recipe.block}, which is not a multiple of "
            f"--positions {recipe.positions}, as --long-every needs"
        )
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    command = shlex.join(["python", "-m", "simulations.pretraining.pretrain", *given])
    try:
        pretrain(recipe, output, command, save_every, method)
    except (
        MissingSource, ValueError, FloatingPointError, OSError, RunFolderError, CheckpointError
    ) as error:  # fmt: skip
        raise SystemExit(f"pretrain: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
