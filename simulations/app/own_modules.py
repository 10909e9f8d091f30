"""Where a user's own methods, data sources and engines are imported from."""

import os
import sys

from fedlora.core import variables


def find_own_modules() -> None:
    """Let this process import modules of the directory the user works in.

    It comes last: a file there that is named as a module of the installation hides nothing.
    """
    folder = os.environ.get(variables.CWD) or os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
