"""Texts of a run's model: answers to prompts, or after every context of the run's data with scores.

python -m simulations.tools.generate outputs/RUN --prompt "Name three trees."   # or --file, --chat
python -m simulations.tools.generate outputs/RUN   # test split, final adapter, 10 beams
python -m simulations.tools.generate outputs/RUN --adapter none     # the base model
python -m simulations.tools.generate outputs/A outputs/B --limit 50 # one table of several runs

Without a prompt: beam search and the E2E metrics.
Writes nlg.json (scores, settings) and nlg.jsonl (context, hypothesis, references) into each run
folder; nlg-base.* for the base model. Examples of one prompt are one context, decoded once, with
all their responses as references, whichever clients hold them.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.core.cache import cache_root
from fedlora.core.checks import at_least, one_of
from fedlora.core.config import build
from fedlora.core.errors import CheckpointError, ConfigError, ModelError
from fedlora.core.files import write_file
from fedlora.data.source import Source
from fedlora.data.store import TokenStore, prepare
from fedlora.engine.worker import resolve_device
from fedlora.evaluation.beam_search import Decoding, search
from fedlora.evaluation.corpus_metrics import evaluate
from fedlora.evaluation.metrics import Ids
from fedlora.run.progress import clock
from simulations.tools.base_model import language_model_of
from simulations.tools.final_payload import final_payload, run_config
from simulations.tools.prompts import GREEDY, Question, answer_file, answerer, chat, typed

ADAPTERS = ("final", "none")
SPLITS = ("test", "eval")
_BETWEEN_LINES_S = 10.0


@dataclass(frozen=True)
class Request:
    """Options of generation and scoring, the same for every run."""

    split: str = "test"
    limit: int = 0
    """The first contexts of the split only; 0: all."""
    adapter: str = "final"
    """``final``: of the run's last round; ``none``: the base model as it is."""
    device: str = "auto"
    decoding: Decoding = dataclasses.field(default_factory=Decoding)

    def __post_init__(self) -> None:
        one_of("split", self.split, SPLITS)
        at_least("limit", self.limit, 0)
        one_of("adapter", self.adapter, ADAPTERS)

    @property
    def stem(self) -> str:
        """The name of the two files in the run folder."""
        return "nlg" if self.adapter == "final" else "nlg-base"


@dataclass(frozen=True, eq=False)
class Context:
    """A distinct prompt of a split and every response that the data has for it."""

    prompt: Ids
    """BOS and the prompt's tokens, ``[t]``."""
    references: list[str]


def contexts(store: TokenStore, split: str) -> list[Context]:
    """The distinct prompts of a split over all clients, in the order of their first appearance."""
    found: dict[bytes, Context] = {}
    for client in range(store.num_clients):
        texts = store.references(client, split)
        for example, text in zip(store.examples(client, split), texts, strict=True):
            prompt = example.input_ids[: max(1, example.prompt_tokens)]
            found.setdefault(prompt.tobytes(), Context(prompt, [])).references.append(text)
    return list(found.values())


def score_run(run: Path, request: Request, emit: Callable[[str], object]) -> dict[str, Any]:
    """Generate for one run, write its two files and return what nlg.json holds.

    Raises:
        ConfigError: if the folder is not that of a run, or the split is empty.
        ModelError, DataError, CheckpointError: if model, data or adapter cannot be read.
    """
    config = run_config(run)
    spec = language_model_of(run, config.model, emit)
    source = build(config.data, Source, "data")  # type: ignore[type-abstract]
    store = TokenStore(prepare(source, spec.tokenizer(), spec.tokenizer_id(), cache_root()))
    every = contexts(store, request.split)
    asked = every[: request.limit or None]
    if not asked:
        raise ConfigError(f"{run}: no client has an example in its {request.split} split")
    model = spec.load(resolve_device(request.device))
    if request.decoding.max_new_tokens >= model.info.context:
        raise ConfigError(
            f"--max-new-tokens {request.decoding.max_new_tokens} leaves no room for a prompt in "
            f"the {model.info.context} positions of {model.info.name}"
        )
    final = request.adapter == "final"
    adapter = final_payload(run, config, model.info, emit) if final else None
    model.mount(adapter)
    emit(f"{run.name}: {len(asked)} of {len(every)} contexts of the {request.split} split")
    began = time.monotonic()
    found = search(model, [c.prompt for c in asked], request.decoding, progress=Lines(emit))
    seconds = time.monotonic() - began
    scores = evaluate([h.text for h in found], [c.references for c in asked])
    rows = [
        {
            "context": model.tokenizer.decode(c.prompt.tolist(), skip_special_tokens=True),
            "hypothesis": h.text,
            "references": c.references,
            "tokens": len(h.ids),
            "ended": h.ended,
        }
        for c, h in zip(asked, found, strict=True)
    ]
    record = {
        "scores": dataclasses.asdict(scores),
        "contexts": len(asked),
        "contexts_in_split": len(every),
        "references": sum(len(c.references) for c in asked),
        "unfinished": sum(not h.ended for h in found),
        "seconds": seconds,
        "split": request.split,
        "adapter": request.adapter,
        "decoding": dataclasses.asdict(request.decoding),
    }
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in rows]
    write_file(run / f"{request.stem}.jsonl", "".join(lines))
    write_file(run / f"{request.stem}.json", json.dumps(record, indent=1) + "\n")
    return record


