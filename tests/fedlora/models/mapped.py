"""What the kernel says of a file that is mapped into this process (Linux).

As a program it is a worker: loads a model, uses every weight, and answers each line with its pages.
"""

import json
import re
import sys
from pathlib import Path

import torch

from fedlora.models.language_model import LanguageModel
from fedlora.models.spec import HuggingFace


def ranges(file: Path) -> list[tuple[int, int]]:
    """Addresses at which a file is mapped privately: writes stay in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [re.match(r"(\w+)-(\w+) ..[-x]p", line) for line in lines if line.endswith(str(file))]
    return [(int(m[1], 16), int(m[2], 16)) for m in found if m]


def pages(file: Path) -> dict[str, int]:
    """KiB of a mapped file: ``Rss`` in this process, ``Pss`` of it divided by the processes that
    share it, ``Anonymous`` of private copies."""
    totals, mine = {"Rss": 0, "Pss": 0, "Anonymous": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            mine = line.endswith(str(file))
        elif mine and name[:-1] in totals:
            totals[name[:-1]] += int(rest[0])
    return totals


def use(model: LanguageModel) -> None:
    """Read every weight as training does, forward and backward."""
    embedded = model.network.get_input_embeddings()(torch.arange(8)[None]).requires_grad_()
    model.network(inputs_embeds=embedded).logits.sum().backward()
    for p in model.network.parameters():
        p.sum()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    resident = HuggingFace(path=str(folder)).load(torch.device("cpu"))
    use(resident)
    for _ in sys.stdin:
        sys.stdout.write(json.dumps(pages(folder / "model.safetensors")) + "\n")
        sys.stdout.flush()
