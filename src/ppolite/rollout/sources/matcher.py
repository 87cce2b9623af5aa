"""The process in which a recipe's pattern is searched for, since `re` cannot be told to give up.

Started by `rules.py` as a file of its own, it imports nothing of ppolite. A line of JSON in, a line of JSON out:

    {"pattern": "a+b", "text": "xaab"}  → true
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings

LONGEST = 60
"""Seconds after which a search ends this process, should nobody be left to do it; `rules.py` is quicker."""


def serve() -> None:
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(LONGEST)
        found = re.search(request["pattern"], request["text"]) is not None
        signal.alarm(0)
        print(json.dumps(found), flush=True)  # noqa: T201  the answer
    os._exit(0)


if __name__ == "__main__":
    serve()