class Lines:
    """Shows the progress of decoding at intervals."""

    def __init__(
        self, emit: Callable[[str], object], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._emit, self._now = emit, now
        self._began = self._last = now()

    def __call__(self, done: int, of: int) -> None:
        now = self._now()
        if now - self._last >= _BETWEEN_LINES_S:
            self._last = now
            left = (now - self._began) * (of - done) / done
            self._emit(f"  {done}/{of} contexts  ETA {clock(left)}")


def table(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    """The columns of the papers' tables: ROUGE-L in per cent, the others unchanged."""
    width = max(len("run"), *map(len, names))
    lines = [
        f"{'run':<{width}}   BLEU     NIST   METEOR  ROUGE-L   CIDEr  contexts  seconds",
    ]
    for name, record in zip(names, records, strict=True):
        s = record["scores"]
        meteor = "-" if s["meteor"] is None else f"{s['meteor']:.4f}"
        lines.append(
            f"{name:<{width}}  {s['bleu']:5.2f}  {s['nist']:7.4f}  {meteor:>7}  "
            f"{100 * s['rouge_l_e2e']:7.2f}  {s['cider']:6.4f}  {record['contexts']:8d}  "
            f"{record['seconds']:7.1f}"
        )
    notes = dict.fromkeys(r["scores"]["meteor_note"] for r in records)
    return "\n".join([*lines, *(f"METEOR: not computed ({note})" for note in notes if note)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedlora generate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    add("--split", choices=SPLITS, default="test")
    add("--limit", type=int, default=0, help="the first so many contexts; 0: all")
    add("--adapter", choices=ADAPTERS, default="final", help="none: the base model as it is")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    asked = parser.add_argument_group("prompts, of one run").add_mutually_exclusive_group()
    add = asked.add_argument
    add("--prompt", metavar="TEXT", help="print the answer to one instruction")
    add("--file", type=Path, help="a prompt a line; .jsonl: instruction, input")
    add("--chat", action="store_true", help="a conversation; /new forgets, /exit ends")
    parser.add_argument("--input", default="", help="beside --prompt: what it is about")
    given = parser.add_argument_group("decoding", argument_default=argparse.SUPPRESS)
    add = given.add_argument
    add("--beams", type=int, help="1: greedy; default 10, for prompts 1")
    add("--length-penalty", type=float, help="default 0.8")
    add("--no-repeat", type=int, help="n-grams of this size once only; default 4, for prompts 0")
    add("--max-new-tokens", type=int, help="default 64, for prompts 128")
    add("--stop-ids", type=int, nargs="+", help="token ids that also end; the E2E code: 628")
    add("--batch-size", type=int, help="contexts at a time; default 8")
    return parser


def _request(options: argparse.Namespace) -> Request:
    plain = {k: getattr(options, k) for k in ("split", "limit", "adapter", "device")}
    names = {f.name for f in dataclasses.fields(Decoding)}
    given = {k: v for k, v in vars(options).items() if k in names}
    if "stop_ids" in given:
        given["stop_ids"] = tuple(given["stop_ids"])
    usual = GREEDY if _asks(options) else Decoding()
    return Request(**plain, decoding=dataclasses.replace(usual, **given))


def _asks(options: argparse.Namespace) -> bool:
    """Whether there are prompts to answer, and no data to score."""
    return options.chat or options.prompt is not None or options.file is not None


def _answer(options: argparse.Namespace, request: Request, emit: Callable[[str], object]) -> None:
    """Answer the prompts of the options on the standard output.

    Raises:
        ConfigError: for several runs, or an empty prompt.
    """
    if len(options.runs) > 1:
        raise ConfigError("prompts are answered by one run: name one run folder")
    if options.prompt is not None and not options.prompt.strip():
        raise ConfigError("--prompt is empty")
    (run,) = options.runs
    answers = answerer(run, request.adapter, request.device, request.decoding, emit)
    if options.chat:
        chat(answers, typed())
    elif options.file is not None:
        answer_file(answers, options.file)
    else:
        asked = answers.prompt(Question(options.prompt, options.input))
        print(answers.answer([asked])[0].text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options = _parser().parse_args(arguments)
    names = [run.resolve().name for run in options.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in options.runs]

    def emit(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        request = _request(options)
        if _asks(options):
            _answer(options, request, emit)
            return 0
        records = [score_run(run, request, emit) for run in options.runs]
    except (ModelError, CheckpointError, ValueError) as error:  # of data and configuration too
        print(error, file=sys.stderr)
        return 2
    print(table(names, records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
