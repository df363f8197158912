"""How far a reader has to follow a training run from main() to the end of its first update."""

import json
import os
import sys

import fork_server
from helpers import ROOT

# Counted by first_update.py. They may be lowered, and never rise unnoticed.
FUNCTIONS, FILES, MOVES = 131, 18, 130


def test_the_way_to_the_end_of_the_first_update_does_not_grow():
    script = os.path.join(ROOT, "tests", "first_update.py")
    done = fork_server.run(
        [sys.executable, script, "--json"], capture_output=True, encoding="utf-8", timeout=300, check=True
    )
    counts = json.loads(done.stdout)
    assert counts["functions"] <= FUNCTIONS and counts["files"] <= FILES and counts["moves"] <= MOVES, counts
