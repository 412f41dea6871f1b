"""A process of its own that runs a test claim, so that tests can interrupt it: ``driver.py HOME JOBS FACTORY KEYWORDS``."""

import json
import sys

import claims_for_tests

from polyak.lab import Store, run

if __name__ == "__main__":
    home, jobs, factory, keywords = sys.argv[1:]
    claim = getattr(claims_for_tests, factory)(**json.loads(keywords))
    with Store(home) as store:
        print(json.dumps(run(claim, store=store, jobs=int(jobs)).to_json()))
