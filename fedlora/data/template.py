"""Templates: how a record of three texts becomes one sequence of tokens.

The usual one is an instruction prompt with the fields of the Alpaca prompt (instruction, optional
input, response), own wording, and short, because most tokens of a Natural Instructions client are
prompt. `data.template` names another one. A tokenizer's own chat template, and a user's file, are
not among these: `fedlora.data.chat`.
"""

from collections.abc import Callable
from dataclasses import dataclass

VERSION = 1  # part of the token cache's key: raise it whenever the text below changes

ANSWER = "\n\n### Answer\n"


def question(instruction: str, input: str = "") -> str:
    """The prompt up to the mark that asks for the answer. What is too long is cut from its end."""
    return f"### Task\n{instruction}\n\n### Input\n{input}" if input else f"### Task\n{instruction}"


def prompt(instruction: str, input: str = "") -> str:
    """Everything the model reads before it answers. The answer follows immediately."""
    return question(instruction, input) + ANSWER


@dataclass(frozen=True)
class Template:
    """A sequence is ``[BOS] question mark | lead output EOS``; at ``|`` the response begins.

    Both sides of ``|`` are tokenised apart, so the border between them is exact.
    """

    version: int | str
    """Part of the token cache's key: no two templates share one, and a change needs a new one."""
    question: Callable[[str, str], str]
    """Maps instruction and input to the text before the mark. What is too long gives way here, from
    its end; the mark survives every truncation."""
    mark: str = ""
    """Text that ends the prompt. Empty: the EOS token ends it."""
    lead: str = ""
    """Goes before an output that is not empty, as part of the response."""
    bos: bool = True
    """Whether a sequence begins with BOS, if the tokenizer has one."""


INSTRUCTION = Template(VERSION, question, ANSWER)
"""The instruction prompt."""


def _context(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction


CONTEXT = Template("context 1", _context, lead=" ", bos=False)
"""``context EOS | " " completion EOS``, as the LoRA and SplitLoRA code lay out E2E for GPT-2."""


def _alpaca(instruction: str, input: str) -> str:
    about = ", paired with an input that provides further context" if input else ""
    text = (
        f"Below is an instruction that describes a task{about}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}"
    )
    return f"{text}\n\n### Input:\n{input}" if input else text


ALPACA = Template("alpaca 1", _alpaca, "\n\n### Response:")
"""The prompt of Stanford Alpaca (``train.py`` of tatsu-lab/stanford_alpaca), word for word."""

TEMPLATES = {"ours": INSTRUCTION, "alpaca": ALPACA, "context": CONTEXT}
"""What `data.template` can name, beside ``chat`` and a file."""
CHAT = "chat"


def is_chat(name: str) -> bool:
    """Whether a template is a tokenizer's chat template or a file: only answers are trained."""
    return name not in TEMPLATES
