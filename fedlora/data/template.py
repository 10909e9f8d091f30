"""The instruction prompt: how a record of three texts becomes one text to model.

Same fields as the Alpaca prompt (instruction, optional input, response), own wording, and short,
because most tokens of a Natural Instructions client are prompt.
"""

VERSION = 1  # part of the token cache's key: raise it whenever the text below changes


def prompt(instruction: str, input: str = "") -> str:
    """Everything the model reads before it answers. The answer follows immediately."""
    middle = f"\n\n### Input\n{input}" if input else ""
    return f"### Task\n{instruction}{middle}\n\n### Answer\n"
