"""The instruction prompt: how a record of three texts becomes one text to model.

Same fields as the Alpaca prompt (instruction, optional input, response), own wording, and short,
because most tokens of a Natural Instructions client are prompt.
"""

VERSION = 1  # part of the token cache's key: raise it whenever the text below changes

ANSWER = "\n\n### Answer\n"


def question(instruction: str, input: str = "") -> str:
    """The prompt up to the mark that asks for the answer. What is too long is cut from its end."""
    return f"### Task\n{instruction}\n\n### Input\n{input}" if input else f"### Task\n{instruction}"


def prompt(instruction: str, input: str = "") -> str:
    """Everything the model reads before it answers. The answer follows immediately."""
    return question(instruction, input) + ANSWER
