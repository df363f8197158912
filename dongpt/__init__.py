"""The Python interface of donGPT.

import dongpt
generator = dongpt.load("out-quickstart")
text = generator.generate("The ", max_new_tokens=100, seed=1)
"""

from dongpt import root_modules

__version__ = "0.1.0"
root_modules.install_loader(__path__[0])


def __getattr__(name: str):
    """Import load or UserError when it is first used (PEP 562)."""
    if name == "load":
        from dongpt.decode.ready import load

        return load
    if name == "UserError":
        from dongpt.program import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
